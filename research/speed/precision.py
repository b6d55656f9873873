"""Which precision trains fastest here: bfloat16 where the device computes in it, else float32.

`trainer.precision` left open becomes what `fastest_precision` says, and is recorded as that: a run
that goes on, or is repeated from its `config.yaml`, keeps the precision it had.  bf16-mixed keeps
weights, sums and the loss in float32; only the network's products are rounded to bfloat16.

It follows from the device and the optimizer alone, not from a trial run: the same settings on the
same kind of machine always train the same way.
"""

from typing import Any

import torch


def fastest_precision(accelerator: Any, optimizer: type, bfloat16: bool | None = None) -> str:
    """Lightning's name of the precision: "bf16-mixed" or "32-true".

    accelerator: `trainer.accelerator` as Lightning takes it, "auto" included.
    bfloat16: whether to take it where it may be; None asks the device.
    """
    # A line search compares losses that differ by less than bfloat16 can tell apart.
    if issubclass(optimizer, torch.optim.LBFGS):
        return "32-true"
    bfloat16 = computes_in_bfloat16(accelerator) if bfloat16 is None else bfloat16
    return "bf16-mixed" if bfloat16 else "32-true"


def computes_in_bfloat16(accelerator: Any) -> bool:
    """True where bfloat16 has units of its own; emulated it is slower than float32."""
    name = accelerator if isinstance(accelerator, str) else ""
    if name in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "cpu" or (name == "auto" and not torch.backends.mps.is_available()):
        return processor_computes_in_bfloat16()
    return False  # of others nothing was measured


def processor_computes_in_bfloat16() -> bool:
    """avx512_bf16 or AMX (torch tells of x86 only; on ARM float32 stays).

    torch has no public name for it, so that one which has moved means no.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
