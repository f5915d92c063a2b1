"""`log.txt` of a run: every message of the main process, also those from before its folder was known."""

from __future__ import annotations

import contextlib
import logging
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType

LOG = "log.txt"
_ENOUGH = 10_000  # messages that are kept until the file is known
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class RunLog:
    """Context that collects messages; `open` writes them, and all later ones, behind what the file holds already.

    The error that ends the context is written with its traceback, for whoever finds the run the next morning.
    """

    def __init__(self) -> None:
        self._kept = MemoryHandler(_ENOUGH, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._file: _Quiet | None = None

    def __enter__(self) -> RunLog:
        logging.getLogger().addHandler(self._kept)
        return self

    def open(self, folder: Path) -> None:
        """Write into the folder of a run from here on."""
        self._file = _Quiet(folder / LOG, encoding="utf-8")
        self._file.setFormatter(logging.Formatter(_FORMAT))
        self._kept.setTarget(self._file)
        self._kept.flush()
        logging.getLogger().removeHandler(self._kept)
        logging.getLogger().addHandler(self._file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        logging.getLogger().removeHandler(self._kept)
        if self._file is None:
            return
        logging.getLogger().removeHandler(self._file)
        if error is not None and kind is not None:
            record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "ended by", (), (kind, error, at))
            self._file.handle(record)
        self._file.close()


class _Quiet(logging.FileHandler):
    """A full disk must not fill the terminal with an error per message; whatever matters is said elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()
