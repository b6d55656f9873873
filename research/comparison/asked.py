"""What was typed to compare, read. Imports nothing slow."""

from dataclasses import dataclass
from pathlib import Path

from research.configuration.compose import CommandLine


@dataclass(frozen=True)
class Asked:
    """`arms` are as typed; `files` those of them that are experiments, `settings` for all of these.

    `confirm`: how many of a search are trained again, 0 for the best of each cell. `noise`: one
    experiment is trained `runs` times. `command` is the whole of it again.
    """

    arms: tuple[str, ...]
    files: tuple[Path, ...]
    settings: CommandLine
    seeds: int | list[int]
    confirm: int | None
    noise: bool
    runs: int
    workers: int | None
    metric: str | None
    baseline: str | None
    margin: float | None
    level: float
    expected: tuple[str, ...]
    cross_losses: bool
    output: Path | None
    tracking_uri: str
    trust: bool
    allow_changes: bool
    command: str

    @property
    def trains(self) -> bool:
        return bool(self.files) or self.noise or self.confirm is not None
