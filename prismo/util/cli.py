"""What commands share: flags as a dataclass, and errors that a user can act on instead of tracebacks."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import draccus
import yaml

from prismo.util.processes import sigterm_as_exit
from prismo.util.text import did_you_mean

C = TypeVar("C")

_PACKAGE = Path(__file__).resolve().parents[1]
_LOG = logging.getLogger(__name__)


def run_command(main: Callable[[C], None], kind: type[C]) -> int:
    """Run `main` with the flags of the process; returns the exit code: 0, or 2 after an error (see `log_error`)."""
    set_up_logging()
    with sigterm_as_exit():
        try:
            main(parse_flags(kind))
        except (ValueError, OSError) as error:
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


def parse_flags(kind: type[C], arguments: Sequence[str] | None = None) -> C:
    """Read `--flag value` arguments, over those of `--config_path file.yaml` if given.

    Args:
        kind: dataclass of the flags.
        arguments: None takes those of the process.

    Raises:
        ValueError: an unknown flag or key (with the nearest one), a missing one, or a value of another type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    description: Any = kind
    known = [field.name for field in fields(description)]
    for argument in arguments:
        name = argument.removeprefix("--").split("=", 1)[0]
        if argument.startswith("--") and name not in (*known, "config_path", "help"):
            raise ValueError(did_you_mean("flag", f"--{name}", [f"--{flag}" for flag in known]))
    given = [argument.removeprefix("--").split("=", 1)[0] for argument in arguments if argument.startswith("--")]
    given += _yaml_keys(arguments, known)
    required = [field.name for field in fields(description) if field.default is field.default_factory is MISSING]
    missing = [f"--{name}" for name in required if name not in given]
    if missing and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"missing {', '.join(missing)}; --help lists all flags")
    try:
        return draccus.parse(kind, args=arguments, preferred_help="above")
    except draccus.utils.DecodingError as error:
        raise ValueError(f"a flag has a value of another type: {error}") from error


def _yaml_keys(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """Keys of the file of --config_path, all of them known; none without that flag."""
    joined = [part for argument in arguments for part in argument.split("=", 1)]
    if "--config_path" not in joined[:-1]:
        return []
    path = Path(joined[joined.index("--config_path") + 1])
    if not path.is_file():
        raise ValueError(f"--config_path: there is no file {path}")
    keys = list(map(str, yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
    for key in keys:
        if key not in known:
            raise ValueError(f"{path}: {did_you_mean('key', key, known)}")
    return keys
