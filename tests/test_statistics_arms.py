"""Arms: which runs are pairs, and what sets arms apart."""

import math
from collections.abc import Mapping
from typing import Any

from research.statistics.arms import (
    Arm,
    Match,
    Trained,
    causes,
    match,
    origins_apart,
    pair,
    settings_apart,
)
from tests.trained import arm, trained


def of_settings(**settings: Any) -> Arm:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return arm(trained(0, settings=named))


def test_runs_are_pairs_where_the_seeds_of_all_streams_match():
    other_order: Mapping[str, int] = {"weights": 2, "order": 7}
    a = arm(trained(0), trained(1), trained(2))
    b = arm(trained(2, seeds=other_order), trained(1), trained(0))
    found = pair(a, b, "val/accuracy")
    assert [(one.seed_text, other.seed_text) for one, other in found.pairs] == [
        ("0", "0"),
        ("1", "1"),
    ]
    assert [run.seed_text for run in found.alone_a] == ["2"]
    assert [run.seed_text for run in found.alone_b] == ["weights 2, order 7"]


def test_of_a_seed_the_last_finished_and_finite_run_counts():
    runs = [
        trained(0, 0.1),
        trained(0, 0.2),
        trained(0, 0.9, status="FAILED"),
        trained(1, math.nan),
        trained(2, metrics={}),
    ]
    assert [run.metrics["val/accuracy"] for run in arm(*runs).measured("val/accuracy")] == [0.2]


def test_another_class_is_one_difference_with_its_arguments_within():
    one = of_settings(optimizer="SGD", optimizer__lr=0.1, optimizer__momentum=0.9, data="CIFAR10")
    other = of_settings(optimizer="Adam", optimizer__lr=0.01, optimizer__eps=1e-8, data="CIFAR10")
    found = {each.key: each for each in settings_apart([one, other])}
    assert list(found) == ["optimizer", "optimizer.lr", "optimizer.momentum", "optimizer.eps"]
    assert found["optimizer.momentum"].values == ("0.9", None)
    assert causes(list(found.values())) == ["optimizer"]


def test_arguments_of_the_same_class_are_differences_of_their_own():
    one = of_settings(optimizer="SGD", optimizer__lr=0.1, trainer__max_epochs=1)
    other = of_settings(optimizer="SGD", optimizer__lr=0.2, trainer__max_epochs=2)
    assert causes(settings_apart([one, other])) == ["optimizer.lr", "trainer.max_epochs"]


def test_seeds_names_and_what_follows_from_settings_are_no_differences():
    one = of_settings(seed_everything=0, random__order=1, data__seed=2, run_name="a", Loss="x")
    other = of_settings(seed_everything=3, random__order=4, data__seed=5, run_name="b", Loss="y")
    assert settings_apart([one, other], ["run_name"]) == []


def test_settings_that_differ_within_an_arm_are_told_together():
    mixed = arm(trained(0, settings={"lr": 0.1}), trained(1, settings={"lr": 0.2}))
    (found,) = settings_apart([mixed, of_settings(lr=0.1)])
    assert found.values == ("0.1 or 0.2", "0.1")


def test_pictures_are_compared_between_runs_of_equal_seeds_alone():
    def runs(first: str, second: str, code: str = "x") -> Arm:
        return arm(
            trained(0, origins={"pictures": first, "code": code}),
            trained(1, origins={"pictures": second, "code": code}),
        )

    assert origins_apart([runs("p", "q"), runs("p", "q")]) == {}
    assert origins_apart([runs("p", "q"), runs("p", "r")]) == {"pictures": ("q", "r")}
    assert origins_apart([runs("p", "q"), runs("p", "q", "y")]) == {"code": ("x", "y")}
    assert origins_apart([runs("p", "q"), arm(trained(5))])["code"] == ("x", "?")


def test_hashes_of_pairs_are_counted_as_equal_other_and_unknown():
    def one(weights: str | None) -> Trained:
        return trained(0, initial_weights=weights)

    pairs = [(one("a"), one("a")), (one("a"), one("b")), (one(None), one("a"))]
    assert match(pairs, "initial_weights") == Match(1, 1, 1)
    assert match(pairs, "first_batches") == Match(0, 0, 3)
