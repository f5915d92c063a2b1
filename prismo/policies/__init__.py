"""Policies: from a checkpoint folder or hub id to actions, for evaluation and serving."""

from prismo.policies.base import Policy, PolicyInput, environment_actions
from prismo.policies.checkpoint import Checkpoint, checkpoint_hash, open_checkpoint
from prismo.policies.loading import PolicySpec, prepare_policy
from prismo.policies.openvla import OpenVLAPolicy, load_openvla_policy
from prismo.policies.settings import PolicyFlags, PolicySettings, resolve_settings
from prismo.policies.spatialvla import SpatialVLAPolicy, SpatialVLASettings, load_spatialvla_policy

__all__ = [
    "Checkpoint",
    "OpenVLAPolicy",
    "Policy",
    "PolicyFlags",
    "PolicyInput",
    "PolicySettings",
    "PolicySpec",
    "SpatialVLAPolicy",
    "SpatialVLASettings",
    "checkpoint_hash",
    "environment_actions",
    "load_openvla_policy",
    "load_spatialvla_policy",
    "open_checkpoint",
    "prepare_policy",
    "resolve_settings",
]
