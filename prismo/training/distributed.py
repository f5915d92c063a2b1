"""Processes of a run: one alone (plain `python`), or many under torchrun or `accelerate launch`, on GPUs or CPUs.

Every function is a no-op or the identity in a single process, so that no caller asks how it was started.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Rank 0 may merge and write a 7-billion-parameter model while the others wait in their next collective; the default of
# ten minutes kills such runs.
_TIMEOUT = timedelta(hours=2)
_RELEASE_SECONDS = 0.3


@dataclass(frozen=True)
class World:
    """This process among all of the run.

    Attributes:
        rank, size: number of this process and of all.
        device: where this process trains.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one process that writes files and shows the progress bar."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process (on the CPU, so that queued GPU work is not waited for)."""
        if self.size > 1:
            self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in rank order, in every process. For small objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on some process."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over all processes of fp32 scalars on the device; every process must pass the same names."""
        if self.size == 1 or not values:
            return dict(values)
        stacked = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).unbind(), strict=True))

    def same_on_all(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Names of tensors that are not bit for bit those of rank 0 on some process."""
        if self.size == 1:
            return []
        different = []
        for name, value in parameters.items():
            reference = value.detach().clone()
            dist.broadcast(reference, src=0)
            if not torch.equal(reference, value.detach()):
                different.append(name)
        return sorted({name for names in self.gather(different) for name in names})


def start_world(device: str | None = None) -> World:
    """Join the process group that the launcher's environment describes.

    Args:
        device: "cuda" or "cpu"; None takes the GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none, or fewer than processes on this machine.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, local, size = (int(os.environ.get(key) or 0) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    size = max(size, 1)
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {rank} needs GPU {local}, this machine shows {torch.cuda.device_count()}; lower --nproc-per-node "
            "or set --device cpu"
        )
    chosen = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        # Objects (step numbers, file names) travel over gloo, gradients on GPUs over NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=_TIMEOUT)
    world = World(rank, size, chosen)
    _check_communication(world)
    return world


def stop_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        # gloo's threads need the interpreter to release the tensors of the last collective. Where they only get to it
        # while the interpreter shuts down, the process aborts ("terminate called without an active exception").
        time.sleep(_RELEASE_SECONDS)
        dist.destroy_process_group()


def wrap(module: nn.Module, world: World) -> nn.Module:
    """`module` with its gradients averaged over all processes after each backward pass.

    Whatever is trained must be inside and run through the wrapper's forward: only then are its gradients reduced.
    Parameters that never get a gradient must be frozen beforehand; no search for unused ones is made.
    """
    if world.size == 1:
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 renames `broadcast_buffers`; the new name does not exist in torch 2.6.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def _check_communication(world: World) -> None:
    """One small reduction: a broken interconnect shows here and not as a hang in the first step."""
    if world.size == 1:
        return
    total = torch.ones(1, device=world.device)
    dist.all_reduce(total)
    if total.item() != world.size:
        raise RuntimeError(
            f"a test reduction over {world.size} processes gave {total.item()}; check the interconnect "
            "(PCIe machines without NVLink often need NCCL_P2P_LEVEL=NVL or NCCL_P2P_DISABLE=1)"
        )
