"""Whatever comes in, settings or picture files, is used or told in a sentence.

Hypothesis makes up the input; `derandomize` has it make the same each time. To search further, run

    RESEARCH_EXAMPLES=5000 python -m pytest tests/test_faults_input.py
"""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from research.configuration.compose import (
    CHOICES,
    ConfigurationError,
    compose,
    read_command_line,
    read_file,
)
from research.configuration.schema import known_keys, resolve, short_key
from research.data import DataError
from research.data.decoding import decode, read_size

EXAMPLES = os.environ.get("RESEARCH_EXAMPLES")


def some(usual: int) -> settings:
    """So many examples, the same each time; or as many others as the environment asks for."""
    return settings(
        max_examples=int(EXAMPLES or usual),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        # The folder is shared by all examples of a test: each writes its file anew.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- settings ------------------------------------------------------------------------------------

KEYS = sorted({short_key(key) for key in known_keys(resolve().parser)} | set(CHOICES))

odd_text = st.sampled_from(
    [
        *("", " ", ".", "..", "a.b", "-", "--", "=", "~", "null", "None", "true", "nan", ".nan"),
        *(".inf", "-1", "1e999", "1e-3", "0x10", "1_000", "1:30", "2020-01-01", "9" * 4400),
        *("[[[[", "{", "{}", "[]", "[1, 2", "- " * 60, "[" * 3000, "a: &a [*a]", "*a", "#"),
        *("!!python/object/apply:os.system [exit]", "!!set {a}", "!!binary aGk=", "%s", "{0}"),
        *(
            "os.system",
            "torch.nn.ReLU",
            "torch.optim.SGD",
            "torch.hub.load",
            "CNN",
            "SGD",
            "a" * 6000,
        ),
        *(
            "x: &x [1]\ny: *x",
            "\x00",
            "\x1b[31m",
            "\x85",
            "\ud800",
            "\ufeff",
            "\uffff",
            "\U0001f680",
        ),
    ]
)
texts = st.one_of(odd_text, st.text(max_size=30))
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(["config", "print_config", "trust", "trainer", "model", "help", "a..b", "."]),
    st.sampled_from(["trainer.callbacks+", "trainer.callbacks.monitor", "data.init_args.root"]),
    st.builds("{}.{}".format, st.sampled_from(KEYS), st.text(max_size=5)),
    st.text(max_size=10),
)
tokens = st.one_of(
    st.builds(lambda key, value: [f"--{key}", value], keys, texts),
    st.builds(lambda key, value: [f"--{key}={value}"], keys, texts),
    texts.map(lambda text: [text]),
)
command_lines = st.lists(tokens, max_size=4).map(lambda parts: [t for part in parts for t in part])
values = st.recursive(
    st.one_of(texts, st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**40)),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.dictionaries(
            st.one_of(keys, st.sampled_from(["class_path", "init_args"])), inside, max_size=3
        ),
    ),
    max_leaves=8,
)


def resolved(arguments):
    """The configuration, or None where a mistake was told as it should be."""
    try:
        return resolve(arguments)
    except ConfigurationError as error:
        told = str(error)
        assert told.strip()
        assert len(told) < 25_000  # at most 20 faults, each bounded, few of them long
        assert all(character.isprintable() or character == "\n" for character in told)
        assert all(len(fault) < 2_100 for fault in error.faults)
        return None


def check_runs_again(configuration, folder) -> None:
    """What --print_config prints gives the same configuration."""
    printed = configuration.yaml()
    (folder / "printed.yaml").write_text(printed, encoding="utf-8")
    assert resolve(["--config", "printed.yaml", "--trust"]).yaml() == printed


@some(150)
@given(command_lines)
@example(["--run_name", "1e-3"])
@example(["--run_name", "\U0001f680"])
@example(["--config=\x00"])
@example(["--trainer.log_every_n_steps=" + "9" * 4400])
@example(["--optimizer.lr=" + "[" * 3000])
@example(["--model.network.activation=&a [1] *a"])
@example(["--trainer.callbacks.monitor", "{}"])
def test_any_command_line_is_a_configuration_or_told(folder, arguments):
    configuration = resolved(arguments)
    if configuration is not None:
        check_runs_again(configuration, folder)


@some(150)
@given(st.dictionaries(keys, values, max_size=4))
@example({"optimizer": {"lr": float("inf")}})
@example({"optimizer": {"lr": float("nan")}})
@example({"model": {1: 2}})
@example({".".join("a" * 3000): 1})
@example({f"key{number}": number for number in range(3000)})
@example({"trainer": {"max_epochs": {"a": 1}}})
def test_any_file_of_settings_is_a_configuration_or_told(folder, content):
    text = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "replace")
    (folder / "settings.yaml").write_bytes(text)
    configuration = resolved(["--config", "settings.yaml"])
    if configuration is not None:
        check_runs_again(configuration, folder)


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@some(200)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: t.encode("utf-8"))))
@example(b"\xef\xbb\xbfseed_everything: 3\n")  # with a BOM, as Windows writes it
@example(b"\xff\xfes\x00e\x00")
@example(b"[" * 100_000)  # libyaml ends the process
@example(b"- " * 100_000)
@example(b"a:\n" + b"".join(b" " * depth + b"a:\n" for depth in range(1, 1000)))
@example(BOMB.encode())
@example(b"&a [*a]")
@example(b"a: &a {b: *a}")
@example(b"a: " + b"x" * 2_000_000)
@example(b"optimizer: !!python/object/apply:os.system ['exit 1']")
@example(b"a: !!timestamp 2020-99-99")
@example(b"a: " + b"9" * 5000)
@example(b"optimizer: {lr: '" + b"".join(BOMB.encode().replace(b"'", b"").splitlines()) + b"'}")
def test_any_bytes_in_a_file_are_settings_or_told(folder, content):
    (folder / "noise.yaml").write_bytes(content)
    try:
        compose(read_file("noise.yaml"))
    except ConfigurationError as error:
        assert len(str(error)) < 25_000
        assert all(c.isprintable() or c == "\n" for c in str(error))


def test_a_file_without_an_end_is_refused():
    if not os.path.exists("/dev/zero"):
        pytest.skip("no /dev/zero")
    with pytest.raises(ConfigurationError, match="/dev/zero has more than 1,000,000 bytes"):
        read_file("/dev/zero")


@some(100)
@given(
    st.lists(st.sampled_from(["SGD", "AdamW", "Adam", "torch.optim.SGD"]), min_size=1, max_size=5)
)
def test_of_a_flag_that_is_given_twice_the_last_counts(names):
    """And composing what was composed changes nothing."""
    typed = [part for name in names for part in ("--optimizer", name)]
    once = compose(read_command_line(typed).settings)
    assert once["optimizer"]["class_path"].endswith(names[-1].rpartition(".")[2])
    assert compose(once) == once


# ---- pictures ------------------------------------------------------------------------------------

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "AVIF"]
SIZE = 8


def picture(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise in the mode."""
    random = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 2**16, (height, width), dtype=np.uint16))
    rgb = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "LAB":
        return Image.frombytes("LAB", rgb.size, rgb.tobytes())
    return rgb.convert("L").convert(mode) if mode in ("LA", "PA", "I", "F") else rgb.convert(mode)


def encoded(image: Image.Image, kind: str) -> bytes | None:
    """The picture as a file of this kind; None where that kind cannot hold it."""
    file = io.BytesIO()
    try:
        image.save(file, kind)
    except (OSError, ValueError, KeyError, SystemError):
        return None
    return file.getvalue()


def decoded(file: Path, resize: bool = True) -> np.ndarray | None:
    """The picture, or None where the file was refused as it should be; no warning either way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pictures = decode([str(file)], SIZE, resize)
        except DataError as error:
            assert file.name in str(error)
            assert "\n" not in str(error)
            assert len(str(error)) < 1_000
            return None
    assert pictures.shape == (1, SIZE, SIZE, 3)
    assert pictures.dtype == np.uint8
    return pictures[0]


@some(150)
@given(st.binary(max_size=2_000))
@example(b"")
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) (w) file\n")  # a program
@example(b"P6 99999 99999 255\n")
@example(b"II*\0\x08\0\0\0\xff\xff")
def test_any_bytes_are_a_picture_or_told(folder, content):
    file = folder / "noise.png"
    file.write_bytes(content)
    decoded(file)


@some(100)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(MODES),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_a_picture_of_any_mode_and_size_is_decoded_right(folder, kind, mode, width, height, seed):
    """At the size asked for: the pixels of Pillow's own conversion, where that is ours too."""
    content = encoded(picture(mode, width, height, seed), kind)
    if content is None:
        return
    file = folder / "picture"
    file.write_bytes(content)
    found = decoded(file)
    if found is None:
        assert mode in ("F", "LAB")  # what has no known range, and what Pillow does not convert
        return
    with Image.open(io.BytesIO(content)) as image:
        if image.mode in ("RGB", "L", "CMYK", "YCbCr", "1") and image.size == (SIZE, SIZE):
            expected = np.asarray(image.convert("RGB"))
            assert np.array_equal(found, expected)


@some(200)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(["RGB", "P", "L", "RGBA"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0.01, 1.5),
)
def test_a_damaged_picture_is_decoded_or_told(folder, kind, mode, flips, kept):
    """Bytes changed anywhere, more often at the head, where sizes stand; then cut off."""
    content = encoded(picture(mode, 20, 20), kind)
    if content is None:  # that kind of file has no such mode
        return
    damaged = bytearray(content)
    for place, byte in flips:
        damaged[int(place**3 * (len(damaged) - 1))] = byte
    damaged = damaged[: int(len(damaged) * kept)]
    file = folder / "damaged.img"
    file.write_bytes(damaged)
    decoded(file)
    try:
        width, height = read_size(str(file))
    except DataError as error:
        assert "damaged.img" in str(error)
    else:
        assert width > 0
        assert height > 0
