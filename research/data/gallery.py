"""Class folders that are only looked at, never learned from: a test split and nothing else."""

from pathlib import Path

import torch

from research.data.decoding import decode
from research.data.image_folder import class_folders, list_pictures
from research.data.module import ImageData
from research.data.normalization import Normalization
from research.data.split import Split


class _Gallery(ImageData):
    """All pictures in folder/<class>/*, at `image_size`, normalised as those of another data set.

    Decoded anew each time.  Not to be chosen by name: there is nothing to train on.
    """

    def __init__(
        self, folder: Path, image_size: int, normalization: Normalization, batch_size: int
    ) -> None:
        self.folder = folder
        self.class_names = class_folders(folder, folder.resolve())
        self.image_size = image_size
        self.normalization = normalization
        super().__init__(batch_size, val_fraction=0.0)

    @property
    def dataset_name(self) -> str:
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "test" else folder.name

    @property
    def source(self) -> str:
        return str(self.folder.resolve())

    def read(self) -> tuple[Split, Split]:
        folder = self.folder.resolve()
        found = list_pictures(folder.parent, folder.name, self.class_names)
        pixels = torch.from_numpy(decode(found.files, self.image_size, resize=True))
        split = Split(pixels.permute(0, 3, 1, 2), torch.tensor(found.labels))
        return split, split

    def measure_normalization(self, train: Split) -> Normalization:
        return self.normalization


def find_gallery(root: Path) -> Path | None:
    """The folder of class folders in `root` where there is no train/: test/, or `root` itself."""
    if not root.is_dir() or (root / "train").exists():
        return None
    folder = root / "test" if (root / "test").is_dir() else root
    return folder if class_folders(folder, root.resolve()) else None
