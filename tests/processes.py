"""Finding the processes of a job, wherever they are: by a variable that all of them inherit."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

MARK = "PRISMO_TEST_JOB"


def members(mark: str) -> dict[int, str]:
    """Living processes that were started with this mark in their environment, by id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        except OSError:  # it ended while we looked
            continue
    return found


def members_once(count: int, mark: str, seconds: float = 30) -> dict[int, str]:
    """Members as soon as there are so many: a process that is just starting its program shows no environment yet."""
    deadline = time.monotonic() + seconds
    while len(found := members(mark)) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def left_after(seconds: float, mark: str) -> dict[int, str]:
    """Members that are still there after `seconds`; looks earlier, too."""
    deadline = time.monotonic() + seconds
    while (left := members(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def ended(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process ends within `seconds`."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
