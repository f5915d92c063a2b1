"""How processes end: none outlives its parent, whatever it waits for, and SIGTERM leaves no half-written folders."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1


@contextmanager
def sigterm_as_exit() -> Generator[None]:
    """Context of a command in which SIGTERM is SystemExit(143): children are ended, temporary folders removed.

    By default the process would be gone at once and leave these. A second SIGTERM means nothing: launchers pass on one
    that every process of a job has already got.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data worker in the instant before it sets its own
            return
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    owner = os.getpid()
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_launcher() -> None:
    """As a process of torchrun: get SIGTERM when the launcher dies, which would leave this one without anybody."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_death_of(os.getppid(), signal.SIGTERM)


def end_with(parent: int, *, by_kernel: bool = True) -> None:
    """Kill this process as soon as its parent is gone.

    The kernel does it at once, also where this process hangs or is stopped. It counts the death of the *thread* that
    started the process, so a child of a short-lived thread leaves it to a thread of its own (`by_kernel=False`).

    Args:
        parent: process id of the parent, which that told its child: it may be dead by now.
    """
    if by_kernel and signal_at_death_of(parent, signal.SIGKILL):
        return
    threading.Thread(target=_wait_for_end, args=(parent,), daemon=True, name="ends with its parent").start()


def signal_at_death_of(parent: int, number: signal.Signals) -> bool:
    """Ask the kernel for a signal when the parent dies, sent at once if it is dead; False where it cannot."""
    try:
        if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
            return False
    except (AttributeError, OSError):  # not Linux
        return False
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
    return True


def _wait_for_end(parent: int) -> None:
    try:
        handles = [os.pidfd_open(parent)]
    except (AttributeError, OSError):  # already gone, or a system without: looked for below
        handles = []
    while os.getppid() == parent:
        select.select(handles, [], [], 1.0)
    os.kill(os.getpid(), signal.SIGKILL)
