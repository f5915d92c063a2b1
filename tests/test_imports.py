"""The package imports without torchvision, timm and TensorFlow, and importing has no side effects."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]

PROGRAM = """
import importlib, os, pkgutil, sys

for name in ("torchvision", "timm", "tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None  # importing it raises, find_spec says that it is not installed
before = dict(os.environ)
import prismo
for module in pkgutil.walk_packages(prismo.__path__, "prismo."):
    importlib.import_module(module.name)
    print(module.name)
assert dict(os.environ) == before, "an import changed the environment"
assert "mujoco" not in sys.modules, "MuJoCo was imported before the GL backend could be chosen"
"""


def test_every_module_imports_without_heavy_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prismo.models.openvla.modeling" in done.stdout
    assert not list(tmp_path.iterdir()), "an import wrote files"


@pytest.mark.parametrize("package", ["torch", "peft", "transformers"])
def test_packages_whose_private_names_are_used_have_an_upper_bound(package: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}[package]
    tested = re.search(rf"^{package}==([\w.]+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert tested in needed
    assert "99" not in needed
