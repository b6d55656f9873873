"""Out of memory, said in all the ways there are, and met for real on a CPU with little of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from research.building import faults_of
from research.command import exit_code_of
from research.faults import memory
from research.faults.memory import OutOfMemory, Shortage, shortage_in, smaller, told, told_plainly

ROOT = Path(__file__).parents[1]

CPU = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
WINDOWS = (
    "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried "
    "to allocate 8589934592 bytes."
)
CUDA = (
    "CUDA out of memory. Tried to allocate 8.00 GiB. GPU 1 has a total capacity of 23.69 GiB of "
    "which 3.12 GiB is free. Including non-PyTorch memory, this process has 20.50 GiB memory in "
    "use. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF."
)
MPS = (
    "MPS backend out of memory (MPS allocated: 8.11 GB, other allocations: 384.00 KB, max allowed: "
    "9.07 GB). Tried to allocate 8.00 GiB on private pool."
)
EIGHT = 8 * 2**30


@pytest.mark.parametrize(
    ("error", "place", "wanted"),
    [
        (MemoryError(), "this machine", None),
        (RuntimeError(CPU), "this machine", EIGHT),
        (RuntimeError(WINDOWS), "this machine", EIGHT),
        (RuntimeError("std::bad_alloc"), "this machine", None),
        (torch.OutOfMemoryError(CUDA), "GPU 1", EIGHT),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), "the GPU", None),
        (RuntimeError(MPS), "the GPU (mps)", EIGHT),
    ],
    ids=lambda value: str(value)[:30],
)
def test_every_way_to_say_it_is_known(error, place, wanted):
    found = shortage_in(error)
    assert found is not None
    assert (found.place, found.wanted) == (place, wanted)


def test_it_is_known_behind_another_error():
    try:
        try:
            raise RuntimeError(CPU)
        except RuntimeError as error:
            raise ValueError("torchvision.models.resnet18 cannot be had") from error
    except ValueError as error:
        found = shortage_in(error)
    assert found == Shortage("this machine", "cpu", EIGHT)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory"), KeyError(1)],
)
def test_other_errors_are_not_touched(error):
    assert shortage_in(error) is None
    with pytest.raises(type(error)) as caught, told_plainly():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("batch", [2, 3, 7, 8, 15, 16, 17, 100, 512, 1000, 99_999])
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("most", [None, 1, 5, 8, 60, 10**9])
def test_the_batch_to_try_is_smaller_and_a_step_learns_from_no_more_than_before(
    batch, accumulated, most
):
    found, pieces = smaller(batch, accumulated, most)
    assert 1 <= found <= max(batch // 2, 1)
    assert most is None or found <= most
    is_same_step = found * pieces == batch * accumulated
    assert is_same_step or (batch * accumulated > found * pieces and (found < 8 or found % 8 == 0))
    if batch % 16 == 0 and most is None:
        assert (found, pieces) == (batch // 2, 2 * accumulated)
    if batch == 512 and most == 60:
        assert (found, pieces) == (32, 16 * accumulated)


def test_a_batch_of_one_has_no_smaller_one():
    assert smaller(1, 1, None) is None
    assert smaller(512, 1, 0) is None


def test_flags_to_try_are_told(small):
    configuration = small("--data.batch_size", "512", "--trainer.accumulate_grad_batches", "2")
    said = told(Shortage("GPU 0", "cuda", None), configuration)
    assert "The memory of GPU 0 is full, with batches of 512." in said
    assert "--data.batch_size 256 --trainer.accumulate_grad_batches 4" in said
    assert "the same 1024 pictures" in said
    assert "bf16-mixed" in said
    assert "--trainer.accelerator cpu" in said
    scored = told(Shortage("GPU 0", "cuda", None), configuration, learns=False)
    assert "--data.batch_size 256;" in scored
    assert "accumulate" not in scored


def test_what_is_asked_for_at_once_shortens_the_batch_further(small, monkeypatch):
    """Eight times what there is were asked for by 512 pictures: at most 64 have room."""
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**30)
    said = told(Shortage("this machine", "cpu", 8 * 2**30), small("--data.batch_size", "512"))
    assert "8.0 GiB more were asked for" in said
    assert "--data.batch_size 64 --trainer.accumulate_grad_batches 8" in said


def test_on_a_gpu_what_the_network_holds_is_no_pictures(small, monkeypatch):
    """10 GiB room; 16 were held and 4 more asked for by 512 pictures: half of them have room."""
    monkeypatch.setattr(memory, "cuda_bytes", lambda network: (10 * 2**30, 16 * 2**30))
    configuration = small("--data.batch_size", "512")
    assert memory.most_that_fits(Shortage("GPU 0", "cuda", 4 * 2**30), 512) == 256
    monkeypatch.setattr(memory, "cuda_bytes", lambda network: (-1, 16 * 2**30))
    said = told(Shortage("GPU 0", "cuda", 4 * 2**30), configuration)
    assert "What is there beside the pictures of a batch is too much already" in said
    assert "--data.batch_size" not in said


def test_batch_of_one_and_lbfgs_are_told_other_ways(small):
    one = told(Shortage("GPU 0", "cuda", None), small("--data.batch_size", "1"))
    assert "--data.batch_size" not in one
    assert "smaller --model.network" in one
    arguments = ("--optimizer", "LBFGS", "--data.batch_size", "64")
    whole = told(Shortage("GPU 0", "cuda", None), small(*arguments))
    assert "--data.batch_size 32." in whole
    assert "accumulate_grad_batches" not in whole


def test_half_precision_is_not_advised_to_who_has_it(small):
    said = told(Shortage("GPU 0", "cuda", None), small("--trainer.precision", "bf16-mixed"))
    assert "bf16" not in said


@pytest.mark.parametrize("key", ["data", "model.network"])
def test_what_cannot_be_built_for_want_of_memory_is_told_by_its_setting(key):
    told_ = f"{key}: this does not fit into the memory of this machine"
    with pytest.raises(OutOfMemory, match=told_), faults_of(key):
        raise MemoryError
    with pytest.raises(OutOfMemory, match=r"8\.0 GiB more"), faults_of(key):
        raise RuntimeError(CPU)


def test_it_ends_a_command_with_exit_code_1_and_no_traceback(capsys):
    def work() -> int:
        raise RuntimeError(CPU)

    assert exit_code_of(work) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: The memory of this machine is full (8.0 GiB more were asked for")
    assert len(said.splitlines()) == 1


CHILD = """
import resource, sys
import psutil
from lightning.pytorch import Callback
from research.command import exit_code_of
from research.configuration.schema import resolve
from research.faults.memory import told_plainly
from research.training import fit

class LittleMemory(Callback):
    "From here on there are 100 MB more than what is taken already."
    def on_train_start(self, trainer, pl_module):
        limit = psutil.Process().memory_info().vms + 100_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def work():
    configuration = resolve(sys.argv[1:])
    with told_plainly(configuration):
        fit(configuration, callbacks=[LittleMemory()])
    return 0

sys.exit(exit_code_of(work))
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_a_batch_that_is_too_large_for_the_machine_is_told_with_one_to_try(tmp_path):
    """For real: a process that may have 100 MB more, and a batch whose first layer takes 500."""
    arguments = [
        *("--data", "Synthetic", "--data.num_train", "8000", "--data.batch_size", "4096"),
        *("--data.num_test", "100", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--tracking_uri", ""),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        timeout=300,
    )
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "The memory of this machine is full" in line
    tried = int(line.partition("--data.batch_size ")[2].split()[0])
    assert 1 <= tried <= 2048
    assert f"--trainer.accumulate_grad_batches {4096 // tried}:" in line
    assert "the same 4096 pictures" in line
