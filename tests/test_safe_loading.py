"""A stranger's checkpoint, settings, archive or pictures run no code: tried with ones that would.

Each attack leaves a file, MARKER, where it succeeds.
"""

import hashlib
import io
import os
import pickle
import re
import socket
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision import datasets

from research import evaluate, predict
from research.building import build_classifier, build_data
from research.checkpoints.io import DurableCheckpointIO, newest_whole
from research.checkpoints.trained import is_own_store, read_checkpoint
from research.configuration.compose import CommandLine, ConfigurationError
from research.configuration.schema import resolve
from research.data import CIFAR10, DataError, ImageFolder
from research.data.cifar10 import ARCHIVE, FOLDER
from research.data.decoding import decode
from research.tracking.store import resolve_tracking_uri, sqlite_uri
from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]
MARKER = "owned"
TOUCH = f"{sys.executable} -c \"open('{MARKER}', 'w')\""
EVIL_MODULE = f"""
import os
os.system({TOUCH!r})
from lightning.pytorch import Callback
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()

class Watch(Callback):
    pass
"""


class Attack:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (TOUCH,)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with one picture and a module that must not be imported; it is on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(EVIL_MODULE)
    Image.new("RGB", (32, 32), "red").save("cat.png")
    yield tmp_path
    sys.modules.pop("evil", None)


@pytest.fixture
def content(small) -> dict:
    """What a checkpoint of an untrained network holds; it can be used as it is."""
    configuration = small()
    data = build_data(configuration)
    pictures = {
        "class_names": list(data.class_names),
        "image_size": data.image_size,
        "mean": list(data.normalization.mean),
        "std": list(data.normalization.std),
    }
    return {
        "epoch": 0,
        "state_dict": build_classifier(configuration, data).state_dict(),
        "origin": {"configuration": configuration.yaml(), "run_id": None, "pictures": pictures},
    }


def changed(content: dict, key: str, value: object) -> dict:
    """The content with another setting in its configuration."""
    settings = resolve(SMALL).yaml()
    import yaml

    nested = yaml.safe_load(settings)
    *parents, last = key.split(".")
    inside = nested
    for parent in parents:
        inside = inside[parent]
    inside[last] = value
    return {**content, "origin": {**content["origin"], "configuration": yaml.safe_dump(nested)}}


def refused(arguments, command, capsys) -> str:
    """What was told on standard error; it was refused, in words, and nothing ran."""
    assert command(arguments) in (1, 2)
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    assert not os.path.exists(MARKER)
    return said.err


COMMANDS = {
    "predict": lambda: predict.main(["stranger.ckpt", "cat.png"]),
    "evaluate": lambda: evaluate.main(["stranger.ckpt"]),
}


def both_refuse(capsys) -> str:
    told = ""
    for command in COMMANDS.values():
        assert command() == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert said.out == ""
        assert not os.path.exists(MARKER)
        told += said.err
    return told


def test_the_attacks_are_real(here):
    """Without which all that follows would show nothing."""
    pickle.loads(pickle.dumps(Attack()))
    assert os.path.exists(MARKER)
    os.remove(MARKER)
    import evil  # noqa: F401

    assert os.path.exists(MARKER)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_sound_checkpoint_is_taken(here, content, capsys):
    """So that what is refused below is not refused for another reason."""
    torch.save(content, "stranger.ckpt")
    assert [command() for command in COMMANDS.values()] == [0, 0]


@pytest.mark.parametrize("place", ["whole", "state_dict", "origin", "beside"])
def test_code_pickled_into_a_checkpoint_does_not_run(here, content, place, capsys):
    poisoned = {"whole": Attack(), "beside": {**content, "more": Attack()}}.get(
        place, {**content, place: Attack()}
    )
    torch.save(poisoned, "stranger.ckpt")
    assert "is no checkpoint of python -m research.fit" in both_refuse(capsys)


@pytest.mark.parametrize("form", ["pickle", "legacy", "tar", "compressed", "bomb", "cut"])
def test_other_forms_of_file_are_refused(here, content, form, capsys):
    file = Path("stranger.ckpt")
    match form:
        case "pickle":
            file.write_bytes(pickle.dumps(Attack()))
        case "legacy":
            torch.save(Attack(), file, _use_new_zipfile_serialization=False)
        case "tar":
            with tarfile.open(file, "w") as tar:
                entry = tarfile.TarInfo("pickle")
                entry.size = len(pickle.dumps(Attack()))
                tar.addfile(entry, io.BytesIO(pickle.dumps(Attack())))
        case "compressed" | "bomb":
            torch.save(content, "sound.ckpt")
            with (
                zipfile.ZipFile("sound.ckpt") as sound,
                zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
            ):
                for name in sound.namelist():
                    grown = bytes(50_000_000) if form == "bomb" and "/data/" in name else b""
                    packed.writestr(name, sound.read(name) + grown)
            assert file.stat().st_size < 10_000_000
        case "cut":
            torch.save(content, file)
            file.write_bytes(file.read_bytes()[:-1000])
    assert "is no checkpoint of python -m research.fit, or it is damaged" in both_refuse(capsys)


def test_a_run_does_not_go_on_from_pickled_code(here, content):
    """--resume takes the newest whole checkpoint, and reads it as data whatever it is asked."""
    torch.save({**content, "global_step": 1, "loops": Attack()}, "last.ckpt")
    assert newest_whole(here) == (None, [here / "last.ckpt"])
    for weights_only in (True, False, None):
        with pytest.raises(pickle.UnpicklingError):
            DurableCheckpointIO().load_checkpoint("last.ckpt", weights_only=weights_only)
    assert not os.path.exists(MARKER)


def test_a_pipe_is_no_checkpoint_and_is_not_waited_for(here, capsys):
    os.mkfifo("stranger.ckpt")
    writer = os.open("stranger.ckpt", os.O_RDWR)  # else `open` would wait in a test that fails
    try:
        both_refuse(capsys)
    finally:
        os.close(writer)


NAMED = [
    ("model.network", {"class_path": "evil.Net", "init_args": {}}, "evil.Net"),
    ("model.network", {"class_path": "os.system", "init_args": {"command": TOUCH}}, "os.system"),
    ("model.network", {"class_path": "builtins.exec", "init_args": {}}, "builtins.exec"),
    ("model.network", {"class_path": "torch.hub.load", "init_args": {}}, "torch.hub.load"),
    (
        "model.network",
        {"class_path": "research.tracking.run.subprocess.Popen", "init_args": {"args": TOUCH}},
        "subprocess.Popen",
    ),
    (
        "model.network",
        {"class_path": "torchvision.models.resnet18", "init_args": {"norm_layer": "evil.Net"}},
        "norm_layer",
    ),
    ("model.loss", {"class_path": "evil.Net", "init_args": {}}, "evil.Net"),
    ("optimizer", {"class_path": "evil.Net", "init_args": {}}, "evil.Net"),
    (
        "lr_scheduler",
        {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "evil.Net"}},
        "lr_lambda",
    ),
    ("data", {"class_path": "evil.Net", "init_args": {}}, "evil.Net"),
]
OF_THE_TRAINER = [
    ("trainer.plugins", [{"class_path": "evil.Watch"}], "evil.Watch"),
    ("trainer.strategy", {"class_path": "evil.Watch"}, "evil.Watch"),
    ("trainer.accelerator", {"class_path": "evil.Watch"}, "evil.Watch"),
]


@pytest.mark.parametrize(("key", "value", "told"), NAMED, ids=lambda value: str(value)[:60])
def test_a_checkpoint_cannot_name_what_runs_code(here, content, key, value, told, capsys):
    """Not even by naming a module that lies in the folder where the command is typed."""
    torch.save(changed(content, key, value), "stranger.ckpt")
    assert told in both_refuse(capsys)


@pytest.mark.parametrize(("key", "value", "told"), OF_THE_TRAINER, ids=lambda value: str(value))
def test_a_checkpoint_cannot_name_parts_of_the_trainer(here, content, key, value, told, capsys):
    torch.save(changed(content, key, value), "stranger.ckpt")
    assert told in refused(["stranger.ckpt"], evaluate.main, capsys)


@pytest.mark.parametrize("key", ["trainer.callbacks", "trainer.logger", "trainer.profiler"])
def test_what_belongs_to_training_is_not_even_looked_at(here, content, key, capsys):
    torch.save(changed(content, key, [{"class_path": "evil.Watch"}]), "stranger.ckpt")
    assert evaluate.main(["stranger.ckpt"]) == 0
    assert not os.path.exists(MARKER)


@pytest.mark.parametrize(
    "text",
    [
        f"optimizer: !!python/object/apply:os.system [{TOUCH!r}]",
        "model: !!python/name:evil.Net ''",
        "[" * 50_000,
        "no settings",
        "trainer: 3",
        "",
        "a: &a [*a]",
    ],
    ids=lambda text: text[:30],
)
def test_the_settings_in_a_checkpoint_are_data_only(here, content, text, capsys):
    content["origin"]["configuration"] = text
    content["origin"]["pictures"]["class_names"] = ["a", "b"]
    torch.save(content, "stranger.ckpt")
    both_refuse(capsys)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(("epoch", value) for value in (None, "1", [])),
        *(("state_dict", value) for value in (None, [], {"network.a": "b"}, {1: 2})),
        *(("origin", value) for value in (None, [], {"pictures": 3})),
        *(("class_names", value) for value in ([], [1], None, "ab", {})),
        *(("image_size", value) for value in (None, 0, -1, "32", 1.5)),
        *(("mean", value) for value in (None, [1, 2], ["a"] * 3, [float("nan")] * 3)),
        ("configuration", 3),
        ("run_id", []),
    ],
)
def test_a_checkpoint_with_odd_parts_is_refused(here, content, part, value, capsys):
    inside = next(
        place
        for place in (content, content["origin"], content["origin"]["pictures"])
        if part in place
    )
    inside[part] = value
    torch.save(content, "stranger.ckpt")
    with pytest.raises(ConfigurationError, match=r"stranger\.ckpt"):
        read_checkpoint(Path("stranger.ckpt"))


def test_trust_is_asked_for_by_name_and_then_given(here, content):
    settings = changed(content, "model.network", {"class_path": "evil.Net", "init_args": {}})
    torch.save(settings, "stranger.ckpt")
    checkpoint = read_checkpoint(Path("stranger.ckpt"), trust=True)
    assert not os.path.exists(MARKER)  # reading is safe in any case
    command = CommandLine(files=[{"model": {"network": "evil.Net"}}], trust=checkpoint.trust)
    assert resolve(command).classes["model.network"].__module__ == "evil"
    assert os.path.exists(MARKER)


def test_the_store_of_ones_own_is_the_file_that_is_used_when_none_is_named(here, monkeypatch):
    own = resolve_tracking_uri(None)
    assert is_own_store(own)
    assert not is_own_store(sqlite_uri(here / "theirs.db"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert not is_own_store("http://127.0.0.1:5000")
    assert not is_own_store(own)


# ---- settings files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "model: {network: evil.Net}",
        f"model: {{network: {{class_path: os.system, init_args: {{command: '{MARKER}'}}}}}}",
        "trainer: {callbacks: [evil.Watch]}",
        "trainer: {callbacks: [{class_path: evil.Watch}]}",
        "trainer: {callbacks: more.yaml}",
        "trainer: {logger: {class_path: evil.Watch}}",
        "trainer: {plugins: [{class_path: evil.Watch}]}",
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, "
        "init_args: {on_fit_start: evil.Watch}}]}",
        "lr_scheduler: {class_path: LambdaLR, init_args: {lr_lambda: evil.Watch}}",
        "data: evil.Net",
        f"seed_everything: !!python/object/apply:os.system [{TOUCH!r}]",
    ],
)
def test_a_settings_file_cannot_name_what_runs_code(here, text):
    Path("stranger.yaml").write_text(text)
    Path("more.yaml").write_text("- class_path: evil.Watch\n")
    with pytest.raises(ConfigurationError):
        resolve(["--config", "stranger.yaml"])
    assert not os.path.exists(MARKER)
    assert "evil" not in sys.modules


def test_what_a_person_types_or_trusts_may_be_any_class(here):
    assert resolve(["--model.network", "evil.Net"]).classes["model.network"].__module__ == "evil"
    Path("mine.yaml").write_text("model: {network: evil.Net}")
    with pytest.raises(ConfigurationError, match=r"evil\.Net may not be named in a file.*--trust"):
        resolve(["--config", "mine.yaml"])  # also now that it has been imported
    assert resolve(["--config", "mine.yaml", "--trust"]).classes["model.network"].__name__ == "Net"


@pytest.mark.parametrize("name", ["os.system", "subprocess.run", "builtins.eval", "math.sqrt"])
def test_only_what_says_that_it_makes_a_network_is_called(here, name):
    """A function is called with arguments of the file's: a mere callable would do anything."""
    for arguments in (["--model.network", name], ["--model.network", name, "--trust"]):
        with pytest.raises(ConfigurationError, match=r"model\.network: "):
            resolve(arguments)


def test_known_classes_may_be_named_by_their_paths(here):
    Path("usual.yaml").write_text(
        "model: {network: {class_path: torchvision.models.resnet18, "
        "init_args: {norm_layer: torch.nn.InstanceNorm2d}}}\n"
        "optimizer: torch.optim.AdamW\n"
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, "
        "init_args: {monitor: val/loss}}]}\n"
    )
    configuration = resolve(["--config", "usual.yaml"])
    assert len(configuration.trainer_arguments()["callbacks"]) == 1


# ---- servers ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # what MLflow says when it is imported
def test_what_is_documented_listens_on_this_machine_only():
    """By MLflow's own default, and nothing here says otherwise."""
    import mlflow.cli
    import mlflow.models.cli

    for command in (
        mlflow.cli.cli.commands["server"],  # which `mlflow ui` is
        mlflow.models.cli.commands.commands["serve"],
    ):
        (host,) = [each.default for each in command.params if "--host" in each.opts]
        assert host == "127.0.0.1"
    documents = [ROOT / "README.md", *(ROOT / "research").rglob("*.py")]
    documents += (ROOT / "experiments").glob("*")
    for file in documents:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert "0.0.0.0" not in line, file
            if re.search(r"mlflow (ui|server|models serve)", line):
                assert not re.search(r"(--host|-h) (?!127\.0\.0\.1)\S", line), (file, line)


# ---- CIFAR-10 ------------------------------------------------------------------------------------


def test_pickles_that_are_not_the_published_ones_are_not_opened(here):
    folder = here / "data" / FOLDER
    folder.mkdir(parents=True)
    names = [name for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]
    for name in (*names, "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError, match="incomplete, damaged or not readable"):
        CIFAR10(root="data").setup()
    assert not os.path.exists(MARKER)


def archive_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for entry, data in entries:
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    return entry


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="Python without tarfile's filters")
@pytest.mark.parametrize(
    "entries",
    [
        [(tarfile.TarInfo(f"../../{MARKER}"), b"x")],
        [(tarfile.TarInfo("/tmp/research-owned"), b"x")],
        [(link(FOLDER, "../.."), b""), (tarfile.TarInfo(f"{FOLDER}/{MARKER}"), b"x")],
    ],
    ids=["up", "absolute", "link"],
)
def test_archive_is_checked_before_it_is_unpacked_and_nothing_leaves_its_folder(
    here, monkeypatch, entries
):
    content = archive_of(*entries)
    root = here / "data"
    root.mkdir()
    (root / ARCHIVE).write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        CIFAR10(root="data").prepare_data()
    # As if the published archive itself were the attack.
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    with pytest.raises(DataError):
        CIFAR10(root="data").prepare_data()
    assert not list(here.rglob(MARKER))
    assert not os.path.exists("/tmp/research-owned")
    assert sorted(path.name for path in root.iterdir()) == [ARCHIVE]


# ---- pictures and their cache --------------------------------------------------------------------


@pytest.fixture
def root(here) -> Path:
    for name in ("cat", "dog"):
        folder = here / "pictures" / "train" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 9, 9)).save(folder / f"{number}.png")
    return here / "pictures"


def opened(root: Path) -> ImageFolder:
    data = ImageFolder(root=str(root), val_fraction=0.0, test_fraction=0.3)
    data.prepare_data()
    data.setup()
    return data


def test_a_cache_of_pickles_is_not_opened(root):
    data = opened(root)
    (cache,) = (root / ".cache").glob("*.npz")
    poisoned = np.empty(1, dtype=object)
    poisoned[0] = Attack()
    np.savez(cache, fingerprint=np.array(data._fingerprint), pictures=poisoned)
    assert len(opened(root).splits.train) == len(data.splits.train)
    np.savez(cache, fingerprint=poisoned, pictures=poisoned)
    opened(root)
    assert not os.path.exists(MARKER)


def test_a_cache_of_other_pictures_is_made_anew(root):
    data = opened(root)
    (cache,) = (root / ".cache").glob("*.npz")
    fingerprint = np.array(data._fingerprint)
    for wrong in (np.zeros((8, 8, 8)), np.zeros((2, 8, 8, 3), np.uint8), np.array(3)):
        np.savez(cache, fingerprint=fingerprint, pictures=wrong)
        assert torch.equal(opened(root).splits.train.images, data.splits.train.images)


def test_the_cache_is_never_written_through_a_link(root, here):
    """A stranger's folder of pictures may bring its own .cache along."""
    precious = here / "precious"
    precious.write_text("mine")
    (root / ".cache").mkdir()
    for name in ("pictures.part", "pictures.npz"):
        (root / ".cache" / name).symlink_to(precious)
    opened(root)
    assert precious.read_text() == "mine"


def test_pipes_sockets_and_devices_among_pictures_are_refused_and_not_waited_for(root):
    inside = root / "train" / "cat"
    place = inside / "odd.png"
    os.mkfifo(place)
    with pytest.raises(DataError, match=r"odd\.png is not a file"):
        opened(root)
    with pytest.raises(DataError, match=r"odd\.png .*not a regular file"):
        decode([str(place)], 8, resize=True)
    place.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        folder = os.getcwd()
        os.chdir(inside)  # the path of a socket has to be short
        listening.bind("odd.png")
        os.chdir(folder)
        with pytest.raises(DataError, match=r"odd\.png is not a file"):
            opened(root)
    place.unlink()
    place.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"odd\.png is a link that leads out of"):
        opened(root)
    with pytest.raises(DataError, match=r"not a regular file"):
        decode(["/dev/zero"], 8, resize=True)


def test_links_that_lead_in_a_circle_are_refused(root):
    (root / "train" / "cat" / "odd.png").symlink_to("odd.png")
    with pytest.raises(DataError, match=r"odd\.png cannot be read: Too many levels of symbolic"):
        opened(root)


def test_the_name_of_a_file_cannot_forge_a_line_of_what_is_told(root):
    name = "x\nerror: all is well \x1b[2J.png"
    (root / "train" / "cat" / name).write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        opened(root)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert r"x\nerror: all is well \x1b[2J.png" in str(caught.value)


def bombs(folder: Path) -> list[Path]:
    """Small files that would unfold to a lot."""
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 100_000_000, zip=True)
    small = Image.new("L", (8, 8))
    small.save(folder / "text.png", pnginfo=text)
    Image.new("1", (20_000, 20_000)).save(folder / "wide.png")
    Image.new("1", (20_000, 20_000)).save(folder / "wide.tif", compression="group4")
    (folder / "claims.ppm").write_bytes(b"P6 100000 100000 255\n")
    return sorted(folder.iterdir())


def test_bombs_are_refused(tmp_path):
    folder = tmp_path / "bombs"
    folder.mkdir()
    for file in bombs(folder):
        assert file.stat().st_size < 1_000_000
        with pytest.raises(DataError, match=file.name):
            decode([str(file)], 8, resize=True)


def test_of_an_animation_only_the_first_frame_is_unfolded(tmp_path, monkeypatch):
    frames = [Image.new("P", (8, 8), number % 256) for number in range(2_000)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:], duration=10)
    from PIL import GifImagePlugin

    seeks = []
    seek = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile,
        "_seek",
        lambda self, frame, *rest: (seeks.append(frame), seek(self, frame, *rest))[1],
    )
    assert decode([str(tmp_path / "many.gif")], 8, resize=True).shape == (1, 8, 8, 3)
    assert set(seeks) <= {0}


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow hands it to Ghostscript, whatever the file is called."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript ran"))
    file = tmp_path / "cat.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=r"cat\.png is not a picture"):
        decode([str(file)], 8, resize=True)
