"""Is there room for a model, and how much did it take."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from prismo.verify.checks import SkippedError

_GIGABYTE = 1e9
_SPARE = 1.15  # activations, buffers, the file that is being read
_CGROUP = Path("/sys/fs/cgroup")


def in_bytes(count: int) -> str:
    """A size in words."""
    return f"{count / 1e6:,.1f} MB" if count < _GIGABYTE / 10 else f"{count / _GIGABYTE:,.2f} GB"


def check_room(parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `SkippedError` where a model of this size would not fit; Linux would end the process without a word."""
    wanted, free = _SPARE * parameters * dtype.itemsize, free_memory(device)
    if wanted > free:
        raise SkippedError(
            f"needs {wanted / _GIGABYTE:.1f} GB in {str(dtype).removeprefix('torch.')}, {free / _GIGABYTE:.1f} GB are "
            f"free on {device}"
        )


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts what the system would give back from its caches
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = 1024.0 * int(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else free
    try:  # the limit of a container or a batch job; cached files count as used there and are given back
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(cached.get("file", 0)))
    except (OSError, ValueError):  # none, or "max"
        return free


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> str:
    """Largest memory so far, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / _GIGABYTE:.1f} GB on the GPU"
    return f"{1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _GIGABYTE:.1f} GB of host memory"
