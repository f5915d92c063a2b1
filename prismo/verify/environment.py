"""The machine and the packages, for the page."""

from __future__ import annotations

import os
import platform

import torch

import prismo
from prismo.eval.versions import gpu_driver
from prismo.util.extras import package_version
from prismo.util.git import git_commit

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")


def environment() -> list[str]:
    """Lines such as "torch 2.11.0"."""
    commit = git_commit()
    names = [
        f"prismo {prismo.__version__}{f' ({commit[:12]})' if commit else ''}",
        f"Python {platform.python_version()}",
    ]
    for package in _PACKAGES:
        version = package_version(package)
        names.append(f"{package} {version}" if version else f"no {package}")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        machine += f", {', '.join(gpus)}, CUDA {torch.version.cuda}, driver {gpu_driver()}"
    else:
        machine += ", no CUDA device"
    return [*names, machine]
