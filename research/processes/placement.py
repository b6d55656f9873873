"""How many processes train, where, and what each of them does: Lightning's flags made to fit.

`trainer.devices`, `trainer.num_nodes` and what torchrun or SLURM have started must say the same;
what is left open is filled in from what was started, and what contradicts it is refused, because
Lightning would wait for processes that nobody starts.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from research.configuration.compose import ConfigurationError
from research.processes.launch import launch

BY_HAND = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def placed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's arguments with `devices`, `num_nodes` and `plugins` as the start was.

    ConfigurationError where several nodes were asked for and nothing says which one this is.
    """
    found = launch()
    filled = dict(settings)
    if found is not None:
        if found.num_nodes * found.local_world_size != found.world_size:
            raise ConfigurationError(
                f"{found.by} started {found.world_size} processes on {found.num_nodes} nodes; each "
                "node needs as many as the others. Ask for them with --ntasks-per-node."
            )
        if found.by == "SLURM":  # Lightning insists on it, as a plain number
            os.environ["SLURM_NTASKS_PER_NODE"] = str(found.local_world_size)
            if not {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys():
                raise ConfigurationError(
                    f"SLURM gave this job {found.world_size} tasks, and the command was started "
                    "once, not by srun. Put srun in front of it."
                )
            SLURMEnvironment(auto_requeue=False).main_address  # noqa: B018 (sets MASTER_ADDR)
        if settings["devices"] in ("auto", -1, "-1"):
            filled["devices"] = found.local_world_size
        if settings["num_nodes"] == 1:
            filled["num_nodes"] = found.num_nodes
        if found.num_nodes > 1:
            name_interface()
        return filled
    nodes = settings["num_nodes"]
    if SLURMEnvironment.detect():  # a single task, which starts the others itself
        if nodes > 1:
            raise ConfigurationError(
                f"trainer.num_nodes is {nodes}, and SLURM runs one task of this job. Put srun in "
                "front of the command, and give the job --nodes and --ntasks-per-node."
            )
        plugins = settings["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        filled["plugins"] = [*plugins, LightningEnvironment()]
    missing = [name for name in BY_HAND if name not in os.environ]
    if nodes > 1 and missing:
        raise ConfigurationError(
            f"trainer.num_nodes is {nodes}, and {', '.join(missing)} of the environment is not "
            "set, so the nodes cannot find each other. Start the command by srun or torchrun, or "
            "on each node with NODE_RANK=0, 1, ... and the MASTER_ADDR and a free MASTER_PORT of "
            "the first."
        )
    if nodes > 1 and not 0 <= int(os.environ["NODE_RANK"]) < nodes:
        raise ConfigurationError(
            f"NODE_RANK is {os.environ['NODE_RANK']}; it must be from 0 to {nodes - 1}, for "
            f"trainer.num_nodes is {nodes}."
        )
    if nodes > 1:
        name_interface()
    return filled


def name_interface() -> None:
    """Let gloo use the network that leads to the first node; a GLOO_SOCKET_IFNAME is respected.

    By itself it takes the address of this machine's own name, which on many is the loopback's, and
    the nodes never meet.  ConfigurationError for an address that is none: torch would try it for
    half an hour.
    """
    address = os.environ.get("MASTER_ADDR")
    if address is None:
        return
    try:
        family, _, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise ConfigurationError(
            f"MASTER_ADDR is {address}, and there is no such machine ({error.strerror}); it must "
            "be the name or address of the first node."
        ) from None
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing
            own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
        is_address = address.replace(".", "").isdecimal() or ":" in address
        if own.is_loopback and not is_address:  # Debian's /etc/hosts says so of a machine's name
            own = only_address_beside_loopback() or own
        for name, addresses in psutil.net_if_addrs().items():
            if any(each.address.partition("%")[0] == str(own) for each in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name


def only_address_beside_loopback() -> Any:
    """The address that other machines know this one by, None if there are several or none."""
    stats = psutil.net_if_stats()
    found = [
        ipaddress.ip_address(each.address)
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family == socket.AF_INET and stats[name].isup
    ]
    found = [each for each in found if not each.is_loopback]
    return found[0] if len(found) == 1 else None


def check_placed(trainer: Trainer) -> None:
    """ConfigurationError if more or fewer processes were asked for than were started."""
    found = launch()
    if found is None:
        return
    asked, started = trainer.num_devices * trainer.num_nodes, found.world_size
    if (trainer.num_devices, trainer.num_nodes) != (found.local_world_size, found.num_nodes):
        raise ConfigurationError(
            f"trainer.devices and trainer.num_nodes ask for {trainer.num_devices} x "
            f"{trainer.num_nodes} = {asked} processes, and {found.by} started "
            f"{found.local_world_size} x {found.num_nodes} = {started}. Leave both flags out, or "
            "start as many."
        )


def described(trainer: Trainer, batch_size: int) -> str:
    """One line: how many processes, on what, and how many pictures of a batch each gets."""
    count, nodes = trainer.world_size, trainer.num_nodes
    where = trainer.strategy.root_device.type + (f" on {nodes} nodes" if nodes > 1 else "")
    least, rest = divmod(batch_size, count)
    share = f"{least}" if rest == 0 else f"{least} or {least + 1}"
    strategy = type(trainer.strategy).__name__.removesuffix("Strategy")
    told = (
        f"{count} processes ({where}, {strategy}), {share} pictures of each batch of {batch_size}"
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if nodes > 1 and environment is not None:  # until all are there nothing else is to be seen
        told += f"; waiting for all at {environment.main_address}:{environment.main_port}"
    return told


def tags_of(trainer: Trainer, batch_size: int) -> dict[str, str]:
    """What a run's tags say of its processes; the parameters hold what was asked for."""
    return {
        "world_size": str(trainer.world_size),
        "num_nodes": str(trainer.num_nodes),
        "strategy": type(trainer.strategy).__name__,
        "batch_size_per_device": f"{batch_size / trainer.world_size:g}",
    }


class Agreement(Callback):
    """Refuses to begin with processes that would go on from different places.

    Each has looked for itself, perhaps in a store of its own machine; they would wait for each
    other for ever.  `place` names the run and the step, "" is a new run.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or stage != "fit":
            return
        places: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(places, self.place)
        others = [rank for rank, place in enumerate(places) if place != places[0]]
        if others:
            raise ConfigurationError(
                f"resume: process 0 begins {places[0] or 'a new run'}, and process {others[0]} "
                f"{places[others[0]] or 'a new run'} (run and step). Do all nodes see the same "
                "store (tracking_uri)?"
            )
