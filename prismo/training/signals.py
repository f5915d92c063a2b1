"""SIGTERM and SIGINT as a wish to stop: the running update is finished and saved before the process ends."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

from torch import Tensor
from torch.utils.data import get_worker_info

from prismo.data.dataset import Sample

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 2


class Undisturbed:
    """A collate function whose data worker ignores SIGTERM and SIGINT from its first batch on.

    Terminals and clusters send them to every process of a job; a worker that dies of it takes the update along that the
    training process is about to finish. Workers end with their training process anyway.
    """

    def __init__(self, collate: Callable[[Sequence[Sample]], dict[str, Tensor]]) -> None:
        self.collate = collate
        self._ready = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        if not self._ready and get_worker_info() is not None:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self._ready = True
        return self.collate(samples)


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
