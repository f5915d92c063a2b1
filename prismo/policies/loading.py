"""From flags to a loaded policy, in two steps: everything that can be wrong is checked before the weights are read."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from prismo.embodiment import Embodiment, embodiment_for
from prismo.families import all_families, foreign_flags
from prismo.policies.base import Policy, PolicyFamily
from prismo.policies.checkpoint import Checkpoint, open_checkpoint
from prismo.policies.flags import PolicyFlags
from prismo.policies.settings import statistics_key
from prismo.util.text import did_you_mean

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicySpec:
    """A policy that is ready to be loaded.

    Attributes:
        checkpoint: its files.
        settings: resolved from flags and files.
        robot: what the actions are for.
        device, dtype: of the weights.
    """

    checkpoint: Checkpoint
    settings: Any
    robot: Embodiment
    device: torch.device
    dtype: torch.dtype

    def load(self) -> Policy:
        """Read the weights (minutes for a 7B model on a slow disk)."""
        family: PolicyFamily = self.checkpoint.kind.load("policy")
        return family.load(self.checkpoint, self.settings, self.robot, device=self.device, dtype=self.dtype)

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self.settings)


def prepare_policy(flags: PolicyFlags, robot: Embodiment | None = None, default_key: str | None = None) -> PolicySpec:
    """Find the checkpoint and settle every setting, without loading weights.

    Args:
        flags: the user's.
        robot: the robot that is to be driven; None = the one that the checkpoint was trained on.
        default_key: unnorm_key where the user gives none.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint` and `resolve_settings`.
    """
    flags.validate()
    if not flags.pretrained_checkpoint:
        raise ValueError("--pretrained_checkpoint is missing: give a checkpoint folder or a hub id")
    aliases = [family.alias for family in all_families()]
    if flags.model_family is not None and flags.model_family not in aliases:
        raise ValueError(did_you_mean("model_family", flags.model_family, aliases))
    device = _device(flags.device)
    checkpoint = open_checkpoint(flags.pretrained_checkpoint, flags.base_checkpoint)
    if flags.base_checkpoint and checkpoint.adapter is None:
        raise ValueError(
            f"--base_checkpoint {flags.base_checkpoint}, but the weights in {checkpoint.source} are merged: they need "
            "no base; leave it out"
        )
    if flags.model_family not in (None, checkpoint.family):
        raise ValueError(f"--model_family {flags.model_family}, but {checkpoint.source} is of {checkpoint.family!r}")
    robot = _robot(robot, checkpoint, flags, default_key)
    if given := foreign_flags(flags, checkpoint.kind):
        raise ValueError(f"{checkpoint.source} is of {checkpoint.kind.title}; leave out {', '.join(given)}")
    family: PolicyFamily = checkpoint.kind.load("policy")
    settings = family.settings(flags, checkpoint, robot, default_key)
    # The published figures are bfloat16 on a GPU; CPUs are slow at it.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return PolicySpec(checkpoint, settings, robot, device, dtype)


def _robot(given: Embodiment | None, checkpoint: Checkpoint, flags: PolicyFlags, key: str | None) -> Embodiment:
    """The robot to drive.

    What it is shown and how its numbers are scaled is the checkpoint's affair, its rate and gripper the caller's.
    """
    trained = checkpoint.record.embodiment
    if given is None or trained is None:
        return trained or given or embodiment_for(statistics_key(flags, checkpoint, key))
    found, expected = (
        f"actions of {size} numbers with grippers at {sorted(dim % size for dim in robot.gripper_dims)}"
        for robot in (trained, given)
        for size in (robot.action_dim,)
    )
    if found != expected:
        raise ValueError(
            f"{checkpoint.source} has {found}, but {given.name} takes {expected}: it was trained for another robot, "
            f"{trained.name}"
        )
    if trained.control_hz != given.control_hz:
        _LOG.warning(
            "%s was trained on actions for %g Hz, which %s executes at %g Hz",
            checkpoint.source, trained.control_hz, given.name, given.control_hz,
        )  # fmt: skip
    cameras, states = trained.cameras or given.cameras, trained.states or given.states
    return replace(given, normalization=trained.normalization, cameras=cameras, states=states)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name}, but torch finds {count or 'no'} GPU{'' if count == 1 else 's'} here")
    return device
