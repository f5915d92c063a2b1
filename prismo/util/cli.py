"""What commands share: how they start and end, and errors that a user can act on instead of tracebacks."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prismo.util.flags import parse_flags
from prismo.util.processes import sigterm_as_exit

C = TypeVar("C")

_PACKAGE = Path(__file__).resolve().parents[1]
_LOG = logging.getLogger(__name__)


def run_command(main: Callable[[C], None], kind: type[C]) -> int:
    """Run `main` with the flags of the process; returns the exit code: 0, or 2 after an error (see `log_error`)."""
    set_up_logging()
    with sigterm_as_exit():
        try:
            main(parse_flags(kind))
        except Exception as error:
            log_error(error)
            return 2
    return 0


def set_up_logging(level: int = logging.INFO) -> None:
    """Messages of a command on stderr, without a line for every request to the hub."""
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def log_error(error: Exception) -> None:
    """Log the error that ends a command: one sentence if our code raised it on purpose or a file is the cause.

    Anything else is a bug, and without its traceback the finder would search for hours.
    """
    place = traceback.extract_tb(error.__traceback__)[-1]
    on_purpose = _PACKAGE in Path(place.filename).resolve().parents and (place.line or "").startswith("raise ")
    _LOG.error("%s", error, exc_info=None if on_purpose or isinstance(error, OSError) else error)
