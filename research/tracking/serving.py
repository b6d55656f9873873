"""Answers for pictures of any size: the code inside a recorded MLflow model.

This file is copied into every model, beside the exported program, so that the model is loaded
where nothing of this repository is: it imports none of it. Changing it changes models to come.

    model = mlflow.pyfunc.load_model("runs:/<run id>/<name>")
    model.predict(np.asarray(Image.open("cat.jpg").convert("RGB"))[None])
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

PICTURES_AT_ONCE = 256  # bounds the memory that a large request takes


def _load_pyfunc(data_path: str) -> "PictureClassifier":
    """What MLflow calls to load the model; the name is MLflow's."""
    return PictureClassifier(Path(data_path))


class PictureClassifier:
    """Pictures, uint8 (N, H, W, 3) in RGB, to a table of labels and probabilities.

    A picture of another size than the network's is treated as in training and testing: the
    shorter side is brought to size (bilinear, antialiased) and the middle is kept.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        self.class_names: list[str] = about["class_names"]
        self.image_size: int = about["image_size"]
        with warnings.catch_warnings():
            # torch 2.11 says of its own reading that it gets a buffer that must not be written to.
            warnings.simplefilter("ignore")
            self.program = torch.export.load(folder / "program.pt2").module()

    def predict(
        self, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row for each picture: `label`, its `probability`, and `probabilities` by class name."""
        pictures = np.asarray(model_input)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise ValueError(
                f"The input is {pictures.dtype} of shape {pictures.shape}; it must be uint8 of "
                "shape (N, H, W, 3): N pictures in RGB, values from 0 to 255."
            )
        found = [
            self.probabilities(pictures[first : first + PICTURES_AT_ONCE])
            for first in range(0, len(pictures), PICTURES_AT_ONCE)
        ]
        rows = [
            {
                "label": self.class_names[row.argmax()],
                "probability": float(row.max()),
                "probabilities": dict(zip(self.class_names, row.tolist(), strict=True)),
            }
            for row in (np.concatenate(found) if found else ())
        ]
        return pd.DataFrame(rows, columns=["label", "probability", "probabilities"])

    def probabilities(self, pictures: np.ndarray) -> np.ndarray:
        size = self.image_size
        if pictures.shape[1:3] != (size, size):
            pictures = np.stack([resize(picture, size) for picture in pictures])
        pixels = torch.from_numpy(
            np.array(pictures, order="C")
        )  # Pillow's own may not be written to
        with torch.inference_mode():
            return self.program(pixels).numpy()


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    """The middle of the picture, uint8 (size, size, 3)."""
    image = Image.fromarray(picture)
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
