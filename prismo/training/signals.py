"""SIGTERM and SIGINT as a wish to stop: the running update is finished and saved before the process ends."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType, TracebackType

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context in which the first SIGTERM or SIGINT sets `requested`; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._owner = os.getpid()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Data workers inherit this handler. Ctrl-C reaches them, too, and they must live until the update is done.
        if os.getpid() != self._owner:
            return
        self.requested = True
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        _LOG.warning("%s: finishing this update, then saving; once more to stop at once", signal.Signals(number).name)
