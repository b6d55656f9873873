"""Full disks, no permission, damaged files: one sentence, exit code 1, and the next start works.

Where the machine allows it the disk is a small one (tmpfs) that fills up for real; permissions are
those of a process that has lost root's right to pass them over.
"""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from research import fit
from research.command import exit_code_of
from research.configuration.compose import ConfigurationError
from research.data import DataError, ImageFolder
from research.tracking.store import TrackingError, sqlite_uri
from research.tracking.troubles import explain

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="disks and rights of Unix")


def draw(root: Path, count: int = 12, size: int = 32) -> Path:
    """A folder of noise, in two classes."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


# ---- words and exit codes ------------------------------------------------------------------------


def ended(error: BaseException, capsys) -> tuple[int, str]:
    def work() -> int:
        raise error

    code = exit_code_of(work)
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.ckpt"), "a.ckpt: No space left on"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free some"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied."),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system."),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "y"), "y: No such file"),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
            "full?",
        ),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_told_in_a_line_with_exit_code_1(error, told, capsys):
    code, said = ended(error, capsys)
    assert code == 1
    assert said.startswith("error: ")
    assert told in said
    assert len(said.splitlines()) == 1


def test_a_full_disk_behind_an_error_of_torchs_is_told(capsys):
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("unexpected pos 896 vs 854")  # noqa: B904  (as torch does)
    except RuntimeError as error:
        code, said = ended(error, capsys)
    assert code == 1
    assert "No space left on device" in said


def bugs() -> Iterator[Exception]:
    yield OSError("a library's own")
    yield OSError(errno.EBADF, "Bad file descriptor")
    yield RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    yield KeyError("name")
    try:
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "x")
        except OSError:
            None.read()  # type: ignore[attr-defined]
    except AttributeError as error:  # a bug on the way of handling an error
        yield error


@pytest.mark.parametrize("error", list(bugs()), ids=repr)
def test_a_bug_keeps_its_traceback(error):
    def work() -> int:
        raise error

    with pytest.raises(type(error)) as caught:
        exit_code_of(work)
    assert caught.value is error


def test_notes_are_told_and_terminals_left_alone(capsys):
    error = ConfigurationError("data.root: \x1b[2J\x07")
    error.add_note("Nothing was recorded.")
    code, said = ended(error, capsys)
    assert code == 2
    assert said == "error: data.root: \\x1b[2J\\x07.\nNothing was recorded.\n"


def test_a_second_interruption_tells_what_the_first_one_knew(capsys):
    def work():
        try:
            first = KeyboardInterrupt()
            first.add_note("Go on with it: command")
            raise first
        finally:
            raise KeyboardInterrupt

    assert exit_code_of(work) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\nGo on with it: command\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_told():
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "research.fit", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in ran.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/r/mlruns/1"),
            "/r/mlruns/1 cannot be",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/r/mlruns/1"),
            "holds /r/mlruns/1 is full",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/r/mlflow.db.lock"),
            "its folder must",
        ),
        (RuntimeError("database disk image is malformed"), "/r/mlflow.db is damaged"),
        (RuntimeError("file is not a database"), "/r/mlflow.db is not an SQLite database"),
        (RuntimeError("database or disk is full"), "holds /r/mlflow.db is full"),
    ],
    ids=str,
)
def test_of_a_store_the_file_at_fault_is_named(error, told):
    assert told in explain(error, "sqlite:////r/mlflow.db")


def test_a_store_that_cannot_be_used_is_no_mistake_of_typing(capsys):
    """And a run that is not in it is."""
    try:
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "x")
        except OSError as cause:
            raise TrackingError("x cannot be written.") from cause
    except TrackingError as error:
        assert ended(error, capsys)[0] == 1
    wrong = sqlite_uri(ROOT / "tests" / "__init__.py")
    assert fit.main(["--resume", "nothing", "--tracking_uri", wrong]) == 2


# ---- the cache of decoded pictures ---------------------------------------------------------------


def opened(root: Path) -> ImageFolder:
    data = ImageFolder(root=str(root), val_fraction=0.0, test_fraction=0.25)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def root(tmp_path) -> Path:
    return draw(tmp_path / "pictures")


def damage(how: str, cache: Path) -> None:
    content = bytearray(cache.read_bytes())
    match how:
        case "empty":
            content.clear()
        case "short":
            del content[-200:]
        case "half":
            del content[len(content) // 2 :]
        case "zeroed":
            content[:] = bytes(len(content))
        case "a zeroed block":
            content[4096:8192] = bytes(4096)
        case "one bit":
            content[len(content) // 2] ^= 1
        case "longer":
            content += bytes(1000)
        case "text":
            content[:] = b"no cache at all"
    cache.write_bytes(content)


@pytest.mark.parametrize(
    "how", ["empty", "short", "half", "zeroed", "a zeroed block", "one bit", "longer", "text"]
)
def test_a_damaged_cache_is_made_anew_by_itself(root, how):
    before = opened(root)
    (cache,) = (root / ".cache").glob("*.npz")
    damage(how, cache)
    after = opened(root)
    assert torch.equal(after.splits.train.images, before.splits.train.images)
    assert torch.equal(after.splits.test.images, before.splits.test.images)
    sound = cache.read_bytes()
    opened(root)
    assert cache.read_bytes() == sound
    assert sorted(file.suffix for file in (root / ".cache").iterdir()) == [".lock", ".npz"]


def test_what_a_killed_run_left_of_the_cache_is_in_nobodys_way(root):
    """Its side file, half written, and its lock, which no living process holds."""
    (root / ".cache").mkdir()
    (root / ".cache" / "pictures.part").write_bytes(b"half")
    (root / ".cache" / "pictures.lock").write_text("12345")
    opened(root)
    assert sorted(file.suffix for file in (root / ".cache").iterdir()) == [".lock", ".npz"]


@pytest.mark.parametrize("name", ["pictures.npz", "pictures.part", "pictures.lock"])
def test_a_folder_in_the_place_of_a_cache_file_is_told_and_then_gone(root, name):
    obstacle = root / ".cache" / name
    obstacle.mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot be kept in .*pictures\.npz"):
        opened(root)
    assert not list((root / ".cache").glob("*.part")) or name == "pictures.part"
    obstacle.rmdir()
    opened(root)


def test_a_file_in_the_place_of_the_cache_folder_sends_the_cache_elsewhere(
    root, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    (root / ".cache").write_text("")
    opened(root)
    assert list((tmp_path / "users").rglob("*.npz"))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--data.root", "nowhere"], 2),  # a mistake in what was typed
        (["--data.root", "pictures"], 1),  # a file that cannot be used
    ],
)
def test_data_that_are_not_there_and_data_that_are_damaged_have_their_own_codes(
    root, tmp_path, monkeypatch, capsys, arguments, code
):
    monkeypatch.chdir(tmp_path)
    (root / "train" / "cat" / "00.png").write_bytes(b"no picture")
    assert fit.main(["--data", "ImageFolder", *arguments, "--tracking_uri", ""]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: data")
    assert len(said.splitlines()) == 1


# ---- for real ------------------------------------------------------------------------------------

TINY = [
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--model.network.widths", "[4,4,8]", "--model.network.hidden", "64"),
    *("--log_system_metrics", "false", "--log_model", "false"),
]
SYNTHETIC = ["--data", "Synthetic", "--data.num_train", "160", "--data.num_test", "40"]
# Root is refused nothing; without these two capabilities it is like everybody else.
AS_EVERYBODY = [
    *("setpriv", "--bounding-set=-dac_override,-dac_read_search"),
    "--inh-caps=-dac_override,-dac_read_search",
]


def run_fit(
    folder: Path, *arguments: str, prefix: list[str] | None = None, limit: int | None = None
):
    """The ended process of one short training, all its own folders below `folder`."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **{"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **{"HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
    }

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [*(prefix or []), sys.executable, "-m", "research.fit", *TINY, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=restrict,
        timeout=600,
    )


def refused(ran, *told: str) -> None:
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.stderr
    assert all(words in errors[0] for words in told), errors


def went_well(ran) -> None:
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.fixture
def everybody(tmp_path) -> list[str]:
    """What to put before a command so that permissions hold for it."""
    if os.geteuid() != 0:
        return []
    place = tmp_path / "locked"
    place.mkdir(mode=0o555)
    try:
        tried = subprocess.run([*AS_EVERYBODY, "touch", str(place / "x")], capture_output=True)
    except FileNotFoundError:
        pytest.skip("root, and no setpriv to give its rights away")
    if tried.returncode == 0 or not shutil.which("setpriv") or (place / "x").exists():
        pytest.skip("root, whose rights cannot be given away here")
    if b"Permission denied" not in tried.stderr:
        pytest.skip(f"setpriv does not work here: {tried.stderr.decode()}")
    return AS_EVERYBODY


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A disk of a given size; called again, the same one with another size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def resize(size: str) -> Path:
        nonlocal mounted
        options = f"size={size}" if not mounted else f"remount,size={size}"
        try:
            tried = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
            )
        except FileNotFoundError:
            pytest.skip("no mount here")
        if tried.returncode != 0:
            pytest.skip("no right to mount a small disk")
        mounted = True
        return place

    yield resize
    if mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.faults
def test_store_in_a_folder_that_is_read_only(tmp_path, everybody):
    store = tmp_path / "store"
    store.mkdir(mode=0o555)
    arguments = [*SYNTHETIC, "--tracking_uri", sqlite_uri(store / "mlflow.db")]
    refused(run_fit(tmp_path, *arguments, prefix=everybody), "must be writable")
    assert list(store.iterdir()) == []
    store.chmod(0o755)
    went_well(run_fit(tmp_path, *arguments, prefix=everybody))


@pytest.mark.faults
def test_folder_of_artifacts_that_is_read_only(tmp_path, everybody):
    arguments = [*SYNTHETIC, "--tracking_uri", sqlite_uri(tmp_path / "mlflow.db")]
    went_well(run_fit(tmp_path, *arguments, prefix=everybody))
    folders = [tmp_path / "mlruns", *(p for p in (tmp_path / "mlruns").rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    refused(run_fit(tmp_path, *arguments, prefix=everybody), "mlruns", "cannot be written")
    for folder in folders:
        folder.chmod(0o755)
    went_well(run_fit(tmp_path, *arguments, prefix=everybody))


@pytest.mark.faults
@pytest.mark.parametrize("what", ["train/cat", "train/cat/03.png"])
def test_pictures_that_may_not_be_read(tmp_path, everybody, what):
    root = draw(tmp_path / "pictures")
    arguments = ["--data", "ImageFolder", "--data.root", "pictures", "--tracking_uri", ""]
    (root / what).chmod(0)
    refused(run_fit(tmp_path, *arguments, prefix=everybody), what, "Permission denied")
    (root / what).chmod(0o755)
    went_well(run_fit(tmp_path, *arguments, prefix=everybody))


@pytest.mark.faults
def test_disk_that_is_full_for_the_cache(tmp_path, disk):
    root = draw(disk("180k") / "pictures", count=20)
    arguments = ["--data", "ImageFolder", "--data.root", str(root), "--tracking_uri", ""]
    refused(run_fit(tmp_path, *arguments), "pictures.npz", "No space left on device")
    assert [file.suffix for file in (root / ".cache").iterdir()] == [".lock"]
    disk("20m")
    went_well(run_fit(tmp_path, *arguments))


@pytest.mark.faults
def test_disk_that_is_full_for_a_new_store(tmp_path, disk):
    store = disk("200k")
    arguments = [*SYNTHETIC, "--tracking_uri", sqlite_uri(store / "mlflow.db")]
    refused(run_fit(tmp_path, *arguments), "is full")
    assert not (store / "mlflow.db").exists()  # no half of one
    disk("60m")
    went_well(run_fit(tmp_path, *arguments))


@pytest.mark.faults
def test_disk_that_is_full_for_artifacts(tmp_path, disk):
    (tmp_path / "mlruns").symlink_to(disk("100k"))
    arguments = [*SYNTHETIC, "--tracking_uri", sqlite_uri(tmp_path / "mlflow.db")]
    refused(run_fit(tmp_path, *arguments), ".ckpt", "No space left on device")
    assert not list(tmp_path.rglob("*.ckpt.part"))
    disk("60m")
    went_well(run_fit(tmp_path, *arguments))


@pytest.mark.faults
def test_disk_that_is_full_for_checkpoints(tmp_path, disk):
    place = disk("64k")
    arguments = [*SYNTHETIC, "--tracking_uri", "", "--trainer.default_root_dir", str(place)]
    refused(run_fit(tmp_path, *arguments), ".ckpt", "No space left on device")
    assert not [path for path in place.rglob("*") if path.is_file()]
    disk("60m")
    went_well(run_fit(tmp_path, *arguments))


@pytest.mark.faults
def test_files_that_may_not_become_so_large(tmp_path):
    """A limit of the shell's (ulimit -f), for those machines that mount no disk for a test."""
    root = draw(tmp_path / "pictures", count=20)
    cached = ["--data", "ImageFolder", "--data.root", str(root), "--tracking_uri", ""]
    refused(run_fit(tmp_path, *cached, limit=50_000), "pictures.npz", "File too large")
    kept = [*SYNTHETIC, "--tracking_uri", ""]
    refused(run_fit(tmp_path, *kept, limit=50_000), ".ckpt", "File too large")
    assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("*.part"), *tmp_path.rglob("*.npz")]
    went_well(run_fit(tmp_path, *cached))


@pytest.mark.faults
def test_store_that_is_no_database_or_half_of_one(tmp_path):
    database = tmp_path / "mlflow.db"
    arguments = [*SYNTHETIC, "--tracking_uri", sqlite_uri(database)]
    database.write_bytes(b"no database" * 5000)
    refused(run_fit(tmp_path, *arguments), "is not an SQLite database")
    database.unlink()
    went_well(run_fit(tmp_path, *arguments))
    sound = database.read_bytes()
    database.write_bytes(sound[: len(sound) // 2])
    refused(run_fit(tmp_path, *arguments), "is damaged")
    database.write_bytes(sound)
    went_well(run_fit(tmp_path, *arguments))
