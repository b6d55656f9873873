"""Folders of real files: what is read, what is cached, and what is refused in which words."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from research.data import DataError, ImageFolder, decoding, image_folder
from research.data.decoding import decode

SIZE = 12


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(root: Path, counts: dict[str, int], suffix: str = "png", first_seed: int = 0) -> None:
    """Write so many pictures into each of the folders, named like train/cat."""
    for number, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = first_seed + 1000 * number + i
            picture(seed).save(root / folder / f"{i:04d}.{suffix}")


@pytest.fixture
def root(tmp_path) -> Path:
    fill(tmp_path, {"train/cat": 6, "train/dog": 4, "test/cat": 2, "test/dog": 2})
    return tmp_path


def opened(root: Path, **settings) -> ImageFolder:
    data = ImageFolder(root=str(root), **{"val_fraction": 0.0, **settings})
    data.prepare_data()
    data.setup()
    return data


def refusal(root: Path, **settings) -> str:
    with pytest.raises(DataError) as told:
        opened(root, **settings)
    return str(told.value)


@pytest.fixture
def decodings(monkeypatch) -> list[int]:
    """How many pictures each decoding since the start of the test was asked for."""
    calls = []

    def counted(files, size, resize):
        calls.append(len(files))
        return decode(files, size, resize)

    monkeypatch.setattr(image_folder, "decode", counted)
    return calls


def pixels_of(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_every_file_is_read_under_the_label_of_its_folder(root):
    data = opened(root)
    assert data.class_names == ("cat", "dog")
    assert (data.num_classes, data.image_size) == (2, SIZE)
    for split, name in ((data.splits.train, "train"), (data.splits.test, "test")):
        expected = sorted(
            (label, pixels_of(file).flatten().tolist())
            for label, class_name in enumerate(data.class_names)
            for file in (root / name / class_name).iterdir()
        )
        found = zip(split.labels.tolist(), split.images.flatten(1).tolist(), strict=True)
        assert sorted(found) == expected


def test_classes_alternate_so_that_the_first_batches_hold_all_of_them(root):
    assert opened(root).splits.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]


def test_classes_and_size_are_known_before_anything_is_decoded(root, decodings):
    data = ImageFolder(root=str(root))
    assert (data.num_classes, data.class_names, data.image_size) == (2, ("cat", "dog"), SIZE)
    assert decodings == [] and not (root / ".cache").exists()


def test_without_a_test_folder_the_same_test_split_is_cut_for_every_seed(tmp_path):
    fill(tmp_path, {"train/cat": 40, "train/dog": 20})
    one = opened(tmp_path, seed=1, val_fraction=0.1, test_fraction=0.25)
    two = opened(tmp_path, seed=2, val_fraction=0.1, test_fraction=0.25)
    other = opened(tmp_path, test_seed=1, test_fraction=0.25)
    assert one.splits.test.labels.bincount().tolist() == [10, 5]
    assert torch.equal(one.splits.test.images, two.splits.test.images)
    assert not torch.equal(one.splits.test.images, other.splits.test.images)
    assert not torch.equal(one.splits.val.images, two.splits.val.images)
    splits = one.splits
    everything = torch.cat([s.images for s in (splits.train, splits.val, splits.test)])
    assert len(everything.flatten(1).unique(dim=0)) == 60


def test_the_second_start_reads_the_cache(root, decodings):
    first = opened(root)
    second = opened(root)
    assert decodings == [14]
    assert torch.equal(first.splits.train.images, second.splits.train.images)
    assert torch.equal(first.splits.test.labels, second.splits.test.labels)


def test_pictures_in_memory_are_not_looked_up_on_disk_again(root):
    first = opened(root)
    other = ImageFolder(root=str(root))
    other.take_over(first.hand_over())
    shutil.rmtree(root / "train")

    other.prepare_data()  # as Lightning does before every fit
    first.prepare_data()

    assert torch.equal(other.splits.train.images, first.splits.train.images)


def _add(root):
    picture(99).save(root / "train/dog/0004.png")


def _remove(root):
    (root / "train/cat/0001.png").unlink()


def _rename(root):
    (root / "test/cat/0001.png").rename(root / "test/cat/0009.png")


def _replace(root):
    picture(77).save(root / "test/dog/0000.png")


def _touch(root):
    os.utime(root / "train/cat/0000.png", ns=(1, 1))


@pytest.mark.parametrize("change", [_add, _remove, _rename, _replace, _touch])
def test_a_changed_folder_is_decoded_again(root, decodings, change):
    opened(root)
    change(root)
    found = opened(root).splits
    assert len(decodings) == 2
    count = sum(1 for file in root.rglob("*.png"))
    assert len(found.train) + len(found.test) == count
    opened(root)
    assert len(decodings) == 2


def test_each_size_has_a_cache_of_its_own(root, decodings):
    for size in (None, 6, None, 6, 8):
        assert opened(root, image_size=size).splits.train.images.shape[2:] == (size or SIZE,) * 2
    assert len(decodings) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_cache_is_made_anew(root, decodings, damage):
    whole = opened(root)
    (cache,) = (root / ".cache").glob("*.npz")
    content = bytearray(cache.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    cache.write_bytes(
        {"cut": content[:-50], "flipped": content, "empty": b"", "text": b"no zip at all"}[damage]
    )
    again = opened(root)
    assert len(decodings) == 2
    assert torch.equal(whole.splits.train.images, again.splits.train.images)
    assert [path.suffix for path in (root / ".cache").iterdir() if path != cache] == [".lock"]


def test_no_single_changed_byte_of_the_cache_goes_unnoticed(root):
    data = opened(root)
    (cache,) = (root / ".cache").glob("*.npz")
    pristine = cache.read_bytes()
    expected = image_folder.load(cache, data._fingerprint)
    found = 0
    for place in [*range(0, len(pristine), 41), *range(len(pristine) - 300, len(pristine), 7)]:
        content = bytearray(pristine)
        content[place] ^= 0xFF
        cache.write_bytes(content)
        pictures = image_folder.load(cache, data._fingerprint)
        found += pictures is None
        assert pictures is None or np.array_equal(pictures, expected)
    assert found > 100


def test_several_starts_together_decode_once(root, decodings):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: len(opened(root).splits.train), range(4)))
    assert found == [10] * 4
    assert decodings == [14]


def test_a_root_that_cannot_be_written_to_is_cached_with_the_user(root, monkeypatch, decodings):
    users = root / "home" / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(users))
    (root / ".cache").write_text("in the way")
    opened(root)
    opened(root)
    assert decodings == [14]
    assert len(list(users.rglob("*.npz"))) == 1


def test_nothing_is_left_when_decoding_fails(root):
    (root / "train/cat/0002.png").write_bytes(b"\x89PNG but no more")
    refusal(root)
    assert [path.name for path in (root / ".cache").iterdir()] == ["pictures.lock"]


def test_pictures_are_resized_and_cropped_to_the_middle(root):
    picture(5, width=40, height=20).save(root / "train/cat/0000.png")
    data = opened(root, image_size=10)
    assert data.image_size == 10
    small = picture(5, width=40, height=20).resize((20, 10), Image.Resampling.BILINEAR)
    expected = np.asarray(small.crop((5, 0, 15, 10))).astype(int)
    found = data.splits.train.pixels[0].numpy().astype(int)
    assert np.abs(found - expected).max() <= 1


def decoded(file: Path) -> np.ndarray:
    return decode([str(file)], SIZE, resize=False)[0]


def test_every_mode_of_picture_becomes_rgb(tmp_path):
    def saved(image: Image.Image, name: str) -> np.ndarray:
        image.save(tmp_path / name)
        return decoded(tmp_path / name)

    rgb = picture(1)
    original = np.asarray(rgb)
    grey = rgb.convert("L")
    assert np.array_equal(saved(rgb, "rgb.png"), original)
    assert np.array_equal(saved(grey, "grey.png"), np.asarray(grey.convert("RGB")))
    palette = rgb.quantize(16)
    assert np.array_equal(saved(palette, "palette.png"), np.asarray(palette.convert("RGB")))
    black_white = rgb.convert("1")
    assert set(np.unique(saved(black_white, "two.png"))) == {0, 255}
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(saved(deep, "deep.png"), np.asarray(grey.convert("RGB")))
    assert np.array_equal(saved(deep, "deep.tiff"), np.asarray(grey.convert("RGB")))
    assert saved(rgb.convert("CMYK"), "cmyk.jpg").shape == (SIZE, SIZE, 3)

    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tri(SIZE, dtype=np.uint8) * 255))
    shown = np.where(np.tri(SIZE, dtype=bool)[:, :, None], original, 255)
    assert np.array_equal(saved(clear, "clear.png"), shown)
    see_through = palette.copy()
    see_through.info["transparency"] = 0
    index = np.asarray(palette)
    expected = np.where((index == 0)[:, :, None], 255, np.asarray(palette.convert("RGB")))
    assert np.array_equal(saved(see_through, "clear.gif"), expected)


def test_the_orientation_that_the_camera_noted_is_applied(tmp_path):
    upright = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decoded(tmp_path / "turned.png"), np.asarray(upright))
    assert decoding.read_size(str(tmp_path / "turned.png")) == (SIZE, SIZE)
    picture(3, width=4, height=2).save(tmp_path / "lying.png", exif=exif)
    assert decoding.read_size(str(tmp_path / "lying.png")) == (2, 4)


@pytest.mark.parametrize("platform", ["linux", "other"])
def test_many_pictures_are_decoded_in_order_on_several_cores(tmp_path, monkeypatch, platform):
    monkeypatch.setattr(decoding, "PICTURES_PER_TASK", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(decoding.sys, "platform", platform)
    fill(tmp_path, {"a": 50})
    files = sorted(str(path) for path in (tmp_path / "a").iterdir())
    expected = np.stack([np.asarray(Image.open(file)) for file in files])
    assert np.array_equal(decode(files, SIZE, resize=False), expected)
    Path(files[20]).write_bytes(b"")
    Path(files[40]).write_bytes(b"GIF89a")
    with pytest.raises(DataError) as told:
        decode(files, SIZE, resize=False)
    faults = str(told.value).splitlines()
    assert len(faults) == 2 and files[20] in faults[0] and files[40] in faults[1]


def test_hidden_files_and_files_beside_the_classes_are_ignored(root):
    for name in (".DS_Store", "Thumbs.db", ".complete"):
        (root / "train/cat" / name).write_text("no picture")
        (root / "train" / name).write_text("no picture")
    (root / "train/.hidden").mkdir()
    (root / "train/labels.csv").write_text("0000,cat")
    (root / "README.txt").write_text("pictures")
    data = opened(root)
    assert data.class_names == ("cat", "dog") and len(data.splits.train) == 10


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "gif", "tiff"])
def test_every_usual_kind_of_file_is_read(tmp_path, suffix):
    fill(tmp_path, {"train/a": 3, "train/b": 3}, suffix)
    data = opened(tmp_path, test_fraction=0.3)
    assert len(data.splits.train) == 4 and data.image_size == SIZE


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\xff\xd8\xff\xe0 no jpeg", b"GIF89a", b"\x89PNG\r\n\x1a\n"]
)
def test_a_file_that_is_no_picture_is_named(root, content):
    broken = root / "train/dog/0001.png"
    broken.write_bytes(content)
    message = refusal(root)
    assert message.startswith(str(broken)) and "\n" not in message


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("first", [True, False])
def test_a_truncated_picture_is_named(tmp_path, suffix, first):
    fill(tmp_path, {"train/cat": 3, "train/dog": 3}, suffix)
    broken = tmp_path / f"train/{'cat/0000' if first else 'dog/0001'}.{suffix}"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 2 // 3])
    assert refusal(tmp_path).startswith(f"{broken} cannot be decoded: ")


def test_many_faults_are_told_together_but_not_endlessly(root):
    for file in sorted((root / "train/cat").iterdir()):
        file.write_bytes(b"no picture")
    for file in (root / "test/dog").iterdir():
        file.write_bytes(b"no picture")
    lines = refusal(root, image_size=8).splitlines()
    assert len(lines) == 6 and lines[-1] == "and 3 more"
    assert all("is not a picture that can be read" in line for line in lines[:5])


def test_pictures_of_different_size_are_refused_with_both_names(root):
    odd = root / "train/dog/0002.png"
    picture(1, width=9, height=7).save(odd)
    message = refusal(root)
    assert message == (
        f"{odd} is 9x7 pixels, but {root}/train/cat/0000.png is 12x12; set data.image_size "
        f"(to 32, for example) to have all of them resized"
    )
    assert opened(root, image_size=8).image_size == 8


def test_pictures_that_are_not_square_need_a_size(tmp_path):
    for name in ("train/a", "train/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            picture(i, width=8, height=6).save(tmp_path / name / f"{i}.png")
    assert re.search(r"train/a/0.png is 8x6 pixels, not square; set data.image", refusal(tmp_path))
    assert opened(tmp_path, image_size=4, test_fraction=0.3).image_size == 4


@pytest.mark.parametrize("victim", ["train/cat/0000.png", "train/dog/0001.png"])
def test_a_decompression_bomb_is_refused_by_name(root, monkeypatch, victim):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for factor in (15, 40):  # Pillow warns of the first and refuses the second
        picture(0, factor, factor).save(root / victim)
        assert refusal(root).startswith(f"{root / victim} is too large: ")


def test_an_empty_class_is_named(root):
    (root / "train/bird").mkdir()
    (root / "test/bird").mkdir()
    assert refusal(root).startswith(f"{root}/train/bird is empty; ")
    picture(1).save(root / "train/bird/1.png")
    assert refusal(root).startswith(f"{root}/test/bird is empty; ")


def test_one_class_and_none_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    assert "has no class folders; a classifier needs at least two" in refusal(tmp_path)
    fill(tmp_path, {"train/cat": 3})
    assert "has only one class folder, cat;" in refusal(tmp_path)


def test_train_and_test_must_have_the_same_classes(root):
    fill(root, {"test/cow": 1})
    assert f"{root}/test has a folder cow, which train has not; " in refusal(root)
    fill(root, {"train/cow": 1, "train/emu": 1})
    assert f"{root}/test has no folder emu; " in refusal(root)


def test_a_missing_root_is_told_with_what_it_should_hold(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"data.root is {tmp_path}/nowhere, and there is no folder")
    assert "train/<class>/" in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_among_the_pictures_is_named(root):
    (root / "train/cat/more").mkdir()
    assert refusal(root).startswith(f"{root}/train/cat/more is not a file; ")


@pytest.mark.timeout(20)
def test_a_pipe_among_the_pictures_is_named_and_not_waited_for(root):
    os.mkfifo(root / "train/cat/pipe.png")
    assert refusal(root).startswith(f"{root}/train/cat/pipe.png is not a file; ")


def test_links_within_root_are_followed_and_those_that_lead_out_refused(root, tmp_path_factory):
    (root / "train/cat/again.png").symlink_to(root / "train/dog/0000.png")
    assert len(opened(root).splits.train) == 11
    outside = tmp_path_factory.mktemp("outside")
    fill(outside, {"bird": 2})
    link = root / "train/cat/far.png"
    link.symlink_to(outside / "bird/0000.png")
    assert refusal(root).startswith(f"{link} is a link that leads out of {root}")
    link.unlink()
    link = root / "train/bird"
    link.symlink_to(outside / "bird")
    assert refusal(root).startswith(f"{link} is a link that leads out of {root}")
    link.unlink()
    (root / "train").rename(outside / "train")
    (root / "train").symlink_to(outside / "train")
    assert refusal(root).startswith(f"{root}/train is a link that leads out of {root}")


def test_a_root_that_is_a_link_itself_is_fine(root, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "pictures"
    link.symlink_to(root)
    assert len(opened(link).splits.train) == 10


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert refusal(root) == f"{root}/train/dog cannot be read: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_named(root):
    (root / "train/dog/0001.png").chmod(0)
    assert refusal(root).startswith(f"{root}/train/dog/0001.png cannot be decoded: ")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("image_size", 0), ("test_fraction", 1.0), ("test_fraction", -1), ("test_fraction", 0)],
)
def test_wrong_settings_are_refused_by_name(root, setting, value):
    with pytest.raises(ValueError, match=rf"^data\.{setting} is {value}; "):
        ImageFolder(root=str(root), **{setting: value})
