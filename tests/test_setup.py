"""`make setup` says in one sentence what is wrong with the Python that it is given; `make help` lists the commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make` needs of a checkout, without an environment."""
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PATH": path} if path else {})
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def python(folder: Path, name: str, minor: int) -> Path:
    """Something that says that it is Python 3.`minor`, and cannot do more."""
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    program = f"import sys; sys.version_info = (3, {minor}, 1); sys.version = '3.{minor}.1 (main)'; exec(sys.argv[1])"
    file.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{program}" "$2"\nexit 1\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(("minor", "others"), [(10, []), (14, []), (9, ["python3.12"]), (None, [])])
def test_an_unsuitable_python_is_one_sentence(minor: int | None, others: list[str], checkout: Path) -> None:
    given = python(checkout, "mine", minor) if minor else checkout / "bin" / "mine"
    for other in others:
        python(checkout, other, int(other[-2:]))
    (checkout / "tools").mkdir()
    for tool in ("make", "bash", "sh", "sed", "touch", "dirname"):
        (checkout / "tools" / tool).symlink_to(shutil.which(tool))
    done = make(checkout, "setup", f"PYTHON={given}", path=f"{checkout / 'bin'}:{checkout / 'tools'}")
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    what = f"is Python 3.{minor}.1" if minor else "is not here"
    assert re.search(rf"prismo needs Python 3\.\d+ to 3\.\d+, but {given} {what}\. ", said), said
    assert f"make setup PYTHON={others[0] if others else '/path/to/python3'}" in said
    assert not (checkout / ".venv").exists()


def test_a_failing_pip_is_told_without_its_warnings(checkout: Path) -> None:
    (checkout / "constraints.txt").write_text("torch==0.0.0\n")
    done = make(checkout, "setup", f"PYTHON={sys.executable}", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=")
    assert done.returncode != 0
    assert "WARNING" not in done.stderr
    assert "setup: pip could not install" in done.stderr
    assert ".venv/setup.log" in done.stderr


def test_help_lists_the_commands(checkout: Path) -> None:
    listed = make(checkout).stdout
    for command in ("setup", "test", "demo", "lint"):
        assert f"make {command} " in listed
