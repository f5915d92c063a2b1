"""A process that outlives a job by a second and ends whatever it left: for children that others start, as torch does.

Our own children ask the kernel to end with their parent (`prismo.util.processes.end_with`). torch's compile workers
look once a minute whether their parent is still there. Run as a script, without the package: `reaper.py <pid>`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PERIOD_S = 0.5
_GRACE_S = 1.0  # of those that are about to leave by themselves


def end_descendants_of_this_process() -> None:
    """Start a reaper for this process: all its children, and theirs, are gone a few seconds after it."""
    subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of a signal to the job's group
    )


def _descendants(pid: int) -> dict[int, str]:
    """Children of a process and theirs: id -> time of start, which tells a process from a later one of the same id."""
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for file in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                children = [int(child) for child in file.read_text().split()]
            except OSError:  # a thread or process that ended meanwhile
                continue
            for child in children:
                if child not in found and child != os.getpid():
                    found[child] = _started(child)
                    waiting.append(child)
    return found


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def main(job: int) -> None:
    """Remember the descendants of `job` until it ends; then end those that are left."""
    try:
        handle = os.pidfd_open(job)
    except ProcessLookupError:
        return
    known: dict[int, str] = {}
    while not select.select([handle], [], [], _PERIOD_S)[0]:
        known |= _descendants(job)
    time.sleep(_GRACE_S)
    for pid, started in list(known.items()):
        if started and _started(pid) == started:
            for each in (*_descendants(pid), pid):
                try:
                    os.kill(each, signal.SIGKILL)
                except ProcessLookupError:
                    continue


if __name__ == "__main__":
    main(int(sys.argv[1]))
