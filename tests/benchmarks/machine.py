"""What a figure holds for: the machine, what runs on it, the pictures."""

import os
import platform
from dataclasses import dataclass
from datetime import datetime

import lightning
import torch

from research.speed.precision import processor_computes_in_bfloat16
from research.tracking.environment import cpu_model


@dataclass(frozen=True)
class Machine:
    time: str
    processor: str
    cores: int
    threads: int  # of torch
    bf16_units: bool
    gpu: str | None
    load: float  # processes that wanted a core in the minute before
    system: str
    python: str
    torch: str
    lightning: str
    data: str

    def described(self) -> str:
        gpu = "no GPU" if self.gpu is None else self.gpu
        units = "bf16 units" if self.bf16_units else "no bf16 units"
        return (
            f"{self.processor}, {self.cores} cores, {self.threads} threads, {units}; {gpu}; "
            f"load {self.load:.2f} before\n"
            f"Python {self.python}, torch {self.torch}, lightning {self.lightning}; {self.system}; "
            f"{self.time}\npictures: {self.data}"
        )


def this_machine(data: str) -> Machine:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return Machine(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        processor=cpu_model(),
        cores=len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        bf16_units=processor_computes_in_bfloat16(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        load=os.getloadavg()[0],
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        lightning=lightning.__version__,
        data=data,
    )
