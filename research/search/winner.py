"""The configuration that won, as an experiment of its own; and who is run again on fresh seeds.

The file holds what sets the run apart from the defaults, plus all that the search varied, so that
it reads like an experiment written by hand and trains what the trial trained. What a search
forces upon its trials is left out: no look at the test split, its own experiment, a bare record.
"""

import json
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from research.configuration.compose import CHOICES
from research.search.ranking import (
    Ranked,
    ranked,
    shown,
    spread,
    verdict,
)
from research.search.results import Results, described, flat

if TYPE_CHECKING:
    from research.configuration.schema import Configuration

# What a search sets for its own sake.
FORCED = (
    "experiment",
    "run_name",
    "log_pictures",
    "log_model",
    "log_system_metrics",
    "trainer.limit_test_batches",
    "trainer.enable_progress_bar",
)
# What an experiment says even where it is the default.
SAID = ("seed_everything", "optimizer.lr", "data.batch_size", "trainer.max_epochs")
# Sections of the file, in the order of the shipped experiments.
ORDER = ("seed_everything", "model", "optimizer", "lr_scheduler", "data", "trainer")
MODEL = ("network", "loss")
COLUMNS = 100


def candidates(results: Results) -> list[dict[str, Any]]:
    """What the confirmation trains: the best `confirm.best` configurations on the same fresh seeds.

    Each has nested `settings`, with the seed in them; `candidate`, the cell's name and the slot;
    `seed`. The same search gives the same ones, best first. No candidates where nothing is to be
    confirmed, or no trial came to its end.
    """
    confirm = results.search.confirm
    if confirm is None:
        return []
    # The confirmation's own results must not change who is confirmed.
    order = ranked(Results(results.search, results.trials))[: confirm.best]
    used = {configuration_of(results, entry).values.seed_everything for entry in order}
    seeds = fresh_seeds_of(results.search.seed, confirm.seeds, used)
    return [
        {
            "settings": {**drawn(entry), "seed_everything": seed},
            "candidate": list(entry.key),
            "seed": seed,
        }
        for entry in order
        for seed in seeds
    ]


def fresh_seeds_of(seed: int, number: int, used: set[int]) -> list[int]:
    """`number` seeds, fixed by the search's, none of which was used: 1000, 1001, ... for seed 0."""
    first = 1000 * (seed % 1_000_000 + 1)
    seeds = (first + offset for offset in range(number + len(used)))
    return [each for each in seeds if each not in used][:number]


def winner(results: Results) -> Ranked:
    """The best configuration: by the mean over fresh seeds where there are any.

    With several objectives, the one on the Pareto front that is best in the first of them.
    Raises ValueError where no trial came to its end.
    """
    order = ranked(results)
    if not order:
        raise ValueError(
            f"No trial of {results.search.name} came to its end, so there is no best configuration "
            "yet; let the search go on."
        )
    return order[0]


def winner_yaml(results: Results, command: str) -> str:
    """The winner as a runnable experiment file: its claim, `command` that runs it, its settings."""
    from research.configuration.document import dump  # imports jsonargparse

    entry = winner(results)
    configuration = configuration_of(results, entry)
    settings = body(configuration, set(entry.point.settings))
    # Where the base says what a search overrules, it holds again.
    said = [flat(source) for source in (*results.search.base, results.search.settings)]
    for key in FORCED:
        for source in said:
            if key in source and key != "run_name":
                put(settings, key, source[key])
    settings = {key: settings[key] for key in sorted(settings, key=rank_of)}
    return header(results, entry, configuration, command) + dump(settings)


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[last] = value


def rank_of(key: str) -> float:
    """The place of a section: what is about the run itself stands beside the seed."""
    return ORDER.index(key) if key in ORDER else 0.5


def drawn(entry: Ranked) -> dict[str, Any]:
    return entry.point.cell.space.settings(entry.point.trial.params)


def configuration_of(results: Results, entry: Ranked) -> "Configuration":
    """All settings that the trial had, checked."""
    return results.search.configuration(entry.point.cell, drawn(entry))


# ---- the claim -----------------------------------------------------------------------------------


def header(results: Results, entry: Ranked, configuration: "Configuration", command: str) -> str:
    """What was reached, on what and how surely, as comments; the last line runs it."""
    sentences = [f"{described(results, entry.point)}: the best of {origin(results)}."]
    sentences += [claim(results, entry, configuration), verdict(results)]
    told = machine_of(entry)
    sentences += [f"Measured on {told}."] if told else []
    # One line of text, whatever an attribute of a trial may hold.
    text = " ".join(" ".join(sentences).split())
    lines = textwrap.wrap(text, COLUMNS - 2, break_long_words=False, break_on_hyphens=False)
    command = " ".join(command.split())
    return "".join(f"# {line}\n" for line in lines) + f"#   {command}\n"


def origin(results: Results) -> str:
    cells = len(results.search.cells)
    trials = f"{len(results.points)} trials of the search {results.search.name}"
    return trials if cells == 1 else f"{trials} ({cells} studies)"


def claim(results: Results, entry: Ranked, configuration: "Configuration") -> str:
    """What was measured, how often, and why the truth may be below it."""
    objectives = results.search.objectives
    epochs = configuration.values.trainer.max_epochs
    pictures = entry.point.trial.user_attrs.get("val_pictures")
    data = getattr(configuration.classes["data"], "__name__", "the data")
    where = f"on the {pictures:,} validation pictures" if pictures else "on the validation pictures"
    where += f" of {data}"
    where += f" after {epochs} {'epoch' if epochs == 1 else 'epochs'}" if (epochs or 0) > 0 else ""
    values = zip(entry.point.values or (), objectives, strict=True)
    reached = " and ".join(
        f"{objective.metric} {shown(value, objective.metric)}" for value, objective in values
    )
    if entry.fresh is not None and entry.fresh.values:
        confirmed = sum(each.fresh is not None for each in ranked(results))
        n = len(entry.fresh.values)
        what = "mean ± standard deviation over fresh seeds" if n > 1 else "one fresh seed"
        metric = results.objective.metric
        picked = f"; the best of {confirmed} so confirmed" if confirmed > 1 else ""
        lost = entry.fresh.diverged + entry.fresh.failed
        picked += f"; {lost} more did not come to their end" if lost else ""
        return (
            f"{metric} {spread(entry.fresh, metric)} {where}: {what}{picked}. In the search it "
            f"reached {reached}, which was selected and is no part of that."
        )
    complete = len(results.complete)
    return (
        f"{reached} {where} (n=1: one seed, selected as the best of {complete} complete trials, so "
        "likely optimistic)."
    )


def machine_of(entry: Ranked) -> str:
    """Hardware and versions, as far as the trial said."""
    attrs = entry.point.trial.user_attrs
    versions = attrs.get("versions")
    if isinstance(versions, Mapping):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    return " with ".join(str(part) for part in (attrs.get("hardware"), versions) if part)


# ---- the settings --------------------------------------------------------------------------------


def body(configuration: "Configuration", said: set[str]) -> dict[str, Any]:
    """The nested settings that differ from the defaults, and those that are `said` by their key."""
    parser = configuration.parser
    values = json.loads(parser.dump(configuration.values, format="json", skip_unset=False))
    defaults = json.loads(parser.dump(parser.get_defaults(), format="json", skip_unset=False))
    kept = differing(values, defaults, said.union(SAID), configuration)
    model = kept.get("model", {})
    if model:
        kept["model"] = {key: model[key] for key in sorted(model, key=lambda k: k not in MODEL)}
    return kept


def differing(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    said: set[str],
    configuration: "Configuration",
    prefix: str = "",
) -> dict[str, Any]:
    """The part of `values` that is not as in `defaults`, or is said; choices always."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        key, default = f"{prefix}{name}", defaults.get(name)
        if key in FORCED:
            continue
        if key in CHOICES and value is not None:
            inside = differing(
                value.get("init_args") or {},
                (default or {}).get("init_args") or {},
                said,
                configuration,
                f"{key}.",
            )
            path = name_of(key, configuration)
            kept[name] = {"class_path": path, "init_args": inside} if inside else path
        elif isinstance(value, dict) and isinstance(default, dict):
            inside = differing(value, default, said, configuration, f"{key}.")
            if inside:
                kept[name] = inside
        elif key in said or value != default:
            kept[name] = value
    return kept


def name_of(key: str, configuration: "Configuration") -> str:
    """The class's short name where that finds it again, else its import path."""
    from research.configuration.schema import known_classes, path_of

    found = configuration.classes[key]
    name: str = found.__name__
    return name if known_classes(key).get(name) is found else path_of(found)
