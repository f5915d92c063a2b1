"""What commands share: how they start and end, and errors that a user can act on instead of tracebacks."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from prismo.util.flags import parse_flags
from prismo.util.processes import sigterm_as_exit

C = TypeVar("C")

_PACKAGE = Path(__file__).resolve().parents[1]
_LOG = logging.getLogger(__name__)


class BrokenOffError(RuntimeError):
    """Nothing was wrong with what the user typed, but the work could not be finished."""


def run_command(
    run: Callable[[C], int | None], kind: type[C], arguments: Sequence[str] | None = None, first: str | None = None
) -> int:
    """Parse flags and call `run`, whose module's docstring heads the help.

    Args:
        arguments: None takes those of the process.
        first: flag whose value may stand first, without the flag.

    Returns:
        Exit code: that of `run` (None is 0), 1 after a BrokenOffError, 2 after another error, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if first is not None and words and not words[0].startswith("-"):
        words.insert(0, f"--{first}")
    set_up_logging()
    with sigterm_as_exit():
        try:
            return run(parse_flags(kind, words, sys.modules[run.__module__].__doc__)) or 0
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            log_error(error)
            return 1 if isinstance(error, BrokenOffError) else 2


def parse_or_exit(kind: type[C], about: str | None) -> C:
    """Flags of a script of one file, which parses them before its imports that take seconds."""
    set_up_logging()
    try:
        return parse_flags(kind, None, about)
    except ValueError as error:
        log_error(error)
        raise SystemExit(2) from None


def set_up_logging(level: int = logging.INFO) -> None:
    """Messages of a command on stderr, without a line for every request to the hub."""
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    for client in ("httpx", "httpx2"):  # of older and newer hub clients
        logging.getLogger(client).setLevel(logging.WARNING)


def log_error(error: Exception) -> None:
    """Log the error that ends a command: one sentence if our code raised it on purpose or a file is the cause.

    Anything else is a bug, and without its traceback the finder would search for hours.
    """
    place = traceback.extract_tb(error.__traceback__)[-1]
    on_purpose = _PACKAGE in Path(place.filename).resolve().parents and (place.line or "").startswith("raise ")
    _LOG.error("%s", error, exc_info=None if on_purpose or isinstance(error, OSError) else error)
