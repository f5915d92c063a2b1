"""Imports go one way, need neither torchvision, timm nor TensorFlow, and have no side effects."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]

# What a part of the package may import of the others (CONTRIBUTING.md). Commands and other single modules may import
# everything, and nothing imports them.
BELOW = {
    "util": set(),
    "embodiment": {"util"},
    "data": {"util", "embodiment"},
    "models": {"util", "embodiment", "data"},
    "align": {"util", "models"},
    "training": {"util", "embodiment", "data", "models", "align"},
    "policies": {"util", "embodiment", "data", "models"},
    "sim": {"util"},
    "eval": {"util", "embodiment", "policies", "sim"},
    "benchmarks": {"util", "embodiment", "sim", "eval"},
}
EXCEPTIONS = {
    ("prismo.models.tiny", "prismo.align.vggt"): "checkpoints for tests, a teacher among them",
    ("prismo.models.full_size", "prismo.align.vggt"): "random weights for benchmarks, a teacher's among them",
    ("prismo.training.spatialvla", "prismo.policies.flags"): "the cameras that a flag may name",
}

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


@pytest.mark.processes
def test_every_module_imports_without_heavy_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prismo.models.openvla.modeling" in done.stdout
    assert not list(tmp_path.iterdir()), "an import wrote files"


def imports() -> Iterator[tuple[str, str]]:
    """(module, imported module) inside the package, wherever in a file the import stands."""
    for path in sorted((REPOSITORY / "prismo").rglob("*.py")):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute here"
                # `from prismo import eval` is one of a part; `from prismo.data import x` of a name in it or a module.
                whole = node.module == "prismo"
                found = [f"prismo.{alias.name}" for alias in node.names] if whole else [node.module or ""]
            else:
                continue
            yield from ((module, name) for name in found if name.startswith("prismo."))


def test_imports_go_one_way() -> None:
    def part(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    wrong = {
        (module, name)
        for module, name in imports()
        if part(module) in BELOW and part(name) not in {part(module), "__version__", *BELOW[part(module)]}
    }
    assert wrong == set(EXCEPTIONS), "either an import that goes up, or an exception that is no longer one"


@pytest.mark.parametrize("package", ["torch", "peft", "transformers"])
def test_packages_whose_private_names_are_used_have_an_upper_bound(package: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}[package]
    tested = re.search(rf"^{package}==([\w.]+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert tested in needed
    assert "99" not in needed
