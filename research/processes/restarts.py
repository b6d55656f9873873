"""A restart of torchrun's meets its own processes, not the addresses of those that died.

torchrun keeps one store for all attempts of a run (torch 2.15 takes each attempt to have its own,
which was not so where the workers share the store of the rendezvous).  A process of the second
attempt may read there where one of the first listened, and fails to connect to it.  So from the
second attempt on the process group is made here, before Lightning would, under names of that
attempt.
"""

import os

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy

from research.processes.launch import launch


def meet(trainer: Trainer) -> None:
    """Make the process group of an attempt after the first; nothing in all other cases."""
    attempt, found = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), launch()
    strategy = trainer.strategy
    if attempt == "0" or found is None or found.by != "torchrun" or found.world_size == 1:
        return
    if not isinstance(strategy, ParallelStrategy) or torch.distributed.is_initialized():
        return
    device = strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = getattr(strategy, "_timeout", torch.distributed.default_pg_timeout)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, found.world_size, False, timeout)
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(device),
        store=torch.distributed.PrefixStore(f"attempt {attempt}", store),
        rank=found.rank,
        world_size=found.world_size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
