"""A process that outlives a job by a second and ends whatever it left: for children that others start, as torch does.

Our own children ask the kernel to end with their parent (`prismo.util.processes.end_with`). torch's compile workers
look once a minute whether their parent is still there. Whatever a job starts inherits its environment, so a mark in it
finds them all, even one that was started in the job's last millisecond. Run as a script, without the package:
`reaper.py <pid> <mark>`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

_VARIABLE = "PRISMO_JOB"
_GRACE_S = 1.0  # of those that are about to leave by themselves
_ROUNDS = 10
_QUIET = 3  # empty looks in a row: a process that starts another program has no environment for a moment


def end_descendants_of_this_process() -> None:
    """Start a reaper for this process: what it starts from here on is gone a few seconds after it."""
    mark = uuid.uuid4().hex
    subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of a signal to the job's group
    )
    os.environ[_VARIABLE] = mark


def _marked(mark: str) -> list[int]:
    """Processes that were started with this mark in their environment, and those forked from them."""
    wanted = f"{_VARIABLE}={mark}".encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def main(job: int, mark: str) -> None:
    """Wait for the end of `job`; then end what it started and left."""
    with contextlib.suppress(ProcessLookupError):  # it has ended before we started
        select.select([os.pidfd_open(job)], [], [])
    time.sleep(_GRACE_S)
    quiet = 0
    for _ in range(_ROUNDS):  # a dying process may have started another one while we looked
        left = _marked(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if left else quiet + 1
        if quiet == _QUIET:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
