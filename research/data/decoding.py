"""Picture files to bytes: many at once, on all cores, with a progress bar on a terminal.

Every usual kind of picture comes out as upright RGB bytes (H, W, 3): the camera's
orientation is applied, grey and palettes become RGB, 16-bit grey is scaled to 8 bits, what is
transparent shows white, of an animation the first frame counts.

The files may come from anywhere: what is no regular file, is of a rare kind (of which one, EPS,
is a program for Ghostscript), or would unfold to more than Pillow holds to be harmless is refused.
"""

import os
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np

from research.data.module import DataFileError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES_PER_TASK = 256
FAULTS_TOLD = 5

KINDS = (
    *("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA"),
    *("TIFF", "WEBP"),
)


def decode(files: Sequence[str], size: int, resize: bool) -> np.ndarray:
    """Return the pictures as uint8 (N, size, size, 3), in the order of `files`.

    With `resize` the shorter side is brought to `size` (bilinear, antialiased) and the middle is
    kept; otherwise every picture must have this size already.  Raises DataFileError that names the
    files that cannot be used.
    """
    from tqdm import tqdm

    pictures = np.empty((len(files), size, size, 3), dtype=np.uint8)
    tasks = [files[i : i + PICTURES_PER_TASK] for i in range(0, len(files), PICTURES_PER_TASK)]
    faults: list[str] = []
    done = 0
    bar = tqdm(total=len(files), desc="Decoding", unit="picture", disable=None, leave=False)
    try:
        with bar, _only_bombs_matter(), _workers(len(tasks)) as run:
            like = None if resize else files[0]
            for decoded, found in run(partial(_decode_some, size=size, like=like), tasks):
                pictures[done : done + len(decoded)] = decoded
                done += len(decoded)
                faults += found
                bar.update(len(decoded))
    except BrokenExecutor:
        raise DataFileError(
            "a process that decodes pictures was ended from outside, as the system does where the "
            "memory is full; end other programs and start again"
        ) from None
    if faults:
        more = len(faults) - FAULTS_TOLD
        rest = [f"and {more} more"] if more > 0 else []
        raise DataFileError("\n".join([*faults[:FAULTS_TOLD], *rest]))
    return pictures


def read_size(file: str) -> tuple[int, int]:
    """Return width and height as `decode` would see them, from the file's head alone."""
    from PIL import ExifTags

    try:
        with _only_bombs_matter(), _open(file) as image:
            width, height = image.size
            lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
    except Exception as error:
        raise DataFileError(_describe(file, error)) from None
    return (height, width) if lies_on_its_side else (width, height)


def _decode_some(files: Sequence[str], size: int, like: str | None) -> tuple[np.ndarray, list[str]]:
    """Return the pictures, and what is wrong with those that are left blank.

    `like` is the file whose size the others must have; None has them resized.
    """
    pictures = np.zeros((len(files), size, size, 3), dtype=np.uint8)
    faults = []
    for picture, file in zip(pictures, files, strict=True):
        try:
            picture[:] = _decode_one(file, size, like)
        except Exception as error:  # a damaged file can make Pillow raise nearly anything
            faults.append(_describe(file, error))
    return pictures, faults


def _decode_one(file: str, size: int, like: str | None) -> np.ndarray:
    from PIL import Image, ImageOps

    with _open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        picture = _as_rgb(image)
        if picture.size != (size, size):
            if like is not None:
                width, height = picture.size
                raise _WrongSize(
                    f"is {width}x{height} pixels, but {shown(like)} is {size}x{size}; set "
                    f"data.image_size (to 32, for example) to have all of them resized"
                )
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(picture)


def _open(file: str) -> "Image":
    from PIL import Image

    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe waits for ever
        raise ValueError("it is not a regular file")
    Image.init()
    return Image.open(file, formats=[kind for kind in KINDS if kind in Image.OPEN])


def _as_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, also where Pillow keeps them in 32
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which no range is known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class _WrongSize(ValueError):
    """The picture is sound but not of the size of the others."""


def _describe(file: str, error: Exception) -> str:
    """Return one sentence on what is wrong with the file."""
    from PIL import Image, UnidentifiedImageError

    file = shown(file)
    if isinstance(error, _WrongSize):
        return f"{file} {error}"
    if isinstance(error, UnidentifiedImageError):
        return f"{file} is not a picture that can be read; remove it or move it elsewhere"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"{file} is too large: {error}"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{file} cannot be read: {error.strerror}"
    return f"{file} cannot be decoded: {error or type(error).__name__}"


def shown(path: object) -> str:
    """The path as it may stand in a sentence: in quotes, escaped, where it could break the line."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


@contextmanager
def _only_bombs_matter() -> Iterator[None]:
    """Refuse pictures of more pixels than Pillow holds to be harmless (89 million).

    Its other warnings, of odd metadata in good pictures, are not for the user.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _workers(num_tasks: int) -> Iterator:
    """Yield a map function that works on as many tasks at once as there are cores.

    Processes, because small pictures spend most of their time under the interpreter's lock: on
    2 cores a JPEG of 32x32 takes 49 us, with threads 139 us.  Forked ones, because new ones would
    import torch for longer than they work; they touch nothing but Pillow and numpy.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, num_tasks)
    if count <= 1:
        yield map
        return
    pool: Executor
    if sys.platform == "linux":
        pool = ProcessPoolExecutor(count, mp_context=get_context("fork"))
    else:
        pool = ThreadPoolExecutor(count)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
