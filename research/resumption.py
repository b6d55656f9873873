"""From `--resume RUN` to a run that goes on: its own settings and its newest whole checkpoint.

The settings are those in the checkpoint.  Others are refused unless they are asked for, because the
curves of one run would then be those of two; what was changed stands in the record.  Where it
trains, and by how many processes, may change: the batches are the same.
"""

import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from research.checkpoints.io import newest_whole
from research.checkpoints.trained import is_own_store, read_checkpoint
from research.configuration.compose import CommandLine, ConfigurationError, compose, unfold
from research.configuration.imports import within
from research.configuration.schema import Configuration, check_settings, resolve
from research.processes.jobs import ATTEMPT, attempt, tags_before
from research.processes.launch import is_rank_zero, launch
from research.recording.identity import WITHOUT_EFFECT, text_of
from research.tracking.heartbeat import is_dead
from research.tracking.provenance import hash_of
from research.tracking.runs import RecordedRun, find_run, find_tagged
from research.tracking.store import resolve_tracking_uri

logger = logging.getLogger(__name__)

# Where a run trains and by how many: it may go on elsewhere, since the batches stay the same.
PLACES = tuple(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy"))


@dataclass(frozen=True)
class Resumption:
    """A run of the store that goes on from one of its checkpoints.

    `checkpoint` None is the beginning. `epochs` have ended and `steps` been made before; `history`
    holds what was measured in them, and `saved_at` is when (seconds since 1970); `logged` is what
    had been recorded by then (`tracking.run.Run.logged`). `changes` are the settings that differ,
    as they were and as they are. `skipped` are checkpoints that were found damaged.
    """

    run: RecordedRun
    checkpoint: Path | None
    steps: int
    epochs: int
    saved_at: float
    logged: Mapping[str, Sequence[int]]
    history: Sequence[Mapping[str, float]]
    changes: Mapping[str, tuple[Any, Any]]
    allows_changes: bool
    skipped: Sequence[Path]

    def described(self) -> str:
        """One line for the terminal: which run goes on, and from where."""
        if self.checkpoint is None:
            return f"beginning {self.run.described()} anew: it had no checkpoint yet"
        return (
            f"going on with {self.run.described()} from {self.checkpoint.name}: step "
            f"{self.steps:,}, {self.epochs} epochs ended"
        )


def resume(
    text: str, command: CommandLine, allows_changes: bool = False
) -> tuple[Configuration, Resumption]:
    """The configuration and the place from which the run that `text` stands for goes on.

    `text` is what `find_run` takes; `command` holds what else was typed.  ConfigurationError or
    TrackingError, in a sentence or two, where it cannot go on: it is still alive, is finished, has
    no checkpoint, or other settings came and `allows_changes` is False.
    """
    typed = next((s["tracking_uri"] for s in command.sources[::-1] if "tracking_uri" in s), None)
    uri = resolve_tracking_uri(None if typed == "null" else typed)
    if uri is None:
        raise ConfigurationError("tracking_uri is empty, so there is no store to find a run in.")
    run = find_run(uri, text)
    if is_rank_zero():  # the others find the run alive again
        refuse_living(run)
    if run.artifact_dir is None:
        deliver_rest(run)
    checkpoint, skipped = newest_whole(checkpoints_here(run))
    for path in skipped:
        logger.warning(
            "%s is torn or damaged and is skipped%s.",
            path,
            "" if checkpoint is None else f" for {checkpoint.name}",
        )
    if checkpoint is None:
        raise ConfigurationError(
            f"resume: {run.described()} has no checkpoint to go on from. Start it again with "
            f"--config and the config.yaml among its artifacts."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    before = settings_in(read_checkpoint(checkpoint).configuration, uri)
    trust = command.trust or is_own_store(uri)
    files = [before if launch() is None else without_places(before), *command.files]
    configuration = resolve(CommandLine(files, command.settings, command.passed_on, trust=trust))
    # A class that was typed may stand in the file too: SLURM repeats the command of a job.
    with within(configuration.packages):
        own = check_settings(compose(before), [], configuration.packages)
    changes = differences(own, configuration)
    others = {key: pair for key, pair in changes.items() if key not in PLACES}
    if run.status == "FINISHED" and not others:
        raise ConfigurationError(
            f"resume: {run.described()} is finished, there is nothing to go on with. To train it "
            "longer: --trainer.max_epochs N --allow_changes."
        )
    if others and not allows_changes:
        told = "; ".join(f"{key} was {old}, now {new}" for key, (old, new) in others.items())
        raise ConfigurationError(
            f"resume: a run goes on with its own settings, and others came ({told}). Leave them "
            "out, or change them all the same with --allow_changes, which is recorded."
        )
    pace = content.get("pace", {})
    resumption = Resumption(
        run=run,
        checkpoint=checkpoint,
        steps=content["global_step"],
        epochs=len(pace.get("history", ())),
        saved_at=content.get("saved_at", 0.0),
        logged=content.get("logged", {}),
        history=pace.get("history", ()),
        changes=changes,
        allows_changes=allows_changes,
        skipped=skipped,
    )
    return configuration, resumption


def run_of_job(configuration: Configuration) -> RecordedRun | None:
    """The run that this job began, with these settings, before it was started again."""
    uri = resolve_tracking_uri(configuration.values.tracking_uri)
    tags = tags_before()
    if uri is None or tags is None:
        return None
    same = {"fingerprint.configuration": hash_of(text_of(configuration))}
    run = find_tagged(uri, tags | same)
    # The first process may have begun it a moment ago, in this very start of the job.
    return None if run is None or run.tags.get(ATTEMPT) == attempt() else run


def is_to_begin_anew(run: RecordedRun) -> bool:
    """True for a run whose processes died before its first checkpoint."""
    return newest_whole(checkpoints_here(run))[0] is None


def begin_anew(run: RecordedRun) -> Resumption:
    """The run goes on from its very beginning, with the settings that it has."""
    return Resumption(
        run=run,
        checkpoint=None,
        steps=0,
        epochs=0,
        saved_at=run.started_at.timestamp(),
        logged={},
        history=(),
        changes={},
        allows_changes=False,
        skipped=(),
    )


def refuse_living(run: RecordedRun) -> None:
    """ConfigurationError for a run whose process is there; two would write into one record."""
    tags = run.tags
    if run.status == "RUNNING" and "heartbeat.pid" in tags and not is_dead(tags):
        raise ConfigurationError(
            f"resume: {run.described()} is still running: process {tags['heartbeat.pid']} on "
            f"{tags['heartbeat.host']}, heard of at {tags['heartbeat.time']}. End it first."
        )


def deliver_rest(run: RecordedRun) -> None:
    """Bring to the server what an outage kept here, the checkpoints among it."""
    from research.tracking.redelivery import deliver
    from research.tracking.spool import spool_root, waiting

    for spool in waiting(spool_root(run.tracking_uri)):
        if spool.about.get("run_id") == run.run_id:
            reason = deliver(spool)
            if reason is not None:
                raise ConfigurationError(
                    f"resume: what {run.described()} left in {spool.folder} cannot be delivered: "
                    f"{reason}"
                )


def checkpoints_here(run: RecordedRun) -> Path:
    """The folder of the run's checkpoints; those of a server are brought to this machine."""
    if run.artifact_dir is not None:
        return run.artifact_dir / "checkpoints"
    paths = [run.file(path) for path in run.files("checkpoints") if path.endswith(".ckpt")]
    return paths[0].parent if paths else Path()


def bring(resumption: Resumption, folder: Path) -> Path | None:
    """The checkpoint to go on from, in `folder` with the others of the run."""
    if resumption.checkpoint is None:
        return None
    source = resumption.checkpoint.parent
    for path in resumption.skipped:
        if path.parent == folder:
            path.rename(path.with_suffix(".damaged"))  # no best one any more, and out of the way
    if source.resolve() != folder.resolve():
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.glob("[!.]*.ckpt"):
            if path not in resumption.skipped:
                shutil.copy2(path, folder / path.name)
    return folder / resumption.checkpoint.name


def settings_in(configuration: str, uri: str) -> dict[str, Any]:
    """The YAML of a checkpoint as nested settings, recorded in the store it was found in."""
    from jsonargparse import get_loader

    settings = unfold(get_loader("yaml")(configuration)) | {"tracking_uri": uri}
    trainer = settings["trainer"]
    if trainer.get("precision") is None:  # from before a record said so: what Lightning took
        settings["trainer"] = {**trainer, "precision": "32-true"}
    return settings


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the counts that are torchrun's or SLURM's to say."""
    trainer = {k: v for k, v in settings["trainer"].items() if k not in ("devices", "num_nodes")}
    return {**settings, "trainer": trainer}


def differences(one: Configuration, other: Configuration) -> dict[str, tuple[Any, Any]]:
    """The settings with an effect that differ, each as it was and as it is; None where there is
    none."""
    before, after = one.flat(), other.flat()
    keys = [key for key in {**before, **after} if key not in WITHOUT_EFFECT]
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
