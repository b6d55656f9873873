"""CIFAR-10 from a small archive of the published form, and every way in which it can be missing."""

import hashlib
import io
import pickle
import tarfile
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision import datasets

from research.data import CIFAR10, DataError
from research.data.cifar10 import ARCHIVE, FOLDER

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
PER_FILE = 20


@pytest.fixture
def published(monkeypatch) -> dict[str, bytes]:
    """The files of a tiny CIFAR-10 and its archive, with checksums that torchvision believes."""
    generator = np.random.default_rng(0)
    files = {}
    for name in NAMES:
        table = {
            "data": generator.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(PER_FILE)],
        }
        files[f"{FOLDER}/{name}"] = pickle.dumps(table)
    files[f"{FOLDER}/batches.meta"] = pickle.dumps({"label_names": list(CIFAR10.class_names)})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    files[ARCHIVE] = packed.getvalue()
    sums = {
        name.split("/")[-1]: hashlib.md5(content).hexdigest() for name, content in files.items()
    }
    meta = {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in NAMES[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[name, sums[name]] for name in NAMES[5:]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", sums[ARCHIVE])
    return files


@pytest.fixture
def network(monkeypatch):
    """Let every request be answered by a function of the test's; without one there is none."""
    answers = []

    def urlopen(request, *_, **__):
        if not answers:
            raise urllib.error.URLError("Name or service not known")
        return answers[-1](request)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return answers


class Response(io.BytesIO):
    def __init__(self, request, content: bytes, length: int | None = None) -> None:
        super().__init__(content)
        self.url = request.full_url
        self.length = len(content) if length is None else length


def unpack(files: dict[str, bytes], root, *names: str) -> None:
    for name in names or [name for name in files if name != ARCHIVE]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])


def stacked(files: dict[str, bytes], *names: str) -> torch.Tensor:
    data = [pickle.loads(files[f"{FOLDER}/{name}"])["data"] for name in names]
    return torch.from_numpy(np.concatenate(data)).view(-1, 3, 32, 32)


def test_the_official_split_is_read_picture_by_picture(tmp_path, published, network):
    unpack(published, tmp_path)
    data = CIFAR10(root=str(tmp_path), val_fraction=0.0, batch_size=32)
    data.prepare_data()
    data.setup()
    assert torch.equal(data.splits.train.images, stacked(published, *NAMES[:5]))
    assert torch.equal(data.splits.test.images, stacked(published, "test_batch"))
    assert data.splits.train.labels.tolist() == [i % 10 for i in range(PER_FILE)] * 5
    assert data.splits.test.labels.tolist() == [i % 10 for i in range(PER_FILE)]
    assert data.normalization.mean == (0.4914, 0.4822, 0.4465)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (25, 3, 32, 32) and labels.shape == (25,)


def test_settings_are_known_without_any_file(tmp_path):
    data = CIFAR10(root=str(tmp_path / "nowhere"))
    assert (data.num_classes, data.image_size, data.class_names[3]) == (10, 32, "cat")
    assert not (tmp_path / "nowhere").exists()


def test_an_archive_put_there_is_unpacked_without_network(tmp_path, published, network):
    unpack(published, tmp_path, ARCHIVE)
    data = CIFAR10(root=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert len(data.splits.test) == PER_FILE
    assert sorted(path.name for path in tmp_path.iterdir()) == [FOLDER, ARCHIVE]


def test_it_is_downloaded_once_when_several_runs_start_together(tmp_path, published, network):
    downloads = []
    together = threading.Barrier(4)

    def answer(request):
        if not request.has_header("Method"):  # torchvision's question where the file is
            downloads.append(request.full_url)
        return Response(request, published[ARCHIVE])

    network.append(answer)

    def start(_):
        data = CIFAR10(root=str(tmp_path / "data"))
        together.wait()
        data.prepare_data()
        data.setup()
        return len(data.splits.test)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(4))) == [PER_FILE] * 4
    assert downloads == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [FOLDER]


def cut_short(request):
    return Response(request, b"only the beginning", length=10**6)


def breaks(request):
    response = Response(request, b"some bytes")
    response.read = lambda *_: (_ for _ in ()).throw(ConnectionResetError("reset by peer"))
    return response


@pytest.mark.parametrize("answer", [None, cut_short, breaks])
@pytest.mark.parametrize("root_exists", [True, False])
def test_a_failed_download_names_three_ways_on_and_leaves_nothing(
    tmp_path, network, answer, root_exists
):
    network.extend([answer] if answer else [])
    root = tmp_path / "data"
    if root_exists:
        root.mkdir()
    with pytest.raises(DataError) as told:
        CIFAR10(root=str(root)).prepare_data()
    message = str(told.value)
    assert message.startswith(f"data.root is {root}, and CIFAR-10 is not there")
    assert f"put cifar-10-python.tar.gz into {root}" in message
    assert "--data ImageFolder" in message
    assert "python -m research.fit --config experiments/quickstart.yaml" in message
    assert "\n" not in message
    assert root.exists() == root_exists
    assert list(tmp_path.rglob("*")) == ([root] if root_exists else [])


def test_setup_alone_tells_that_nothing_is_there(tmp_path):
    with pytest.raises(DataError, match=r"nothing has been downloaded yet.*Three ways on"):
        CIFAR10(root=str(tmp_path)).setup()


def test_a_damaged_archive_is_named_and_kept(tmp_path, published, network):
    (tmp_path / ARCHIVE).write_bytes(published[ARCHIVE][:-100])
    with pytest.raises(DataError, match=f"{ARCHIVE} is incomplete or damaged.*Remove it"):
        CIFAR10(root=str(tmp_path)).prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_files_are_refused(tmp_path, published, network, damage):
    unpack(published, tmp_path)
    victim = tmp_path / FOLDER / "data_batch_3"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    data = CIFAR10(root=str(tmp_path))
    data.prepare_data()
    with pytest.raises(DataError, match=f"{FOLDER} is incomplete, damaged or not readable"):
        data.setup()


def test_a_root_that_cannot_be_made_is_told_with_the_three_ways(tmp_path, network):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="Three ways on"):
        CIFAR10(root=str(tmp_path / "file" / "data")).prepare_data()
