"""Command-line flags as a dataclass; an unknown one is answered with the nearest that exists."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import draccus
import yaml

from prismo.util.text import did_you_mean

C = TypeVar("C")


def parse_flags(kind: type[C], arguments: Sequence[str] | None = None) -> C:
    """Read `--flag value` arguments, over those of `--config_path file.yaml` if given.

    Args:
        kind: dataclass of the flags.
        arguments: None takes those of the process.

    Raises:
        ValueError: an unknown flag or key (with the nearest one), or a value of another type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    description: Any = kind
    known = [field.name for field in fields(description)]
    for argument in arguments:
        name = argument.removeprefix("--").split("=", 1)[0]
        if argument.startswith("--") and name not in (*known, "config_path", "help"):
            raise ValueError(did_you_mean("flag", f"--{name}", [f"--{flag}" for flag in known]))
    _check_yaml(arguments, known)
    try:
        return draccus.parse(kind, args=arguments, preferred_help="above")
    except draccus.utils.DecodingError as error:
        raise ValueError(f"a flag has a value of another type: {error}") from error


def _check_yaml(arguments: Sequence[str], known: Sequence[str]) -> None:
    """The file of --config_path exists and has known keys only."""
    joined = [part for argument in arguments for part in argument.split("=", 1)]
    if "--config_path" not in joined[:-1]:
        return
    path = Path(joined[joined.index("--config_path") + 1])
    if not path.is_file():
        raise ValueError(f"--config_path: there is no file {path}")
    for key in yaml.safe_load(path.read_text(encoding="utf-8")) or {}:
        if key not in known:
            raise ValueError(f"{path}: {did_you_mean('key', str(key), known)}")
