"""Trains arms on seeds, side by side, under one parent run; started again, it goes on.

    came = repeat({"": configuration}, crossed([""], [0, 1, 2]), recorder=recorder)
    came = repeat({"A": one, "B": other}, crossed(["A", "B"], [0, 1, 2]), name="losses")

The workers are a search's (research/search/), one for each GPU unless more are asked for.  What is
there already of the same settings and the same code is not trained again: a start that was stopped
or killed goes on with what is missing, each training from its last checkpoint, and more seeds may
be asked for later.  Where it stands is a study in a journal beside the runs' store.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import optuna

from research.configuration.compose import ConfigurationError
from research.configuration.schema import Configuration
from research.recording.identity import files_of
from research.recording.record import is_recorded
from research.repetition.summary import markdown, metrics_of
from research.repetition.trainings import Training, TrainingResult, Trainings, trained_in
from research.resumption import settings_in
from research.search import parent
from research.search.arms import Arms, document_of
from research.search.coordinator import Coordinator, Ending, told_places
from research.search.display import FINISHED
from research.search.document import Search
from research.search.results import Results
from research.search.slots import Counts
from research.search.storage import file_lock, open_storage, storage_address
from research.search.studies import names_in
from research.tracking.provenance import hash_code, hash_of
from research.tracking.run import Recorder
from research.tracking.runs import find_tagged
from research.tracking.spool import spool_root
from research.tracking.store import TrackingError, redact, resolve_tracking_uri, show_command

SUMMARY = "summary.md"
# What of the package takes no part in a training: to change it leaves figures as they are.
APART = (
    *("comparison", "configuration", "pictures", "recording", "repetition", "search", "statistics"),
    *("tracking", "command.py", "compare.py", "evaluate.py", "fit.py", "predict.py", "repair.py"),
    *("replay.py", "sweep.py"),
)
OF_ITS_OWN = re.compile(r"(seed_everything|run_name|tracking_uri)$|random\.")


@dataclass(frozen=True)
class Repetition:
    """What came of it: the parent run's id and its experiment's; each training, arm by arm.

    `notes` is what there is to say beside the figures.
    """

    parent: tuple[str, str] | None
    trained: Sequence[TrainingResult]
    notes: Sequence[str]

    @property
    def parent_run_id(self) -> str | None:
        return None if self.parent is None else self.parent[0]

    def runs(self) -> dict[str, list[str]]:
        """The ids of each arm's recorded runs, whatever became of them."""
        found: dict[str, list[str]] = {each.arm: [] for each in self.trained}
        for each in self.trained:
            if each.run_id is not None:
                found[each.arm].append(each.run_id)
        return found


def repeat(
    arms: Mapping[str, Configuration],
    trainings: Sequence[Training],
    *,
    name: str | None = None,
    recorder: Recorder | None = None,
    command: str = "the same command",
    anew: str | None = None,
    is_tested: bool = True,
    workers: int | None = None,
    workers_per_gpu: int | None = None,
    together: int = 1,
    goes_on_with_other_code: bool = False,
    tags: Mapping[str, str] = {},
    out: TextIO | None = None,
) -> Repetition:
    """Train what is not there yet; what came of all of it.

    arms: complete settings by the arm's name; runs go where those of the first arm go.
    name: of the parent run; another one trains everything anew.
    command: what a person types to go on.
    anew: what a person does to have all trained again; None: delete the parent run.
    is_tested: each is tested once at its end; else the test split is not looked at.
    goes_on_with_other_code: also with what was begun before the code was changed.
    tags: of the parent run.
    out: for what is said meanwhile; standard error.

    ConfigurationError for settings that do not go; SearchFailed where nothing gets on.
    KeyboardInterrupt after Ctrl-C and SystemExit after SIGTERM, once all is in order.
    """
    first = next(iter(arms.values()))
    out = sys.stderr if out is None else out
    uri = resolve_tracking_uri(first.values.tracking_uri) if is_recorded(first) else None
    for configuration in arms.values():
        if configuration.values.trainer.num_nodes > 1:
            raise ConfigurationError(
                f"trainer.num_nodes is {configuration.values.trainer.num_nodes}: several seeds are "
                "trained by processes of this machine, each on devices of it. Leave it out."
            )
    name = name or first.values.run_name or described(arms)
    folder = spool_root(uri or "").with_name(".repetitions")
    study = f"{slug(name)}-{identity(arms, name, uri, is_tested)}"
    file, told = place_of(folder, study, code_of(arms.values())[:8], goes_on_with_other_code)
    folder.mkdir(parents=True, exist_ok=True)
    if uri is not None and file.exists():
        told = set_aside_if_lost(file, uri) or told
    if told is not None:
        print(told, file=out, flush=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # what it says of each trial, we say
    document = document_of(
        file.stem,
        {arm: settings_of(configuration) for arm, configuration in arms.items()},
        first.values.experiment,
        metric_of(arms.values()),
        is_tested,
        workers,
        workers_per_gpu,
        together,
    )
    search = Search.from_document(document)
    assert isinstance(search, Arms)
    repeater = Repeater(search, file, uri, recorder, command, out)
    repeater.ask(trainings, name, first.values.run_name or "")
    repeater.anew = anew
    repeater.params, repeater.tags = in_common(arms), tags
    ending = repeater.run()
    return Repetition(ending.run, repeater.trained(), ending.notes)


class Repeater(Coordinator):
    """A coordinator that trains what it is asked to, and says what the trainings have in common."""

    advice = "Mend it, and start the same command again: what failed is tried again."
    wanted: Sequence[Training]
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    anew: str | None

    def ask(self, wanted: Sequence[Training], name: str, prefix: str) -> None:
        """What is to be trained; names of the parent run and, before theirs, of its children."""
        self.wanted, self.name, self.prefix = wanted, name, prefix

    @property
    def nothing_left(self) -> str:  # type: ignore[override]
        anew = self.anew
        if anew is None:
            run = f" {self.where[0]}" if self.where is not None else ""
            anew = f"delete their parent run{run} from the store, and start the same command"
        return (
            "Nothing was left to do: all were trained before, by the same code. To train them "
            f"again, {anew}."
        )

    def make_studies(self, extend: bool) -> Trainings:
        assert isinstance(self.search, Arms)
        address = storage_address(None, self.file)
        opened = open_storage(address, self.file)
        self.trainings = Trainings(self.search, address, opened, self.wanted, self.prefix)
        return self.trainings

    def trained(self) -> list[TrainingResult]:
        """What came of each training."""
        found = trained_in(self.studies.cells[""])
        arms = [cell.name for cell in self.search.cells]
        return sorted(found, key=lambda each: arms.index(each.arm))

    def announce(self, revived: int) -> None:
        trained = self.trained()
        ended = sum(each.state in FINISHED for each in trained)
        done = f", {ended} of them done before" if ended else ""
        at_once = f", {self.search.together} at once" if self.search.together > 1 else ""
        arms = len(self.search.cells)
        of_arms = f" of {arms} arms" if arms > 1 else ""
        self.say(
            f"{len(trained)} training{'s' * (len(trained) > 1)}{of_arms}{done}; "
            f"{told_places(self.crew.places)}{at_once}"
        )
        if revived:
            trainings = "a training" if revived == 1 else f"{revived} trainings"
            self.say(f"{trainings} whose process died will be run on from the last checkpoint")
        if not self.is_owner:
            self.say(f"{self.seat.described()} is at work on it too")

    def begin_parent(self) -> None:
        if not self.is_owner or self.recorder is None or self.tracking_uri is None:
            return
        arms = [cell.name for cell in self.search.cells if cell.name]
        run = parent.begin(
            self.recorder,
            self.tracking_uri,
            self.studies.all,
            self.search.experiment,
            self.params,
            {
                "study": self.search.name,
                "repetition.storage": self.studies.described,
                **({"repetition.arms": json.dumps(arms)} if arms else {}),
                **self.tags,
            },
            self.name,
        )
        self.run_of_parent = self.recorded.enter_context(run)
        info = run.wait()
        page = show_command(self.tracking_uri, info.run_id, info.experiment_id)
        self.display.say(f"runs: {page}")

    def conduct(self) -> Ending:
        self.work(self.studies.cells, f"{len(self.trained())} trainings")
        if not self.is_owner and not self.take_over():
            words = f"Nothing is left for this start; {self.seat.described()} brings it to its end."
            return Ending(self.studies.results(), False, [words], self.where)
        notes: list[str] = []
        return Ending(self.report(notes), True, notes, self.where)

    def is_done(self, counts: Counts, is_late: bool) -> bool:
        if self.trainings.is_cut_short():
            self.trainings.fill()
            return False
        return super().is_done(counts, is_late)

    def report(self, notes: list[str]) -> Results:
        """Record what the trainings have in common in the parent run, which then ends."""
        trained, run = self.trained(), self.run_of_parent
        # Runs that share some of their seeds are no sample of anything.
        is_sample = not any("random" in training.settings for training in self.wanted)
        if run is not None:
            told = markdown(trained, is_sample)
            run.log_metrics(metrics_of(trained, is_sample), step=0)
            folder = run.scratch / "report"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SUMMARY).write_text(told, encoding="utf-8")
            refused = parent.record_report(run, told, folder, [folder / SUMMARY])
            if refused is not None:
                notes.append(refused)
        self.studies.first.set_user_attr(parent.REPORTED, self.progress())
        return self.studies.results()


# ---- settings ------------------------------------------------------------------------------------


def settings_of(configuration: Configuration) -> dict[str, Any]:
    """All settings, nested and plain, without the place of the record, which workers are told."""
    settings = settings_in(configuration.yaml(), "")
    del settings["tracking_uri"]
    return json.loads(json.dumps(settings))


def metric_of(configurations: Iterable[Configuration]) -> str:
    """What is shown while a training runs: accuracy on validation, where all have that."""
    validated = all(
        each.values.get("data.init_args.val_fraction") != 0
        and each.values.trainer.limit_val_batches != 0
        for each in configurations
    )
    return "val/accuracy" if validated else "training_seconds"


def in_common(arms: Mapping[str, Configuration]) -> dict[str, Any]:
    """The settings that are the same in all arms, as the parent's parameters; no seeds or names."""
    first, *others = [configuration.flat() for configuration in arms.values()]
    return {
        key: value
        for key, value in first.items()
        if not OF_ITS_OWN.match(key)
        and not isinstance(value, list)
        and all(key in other and other[key] == value for other in others)
    }


def described(arms: Mapping[str, Configuration]) -> str:
    """What the parent run is called: `CNN CrossEntropyLoss SGD`, or the names of the arms."""
    if len(arms) > 1:
        return " vs ".join(arms) if len(arms) < 5 else f"{len(arms)} arms"
    (configuration,) = arms.values()
    settings = configuration.flat()
    chosen = [settings[key] for key in ("model.network", "model.loss", "optimizer")]
    return " ".join(name.rpartition(".")[2] for name in chosen)


# ---- finding it again ----------------------------------------------------------------------------


def identity(arms: Mapping[str, Configuration], name: str, uri: str | None, is_tested: bool) -> str:
    """8 hexadecimal digits of all that says what is trained and how it is called; not of seeds."""
    told = []
    for arm, configuration in arms.items():
        settings = configuration.flat()
        told.append([arm, {k: v for k, v in settings.items() if k != "seed_everything"}])
    return hash_of([told, name, uri, is_tested])[:8]


def code_of(configurations: Iterable[Configuration]) -> str:
    """A hash of the code that trains, with the files of the chosen classes that are elsewhere."""
    package = Path(__file__).parents[1]
    files = [
        path
        for path in package.rglob("*.py")
        if path.is_file() and path.relative_to(package).parts[0] not in APART
    ]
    own = [file for configuration in configurations for file in files_of(configuration)]
    return hash_code(package / "data", [*files, *own])


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:40] or "seeds"


def place_of(
    folder: Path, study: str, code: str, goes_on_with_other_code: bool
) -> tuple[Path, str | None]:
    """The study's journal, and what is to be said where the code has changed since another."""
    file = folder / f"{study}-{code}.journal"
    others = sorted(folder.glob(f"{study}-*.journal"), key=lambda path: path.stat().st_mtime)
    if file.exists() or not others:
        return file, None
    if goes_on_with_other_code:
        return others[-1], None
    return file, (
        "The code has changed since these settings were last trained, so all is trained anew (to "
        "go on with what there is: --allow_changes)."
    )


def set_aside_if_lost(file: Path, uri: str) -> str | None:
    """Rename the journal of runs that were deleted with their parent; what is to be said of it."""
    with file_lock(file.absolute()):
        storage = open_storage(str(file), file)
        if file.stem not in names_in(storage):
            return None
        study = optuna.load_study(study_name=file.stem, storage=storage)
        if parent.Seat(study).holder is not None or not is_lost(study, uri):
            return None
        file.rename(file.with_suffix(".lost"))
    return (
        f"The parent run of what was trained before is no longer in {redact(uri)}, so all is "
        "trained anew."
    )


def is_lost(study: optuna.Study, uri: str) -> bool:
    """Whether the study had a parent run in the store, and the store has it no more."""
    token = study.user_attrs.get(parent.BEGUN, ("", ""))[0]
    if parent.run_id_of(study, uri) is None or not token:
        return False
    try:
        return find_tagged(uri, {parent.BEGUN_BY: token}) is None
    except TrackingError:
        return False  # what is wrong with the store is told as soon as it is written to
