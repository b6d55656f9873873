"""Pictures that stay in memory from one training to the next in the same process.

    kept = Kept()
    fit(configuration, kept=kept)       # reads, parts and measures
    fit(another, kept=kept)             # has them already, if the same splits are asked for

Batch size, crops, flips and cutout do not shape the splits, so trainings that differ in these share
them.  Several processes of a machine have them from the same memory if they find the same name in
RESEARCH_HOST_GROUP (shared.py); the file lives as long as one of them keeps what is in it.
"""

from research.data.module import ImageData, Made


class Kept:
    """What the last `most` different data sets came to, the one that was used last at the end."""

    def __init__(self, most: int = 2) -> None:
        self.most = most
        self._made: dict[str, Made] = {}

    def find(self, asked: str) -> Made | None:
        """Return what an earlier one made that asked for the same (`ImageData.asked`), or None."""
        made = self._made.pop(asked, None)
        if made is not None:
            self._put(asked, made)
        return made

    def keep(self, asked: str, data: ImageData) -> None:
        """Keep what `data.setup` made, in the place of what has not been used for longest."""
        self._put(asked, data.hand_over())

    def forget(self) -> None:
        """Keep nothing: its memory is free as soon as nobody else has it."""
        self._made = {}

    def _put(self, asked: str, made: Made) -> None:
        for other in self._made.values():
            other.on_device.clear()  # the memory of a device is scarcer than that of the machine
        self._made[asked] = made
        while len(self._made) > self.most:
            del self._made[next(iter(self._made))]
