"""FSDP2: weights, gradients and AdamW's moments of a fully fine-tuned model spread over all processes.

`prismo.training.spatialvla_objective` shards its objective; the optimizer and the checkpoints see either kind of
parameter through `local`, `gather` and `scatter`, which are the identity for a parameter that is not sharded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from prismo.training.distributed import World
from prismo.training.objective import Losses


def check_torch() -> None:
    """Whether this torch can leave frozen weights whole.

    Raises:
        ValueError: it is older than 2.7.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(
            f"--use_lora False on several GPUs needs torch 2.7 or newer, found {torch.__version__}: upgrade torch, "
            "train adapters, or use one GPU"
        )


def shard(objective: nn.Module, blocks: Iterable[nn.Module], world: World, precision: torch.dtype) -> None:
    """Spread the trained weights of `objective` over all processes, in place; frozen ones stay whole everywhere.

    Args:
        objective: with fp32 trained weights, equal on all processes.
        blocks: modules inside it whose weights are collected, used and dropped together. What is in none of them is
            collected once per update.
        precision: of computation and of the collected weights. Gradients are reduced in fp32.
    """
    if Losses not in pytree.SUPPORTED_NODES:
        # FSDP2 looks for tensors with gradients in what the module returns, and sees only registered containers.
        pytree.register_pytree_node(Losses, _flatten_losses, lambda values, _: Losses(*values))
    frozen = {parameter for parameter in objective.parameters() if not parameter.requires_grad}
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        if any(parameter.requires_grad for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=frozen)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on this module."""
    return isinstance(module, FSDPModule)


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """The whole tensor on every process. All of them must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole tensor of which every process holds `part`, laid out like `parameter`. All processes must call it."""
    if not isinstance(parameter, DTensor) or part.ndim == 0:  # AdamW's update counts are the same everywhere
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


def scatter(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor that all processes hold, laid out like `parameter`, on its device."""
    value = value.to(parameter.device, torch.float32, copy=True)
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local().clone()


def _flatten_losses(losses: Losses) -> tuple[list[object], None]:
    return [losses.total, losses.metrics, losses.actions, losses.align_map], None
