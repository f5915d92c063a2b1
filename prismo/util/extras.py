"""Packages that are perhaps not there: imported where they are needed, and named where they are missing."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from types import ModuleType


def package_version(package: str) -> str | None:
    """The installed version; None where there is no such package, or it is a bare folder on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_hint(extra: str) -> str:
    """What to type for an extra of this project, whose name on the package index is not that of the package."""
    if (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file():
        return f'type `pip install -e ".[{extra}]"` in the folder of the source code'
    return f'type `pip install "prismo-vla[{extra}]"`'


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` installs.

    Raises:
        ValueError: it is missing; the message says what to type.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"the package {error.name} is missing: {install_hint(extra)}") from error
