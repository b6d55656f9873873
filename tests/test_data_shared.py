import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from research.data import DataError, ImageData, shared
from research.data.batches import Batches
from research.data.image_folder import ImageFolder
from research.data.normalization import Normalization
from research.data.split import Split, Splits
from research.data.synthetic import Synthetic
from research.processes.launch import HOST_GROUP

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """The only folder to share in, and no group."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.setattr(shared, "find_places", lambda: [folder])
    for name in (HOST_GROUP, "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return folder


class Maker:
    """Makes ten numbers, and counts how often."""

    def __init__(self, fill: int = 7) -> None:
        self.fill, self.times = fill, 0

    def __call__(self) -> shared.Content:
        self.times += 1
        return {"numbers": torch.full((10,), self.fill), "mean": (0.5, 0.25)}


def never() -> shared.Content:
    raise AssertionError("somebody else has made it")


# ---- one process after the other -----------------------------------------------------------------


def test_the_first_makes_it_and_the_others_map_it(place):
    make = Maker()
    first, lease = shared.shared("group", "asked", make)
    second, other_lease = shared.shared("group", "asked", never)
    assert make.times == 1
    for content in (first, second):
        assert content["numbers"].tolist() == [7] * 10
        assert content["mean"] == (0.5, 0.25)
    (file,) = place.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(str(file)[:-3]) == 2  # the maker's bore another name then
    del lease, other_lease


def test_what_one_writes_no_other_sees():
    first, lease = shared.shared("group", "asked", Maker())
    second, other_lease = shared.shared("group", "asked", never)
    first["numbers"].zero_()
    assert second["numbers"].tolist() == [7] * 10
    third, _ = shared.shared("group", "asked", never)
    assert third["numbers"].tolist() == [7] * 10
    del lease, other_lease


def test_the_last_to_leave_removes_the_file(place):
    _, first = shared.shared("group", "asked", Maker())
    _, second = shared.shared("group", "asked", never)
    first.end()
    assert len(list(place.iterdir())) == 1
    second.end()
    assert not list(place.iterdir())
    second.end(all_have_it=True)  # a second time is nothing


def test_a_lease_that_is_forgotten_ends(place):
    _, lease = shared.shared("group", "asked", Maker())
    del lease
    assert not list(place.iterdir())


def test_once_all_have_it_the_name_goes_and_the_content_stays(place):
    first, lease = shared.shared("group", "asked", Maker())
    second, other_lease = shared.shared("group", "asked", never)
    lease.end(all_have_it=True)
    assert not list(place.iterdir())
    # Another round begins before all have ended the first: they leave the new file alone.
    again, new_lease = shared.shared("group", "asked", Maker(9))
    other_lease.end(all_have_it=True)
    assert len(list(place.iterdir())) == 1
    assert first["numbers"].tolist() == second["numbers"].tolist() == [7] * 10
    assert again["numbers"].tolist() == [9] * 10
    del new_lease


def test_groups_and_what_they_ask_for_do_not_mix(monkeypatch, tmp_path):
    named = [("group", "asked"), ("other", "asked"), ("group", "more"), ("groupa", "sked")]
    kept = [shared.shared(*names, Maker(fill)) for fill, names in enumerate(named)]
    monkeypatch.chdir(tmp_path)  # a relative path means another folder here
    kept.append(shared.shared("group", "asked", Maker(4)))
    assert [int(content["numbers"][0]) for content, _ in kept] == [0, 1, 2, 3, 4]


def test_a_copy_of_a_lease_keeps_nothing_and_takes_nothing(place):
    _, lease = shared.shared("group", "asked", Maker())
    for copied in (copy.deepcopy(lease), pickle.loads(pickle.dumps(lease))):
        copied.end(all_have_it=True)
    shared.sweep()
    shared.shared("group", "asked", never)
    assert len(list(place.iterdir())) == 1
    lease.end()


def test_what_the_maker_raises_is_raised_and_the_next_may_try(place):
    def fail():
        raise DataError("data.root is wrong")

    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.root is wrong"):
            shared.shared("group", "asked", fail)
        assert not list(place.iterdir())
    content, _ = shared.shared("group", "asked", Maker())
    assert content["numbers"][0] == 7


def test_leftovers_are_removed_and_nothing_else_is(place):
    name = shared.name_of("killed", "asked")
    for ending in ("lock", "pt", "0123.part"):
        (place / f"{name}.{ending}").write_bytes(b"left")
    others = place / "research-0-results", place / shared.prefix()[:-1], place / "notes.pt"
    for other in others:
        other.write_text("mine")
    _, kept = shared.shared("alive", "asked", Maker())
    _, lease = shared.shared("group", "asked", Maker())
    names = {path.name for path in place.iterdir()}
    held = {f"{shared.name_of(group, 'asked')}.pt" for group in ("alive", "group")}
    assert names == held | {other.name for other in others}
    del kept, lease


def test_a_leftover_of_the_same_name_is_not_believed(place):
    """Process numbers come again, and so do the groups that are named by them."""
    old = place / f"{shared.name_of('group', 'asked')}.pt"
    torch.save({"numbers": torch.zeros(10)}, old)
    content, _ = shared.shared("group", "asked", Maker())
    assert content["numbers"].tolist() == [7] * 10


# ---- where ---------------------------------------------------------------------------------------


def one_byte_free(monkeypatch, *full: Path) -> None:
    usage = shared.shutil.disk_usage

    def disk_usage(path):
        return usage(path)._replace(free=1) if path in full else usage(path)

    monkeypatch.setattr(shared.shutil, "disk_usage", disk_usage)


def test_without_room_in_memory_the_disk_is_taken(place, tmp_path, monkeypatch, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(shared, "find_places", lambda: [place, disk])
    one_byte_free(monkeypatch, place)
    first, lease = shared.shared("group", "asked", Maker())
    second, other_lease = shared.shared("group", "asked", never)
    assert not list(place.iterdir())
    assert len(list(disk.iterdir())) == 1
    assert torch.equal(first["numbers"], second["numbers"])
    lease.end()
    other_lease.end()
    assert not list(disk.iterdir())
    assert not caplog.records


@pytest.mark.parametrize("trouble", ["no room", "no folder", "fails", "no flock"])
def test_without_any_place_each_has_its_own_and_one_says_so(trouble, place, monkeypatch, caplog):
    if trouble == "no room":
        one_byte_free(monkeypatch, place)
    if trouble == "no folder":
        monkeypatch.setattr(shared, "find_places", lambda: [])
    if trouble == "fails":  # as torch does where the disk is full in the middle

        def save(content, file):
            file.write(b"a part")
            raise RuntimeError("unexpected pos")

        monkeypatch.setattr(torch, "save", save)
    if trouble == "no flock":
        monkeypatch.setattr(shared, "fcntl", None)
    make = Maker()
    with caplog.at_level(logging.WARNING):
        for local_rank in ("0", "1"):
            monkeypatch.setenv("LOCAL_RANK", local_rank)
            content, lease = shared.shared("group", "asked", make)
            assert content["numbers"].tolist() == [7] * 10
            lease.end(all_have_it=True)
    assert make.times == 2
    (record,) = caplog.records
    assert "keeps its own copy" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not list(place.iterdir())


@pytest.mark.parametrize("ending", ["lock", "pt"])
def test_a_link_is_not_followed(ending, place, tmp_path):
    target = tmp_path / "target"
    torch.save({"numbers": torch.zeros(10)}, target)
    before = target.read_bytes()
    (place / f"{shared.name_of('group', 'asked')}.{ending}").symlink_to(target)
    content, lease = shared.shared("group", "asked", Maker())
    assert content["numbers"].tolist() == [7] * 10
    assert target.read_bytes() == before
    lease.end()


@pytest.mark.parametrize("ending", ["lock", "pt"])
def test_a_file_of_another_user_is_neither_read_nor_removed(ending, place, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    path = place / f"{shared.name_of('group', 'asked')}.{ending}"
    torch.save({"numbers": torch.zeros(10)}, path)
    monkeypatch.setattr(os, "rename", refused)  # as in a folder with the sticky bit
    content, _ = shared.shared("group", "asked", Maker())
    assert content["numbers"].tolist() == [7] * 10
    assert torch.load(path)["numbers"].tolist() == [0] * 10


def refused(*_):
    raise PermissionError(1, "Operation not permitted")


def test_a_folder_where_others_could_swap_files_is_no_place(tmp_path):
    for mode, is_safe in ((0o700, True), (0o1777, True), (0o777, False), (0o770, False)):
        tmp_path.chmod(mode)
        assert shared.is_safe(tmp_path) == is_safe, oct(mode)
    assert not shared.is_safe(tmp_path / "none")


# ---- the pictures --------------------------------------------------------------------------------


class Counted(Synthetic):
    """Counts how often the pictures are drawn and prepared, in all objects together."""

    reads = 0
    prepared = 0

    def prepare_data(self):
        Counted.prepared += 1

    def read(self):
        Counted.reads += 1
        return super().read()


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(Counted, "reads", 0)
    monkeypatch.setattr(Counted, "prepared", 0)

    def make(**changed):
        settings = {"num_train": 60, "num_test": 20, "image_size": 8, "val_fraction": 0.2}
        return Counted(**settings | changed)

    return make


def parts(data: ImageData) -> list[torch.Tensor]:
    splits = (data.splits.train, data.splits.val, data.splits.test)
    return [tensor for split in splits for tensor in (split.images, split.labels)]


def assert_same(one: ImageData, other: ImageData) -> None:
    assert all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))
    assert one.normalization == other.normalization


def test_a_process_alone_touches_no_file(counted, monkeypatch):
    monkeypatch.setattr(shared, "find_places", never)
    data = counted()
    data.setup()
    next(iter(data.train_dataloader()))
    assert (Counted.reads, Counted.prepared) == (1, 0)
    assert HOST_GROUP not in os.environ


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_shared_pictures_are_those_of_a_process_alone(counted, monkeypatch, val_fraction):
    alone = counted(val_fraction=val_fraction)
    alone.setup()
    monkeypatch.setenv(HOST_GROUP, "a")
    ranks = [counted(val_fraction=val_fraction) for _ in range(3)]
    for data in ranks:
        data.setup("fit")
        data.setup("test")
        assert_same(data, alone)
    assert (Counted.reads, Counted.prepared) == (2, 1)  # alone, and once for the three


def test_torchrun_names_the_group(counted, monkeypatch):
    environment = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ranks = [counted() for _ in range(2)]
    for data in ranks:
        data.setup()
    assert Counted.reads == 1


def test_batches_of_each_rank_are_cut_from_the_shared_memory(counted, monkeypatch):
    monkeypatch.setenv(HOST_GROUP, "a")
    data = counted(horizontal_flip=True)
    data.setup()
    batches = data.train_dataloader()
    assert batches._split.images.data_ptr() == data.splits.train.images.data_ptr()
    rank = Batches(data.splits.train, 8, data.normalization, rank=1, world_size=2)
    assert rank._split is data.splits.train
    assert not data.splits.train.images.is_contiguous()
    assert data.splits.train.pixels.is_contiguous()


def test_each_seed_and_setting_has_its_own(counted, monkeypatch):
    monkeypatch.setenv(HOST_GROUP, "a")
    one, other, small = counted(seed=1), counted(seed=2), counted(num_train=50)
    for data in (one, other, small):
        data.setup()
    assert Counted.reads == 3
    assert not torch.equal(one.splits.val.images, other.splits.val.images)
    assert len(small.splits.train) == 40
    one.seed = 2
    one.setup()
    assert Counted.reads == 3
    assert_same(one, other)


def test_lightnings_first_process_hands_on_what_it_has(counted, monkeypatch, place):
    first = counted(seed=3)
    first.setup()
    private = first.splits.train.images.data_ptr()
    before = [tensor.clone() for tensor in parts(first)]
    monkeypatch.setenv(HOST_GROUP, "x")  # so that it is put back after the test
    monkeypatch.delenv(HOST_GROUP)
    first.share_with_others()
    assert first.splits.train.images.data_ptr() != private
    assert all(torch.equal(a, b) for a, b in zip(parts(first), before, strict=True))
    assert os.environ[HOST_GROUP]
    (file,) = place.iterdir()
    others = [counted(seed=3), counted(seed=3)]
    for data in others:
        data.setup()
        data.share_with_others()  # they start nobody
        assert_same(data, first)
    assert Counted.reads == 1
    assert list(place.iterdir()) == [file]


def test_what_was_changed_after_setup_is_changed_by_each_for_itself(counted, monkeypatch):
    """An evaluation numbers the classes anew, and so will those that it starts."""

    def built():
        data = counted()
        data.setup()
        splits = data.splits
        reversed_ = [Split(s.images, 9 - s.labels) for s in (splits.train, splits.val, splits.test)]
        data.splits = Splits(*reversed_)
        data.normalization = Normalization((0.0, 0.0, 0.0), (2.0, 2.0, 2.0))
        return data

    monkeypatch.setenv(HOST_GROUP, "x")
    monkeypatch.delenv(HOST_GROUP)
    first = built()
    first.share_with_others()
    assert_same(built(), first)

    data = counted(seed=5)
    data.setup()
    data.normalization = first.normalization
    monkeypatch.delenv(HOST_GROUP)
    data.share_with_others()
    assert data.normalization == first.normalization


class Slices(ImageData):
    """As CIFAR10 does: both parts are cut from one array."""

    class_names = ("dark", "light")
    image_size = 8

    def read(self):
        images = torch.zeros(30, 8, 8, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.arange(30) % 2
        return Split(images[:20], labels[:20]), Split(images[20:], labels[20:])


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_nothing_but_the_splits_stays_in_memory(val_fraction):
    data = Slices(val_fraction=val_fraction)
    data.setup()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts(data)}
    assert sum(storages.values()) == 30 * (8 * 8 * 3 + 8)


def test_a_folder_of_pictures_is_listed_and_decoded_once(tmp_path, monkeypatch):
    from PIL import Image

    for split in ("train", "test"):
        for shade, name in enumerate(("a", "b")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8), (100 * shade, number, 0)).save(folder / f"{number}.png")
    decoded = []
    load = ImageFolder._load
    monkeypatch.setattr(ImageFolder, "_load", lambda self: decoded.append(1) or load(self))
    monkeypatch.setenv(HOST_GROUP, "a")
    ranks = [ImageFolder(root=str(tmp_path / "images")) for _ in range(3)]
    for data in ranks:
        data.setup()
        assert_same(data, ranks[0])
    assert len(decoded) == 1
    assert all("_fingerprint" not in vars(data) for data in ranks[1:])


# ---- processes -----------------------------------------------------------------------------------

PROCESSES = """
    import json, multiprocessing, os, signal, sys, time, types
    from pathlib import Path

    import psutil
    import torch

    package = types.ModuleType("research.data")  # its own imports are seconds of Lightning
    package.__path__ = [sys.argv[1] + "/research/data"]
    sys.path.insert(0, sys.argv[1])
    sys.modules["research.data"] = package
    from research.data import shared
    from research.data.split import Split

    place = Path("place")
    place.mkdir()
    shared.find_places = lambda: [place]
    fork = multiprocessing.get_context("fork")
    told = {}
    COUNT, PICTURES = 3, 20_000


    def make():
        with open("made", "a") as file:
            file.write(f"{os.getpid()}\\n")
        generator = torch.Generator().manual_seed(1)
        size = (PICTURES, 32, 32, 3)
        images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        return {"images": images.permute(0, 3, 1, 2), "labels": torch.arange(PICTURES)}


    def digest(content):
        return Split(content["images"], content["labels"]).digest()


    def pss():
        return psutil.Process().memory_full_info().pss


    def rank(number, group, barrier, queue):
        barrier.wait()  # until all are there: they share what they were forked with
        before = pss()
        barrier.wait()
        content, lease = shared.shared(group, "pictures", make)
        found = digest(content)
        barrier.wait()
        grown = pss() - before
        barrier.wait()
        lease.end(all_have_it=True)
        queue.put((found, grown, digest(content)))


    def together(groups):
        barrier, queue = fork.Barrier(len(groups)), fork.Queue()
        pairs = list(enumerate(groups))
        ranks = [fork.Process(target=rank, args=(*pair, barrier, queue)) for pair in pairs]
        for process in ranks:
            process.start()
        answers = [queue.get(timeout=120) for _ in ranks]
        for process in ranks:
            process.join()
        digests = sorted({d for first, _, last in answers for d in (first, last)})
        times = len(Path("made").read_text().split())
        Path("made").unlink()
        grown = sum(grown for _, grown, _ in answers)
        return {"digests": digests, "times": times, "grown": grown, "left": os.listdir(place)}


    told["digest"] = digest(make())
    Path("made").unlink()
    told["shared"] = together(["run"] * COUNT)
    told["two runs"] = together(["one", "other", "one", "other"])
    told["each alone"] = together([f"run {number}" for number in range(COUNT)])

    # ---- a maker that is killed while the others wait for it


    def slow(started):
        def make_slowly():
            started.set()
            time.sleep(600)

        shared.shared("run", "killed", make_slowly)


    def late(queue):
        content, lease = shared.shared("run", "killed", lambda: {"x": torch.ones(3)})
        queue.put((content["x"].tolist(), sorted(os.listdir(place))))
        time.sleep(600)


    started, queue = fork.Event(), fork.Queue()
    maker = fork.Process(target=slow, args=(started,))
    maker.start()
    started.wait()
    waiting = [fork.Process(target=late, args=(queue,)) for _ in range(2)]
    for process in waiting:
        process.start()
    time.sleep(0.3)
    told["waited"] = queue.empty()
    maker.kill()
    told["after maker"] = [queue.get(timeout=60) for _ in waiting]

    # ---- users that are killed

    waiting[0].kill()
    waiting[0].join()
    shared.sweep()
    told["one user"] = len(os.listdir(place))
    waiting[1].kill()
    waiting[1].join()
    told["no user"] = len(os.listdir(place))
    _, lease = shared.shared("next", "pictures", lambda: {"x": torch.zeros(3)})
    told["next run"] = len(os.listdir(place))
    told["its own"] = os.listdir(place) == [shared.name_of("next", "pictures") + ".pt"]

    # ---- the end of a process that never came so far as to say that all have it

    pid = os.fork()
    if pid == 0:
        multiprocessing.process._children.clear()  # these are not its own to wait for
        kept = shared.shared("other", "pictures", lambda: {"x": torch.zeros(3)})
        sys.exit(0)
    os.waitpid(pid, 0)
    told["after exit"] = len(os.listdir(place))
    Path("told.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(textwrap.dedent(PROCESSES))
    command = [sys.executable, str(script), str(ROOT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)
    return json.loads((folder / "told.json").read_text())


SIZE = 20_000 * (32 * 32 * 3 + 8)


def test_processes_have_the_pictures_in_memory_once(told):
    found = told["shared"]
    assert found["times"] == 1
    assert found["digests"] == [told["digest"]]
    assert found["left"] == []
    assert 0.9 * SIZE < found["grown"] < 1.6 * SIZE
    assert told["each alone"]["grown"] > 2.7 * SIZE  # the measure tells copies apart


def test_two_runs_at_the_same_time_have_one_each(told):
    found = told["two runs"]
    assert found["times"] == 2
    assert found["digests"] == [told["digest"]]
    assert found["left"] == []
    assert 1.8 * SIZE < found["grown"] < 2.7 * SIZE


def test_a_maker_that_is_killed_holds_nobody_up(told):
    assert told["waited"]
    assert [numbers for numbers, _ in told["after maker"]] == [[1.0] * 3] * 2
    left = {name for _, names in told["after maker"] for name in names}
    assert len({name for name in left if not name.endswith(".lock")}) == 1


def test_the_next_run_cleans_up_after_users_that_were_killed(told):
    assert told["one user"] == 1
    assert told["no user"] == 1
    assert told["next run"] == 1
    assert told["its own"]


def test_a_process_that_ends_early_leaves_nothing(told):
    assert told["after exit"] == 1  # of the process that still runs
