"""SIGTERM and SIGINT as a wish to stop: the running update is finished and saved before the process ends."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType, TracebackType

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 2


class StopSignals:
    """Context in which a SIGTERM or SIGINT sets `requested`.

    Launchers pass on a signal that every process has already got from the terminal or the cluster, so a second one
    means nothing; only a later Ctrl-C ends the process at once (KeyboardInterrupt).
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._owner = os.getpid()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a data worker that inherited the handler
            return
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
            _LOG.warning("%s: finishing this update, then saving", signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._first > _ECHO_SECONDS:
            raise KeyboardInterrupt
