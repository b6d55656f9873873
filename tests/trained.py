"""Trained runs and arms made up for tests: a seed, a figure, and whatever is to be special."""

from typing import Any

from research.statistics.arms import Arm, Trained


def trained(seed: int, value: float = 0.5, **changes: Any) -> Trained:
    known: dict[str, Any] = {
        "run_id": f"{seed}",
        "run_name": f"run {seed}",
        "seeds": {"weights": seed, "order": seed},
        "status": "FINISHED",
        "metrics": {"val/accuracy": value},
        "curves": {},
        "seconds": 1.0,
        "initial_weights": None,
        "first_batches": None,
        "settings": {},
        "test_looks": 0,
    }
    return Trained(**(known | changes))


def arm(*runs: Trained, name: str = "arm") -> Arm:
    return Arm(name, name, runs)
