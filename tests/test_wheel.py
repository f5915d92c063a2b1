"""The wheel holds what its commands read, and its console command works away from a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and unpacked as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "prismo", folder / "source" / "prismo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(folder / "source")], check=True, capture_output=True)
    (wheel,) = folder.glob("prismo_vla-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_every_file_of_the_package_is_in_it(installed: Path) -> None:
    names = {path.relative_to(ROOT) for path in (ROOT / "prismo").rglob("*") if path.is_file()}
    names = {name for name in names if "__pycache__" not in name.parts}
    assert {name for name in names if not (installed / name).is_file()} == set()


def test_the_console_command_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    """As pip's script calls it, in an empty environment and folder; `--help` of a command opens files of the wheel."""
    entry = (next(installed.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "prismo = prismo.commands:main" in entry
    paths = [str(installed), *(path for path in sys.path if "site-packages" in path)]
    call = "import sys; from prismo.commands import main; sys.exit(main())"
    for arguments in (["--help"], ["train", "--help"], ["eval", "--help"], ["verify", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {call}", *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"prismo {'<command>' if len(arguments) == 1 else arguments[0]} " in done.stdout
    assert not list(tmp_path.iterdir())
