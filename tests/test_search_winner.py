"""The winner as an experiment file, and who is run again on fresh seeds."""

import pytest

from research.configuration.schema import resolve
from research.search.ranking import ranked
from research.search.results import Results
from research.search.winner import (
    FORCED,
    candidates,
    configuration_of,
    fresh_seeds_of,
    winner,
    winner_yaml,
)
from tests.ended import confirmation, ended, search, trial

COMMAND = "python -m research.fit --config experiments/pairs.yaml"
CONFIRM = {"best": 2, "seeds": 3}
SGD = {"lr": "log 1e-3..1", "nesterov": True, "momentum": "0.5..0.9"}
SPACES = {
    "optimizers": {"optimizer": {"SGD": SGD, "Muon": {"lr": "log 1e-3..1"}}},
    "losses": {"model.loss": {"CrossEntropyLoss": {"label_smoothing": "0..0.2"}, "CTCLoss": {}}},
    "networks": {"model.network": {"ResNet9": {}, "CNN": {"dropout": "0..0.5 step 0.1"}}},
    "schedules": {"lr_scheduler": {"OneCycleLR": {"max_lr": "log 0.01..1"}, "none": {}}},
    "data": {"data.batch_size": [64, 100], "data.cutout": "int 0..8", "trainer.precision":
             ["bf16-mixed", "32-true"]},
}  # fmt: skip
BASE = {
    "seed_everything": 5,
    "experiment": "mine",
    "log_pictures": False,
    "checkpoint": {"save_top_k": 2},
    "model": {
        "network": {"class_path": "CNN", "init_args": {"activation": "ReLU", "widths": [4, 8]}},
        "decay_biases_and_norms": False,
    },
    "trainer": {"max_epochs": 2, "gradient_clip_val": 0.5},
}


def read_again(text: str, folder):
    file = folder / "winner.yaml"
    file.write_text(text, encoding="utf-8")
    return resolve(["--config", str(file)])


def claim_of(text: str) -> str:
    """The header as one line."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    return " ".join(lines)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("base", [[], [BASE]], ids=["bare", "base"])
def test_the_file_resolves_to_the_trial_but_for_what_a_search_forces(tmp_path, name, base):
    settings = {} if base else {"trainer.max_epochs": 3}
    results = ended(search(space=SPACES[name], base=base, settings=settings), 3)
    for entry in ranked(results):
        alone = Results(results.search, {entry.point.cell.name: [entry.point.trial]})
        again = read_again(winner_yaml(alone, COMMAND), tmp_path).flat()
        meant = configuration_of(results, entry).flat()
        assert again.keys() == meant.keys()
        assert {key for key in again if again[key] != meant[key]} <= set(FORCED)
        assert again["trainer.limit_test_batches"] != 0
        assert again["experiment"] == ("mine" if base else "cifar10")
        assert again["log_pictures"] is (not base)


def test_the_file_reads_like_a_shipped_experiment():
    text = winner_yaml(ended(search(), 20), COMMAND)
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("\n".join(header)) and max(map(len, header)) <= 100
    assert header[-1] == f"#   {COMMAND}"
    sections = [line.split(":")[0] for line in text.splitlines() if line[0] not in "# "]
    assert sections == ["seed_everything", "model", "optimizer", "data", "trainer"]
    assert "research." not in text.replace(COMMAND, "") and "torch." not in text
    assert "null" not in text and "limit_test_batches" not in text


def test_one_seed_is_told_as_the_best_of_many():
    claim = claim_of(winner_yaml(ended(search(), 20), COMMAND))
    assert "n=1" in claim and "best of 18 complete trials" in claim and "optimistic" in claim
    assert "validation pictures" in claim and "after 3 epochs" in claim


def test_fresh_seeds_are_told_with_mean_and_deviation():
    results = ended(search(confirm=CONFIRM), 20)
    key = ranked(results)[1].key
    fresh = confirmation(key, {1000: 0.66, 1001: 0.64, 1002: None})
    confirmed = Results(results.search, results.trials, fresh)
    assert winner(confirmed).key == key
    claim = claim_of(winner_yaml(confirmed, COMMAND))
    assert "65.00 ± 1.41 % (n=2)" in claim and "1 more did not come to their end" in claim


def test_hardware_and_versions_are_told_where_they_are_known():
    the_search = search(space={"data.batch_size": [64]})
    attrs = {"hardware": "NVIDIA H200\nx: 1", "versions": {"torch": "2.11"}}
    trials = [trial(the_search.cells[0], 0, {"data.batch_size": 64}, 0.5, **attrs)]
    text = winner_yaml(Results(the_search, {"": trials}), COMMAND)
    assert "Measured on NVIDIA H200 x: 1 with torch 2.11" in claim_of(text)
    assert "\nx: 1" not in text


def test_without_a_complete_trial_there_is_no_winner():
    with pytest.raises(ValueError, match="let the search go on"):
        winner(Results(search(), {"": []}))


def test_candidates_are_the_best_on_the_same_fresh_seeds():
    results = ended(search(confirm=CONFIRM, seed=3), 20)
    chosen = candidates(results)
    best = [list(entry.key) for entry in ranked(results)[:2]]
    assert [each["candidate"] for each in chosen] == [best[0]] * 3 + [best[1]] * 3
    seeds = [each["seed"] for each in chosen]
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3
    assert all(each["settings"]["seed_everything"] == each["seed"] for each in chosen)
    assert candidates(results) == chosen
    entry = ranked(results)[0]
    again = results.search.configuration(entry.point.cell, chosen[0]["settings"]).flat()
    meant = configuration_of(results, entry).flat()
    assert {key for key in again if again[key] != meant[key]} == {"seed_everything"}


def test_candidates_stay_the_same_once_some_are_confirmed():
    results = ended(search(confirm=CONFIRM), 20)
    fresh = confirmation(ranked(results)[1].key, {1000: 0.9})
    assert candidates(Results(results.search, results.trials, fresh)) == candidates(results)


def test_nothing_is_confirmed_unasked_or_before_a_trial_ended():
    assert candidates(ended(search(), 5)) == []
    assert candidates(Results(search(confirm=CONFIRM), {"": []})) == []


def test_fresh_seeds_were_never_used():
    assert fresh_seeds_of(0, 3, {1000, 1002}) == [1001, 1003, 1004]
    assert fresh_seeds_of(1, 2, set()) != fresh_seeds_of(0, 2, set())
    assert all(0 <= seed < 2**32 for seed in fresh_seeds_of(2**40, 3, {0}))
