"""An interval of confidence: where the true value lies in `level` of all such studies."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Both ends, in the unit of what was estimated, and the share of studies it should hold in."""

    low: float
    high: float
    level: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high
