"""What a result depends on besides policy and seed: packages, renderer, GPU, driver, commit. Goes into results.json."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import torch

import prismo
from prismo.sim.interface import SimInfo
from prismo.util.extras import package_version
from prismo.util.git import git_commit

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy")
_NOT_OF_EPISODE = ("python", "platform", "gl", "assets", "cuda", "gpu", "gpu_driver")


def collect_versions(simulator: SimInfo) -> dict[str, Any]:
    """Versions as JSON values; None where something is not there."""
    return {
        "prismo": prismo.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: package_version(name) for name in _PACKAGES},
        **simulator.versions,
        "gl": simulator.gl,
        "renderer": simulator.renderer,
        "assets": simulator.assets,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_driver": gpu_driver(),
    }


def episode_versions(versions: Mapping[str, Any]) -> dict[str, str | None]:
    """Those of `collect_versions` that may change what happens in an episode; every episode's line holds them."""
    return {name: version for name, version in versions.items() if name not in _NOT_OF_EPISODE}


def mixed_versions(episodes: Iterable[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """By name: all versions with which the episodes were played, where these are several."""
    found: dict[str, list[str | None]] = {}
    for versions in episodes:
        for name, version in episode_versions(versions).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: values for name, values in found.items() if len(values) > 1}


def changed_versions(episodes: Iterable[Mapping[str, Any]], now: Mapping[str, Any]) -> str:
    """What has changed since the episodes were played, in words; empty where nothing has."""
    mixed = mixed_versions([*episodes, episode_versions(now)])
    former = {name: [str(value) for value in values if value != now.get(name)] for name, values in mixed.items()}
    return "; ".join(f"{name} {', '.join(values)}, now {now.get(name)}" for name, values in former.items())


def gpu_driver() -> str | None:
    """Version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
