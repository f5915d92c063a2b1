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

# The parts of the package, the lowest first, and what each may import of the others (CONTRIBUTING.md). What a registry
# names by a string is not imported by who asks it: that is how a family can be asked for what trains it.
BELOW = {
    "util": set(),
    "embodiment": {"util"},
    "data": {"util", "embodiment"},
    "sim": {"util", "embodiment"},
    "models": {"util", "embodiment", "data"},
    "align": {"util", "models"},
    "testing": {"util", "embodiment", "data", "models", "align"},
    "families": {"util", "data", "models"},
    "merging": {"util", "embodiment", "data", "models", "families"},
    "training": {"util", "embodiment", "data", "models", "align", "families", "merging"},
    "policies": {"util", "embodiment", "data", "models", "families"},
    "eval": {"util", "embodiment", "sim", "policies"},
    "benchmarks": {"util", "embodiment", "sim", "eval"},
    "verify": {"util", "embodiment", "data", "models", "align", "families", "policies", "eval"},
    "doctor": {"models", "sim", "testing", "benchmarks"},
    "demo": {"util", "testing", "training"},
    "commands": {"util", "data", "sim", "models", "testing", "merging", "training", "eval", "verify", "doctor", "demo"},
    "__main__": {"commands"},
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
    files = sorted((REPOSITORY / "prismo").rglob("*.py"))
    modules = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path for path in files
    }
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute here"
                # `from prismo.data import x` is one of a module, or of a name in one.
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [name if name in modules or node.module == "prismo" else node.module or "" for name in names]
            else:
                continue
            yield from ((module, name) for name in found if name.startswith("prismo."))


def test_imports_go_one_way() -> None:
    def part(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    everything = {path.stem for path in (REPOSITORY / "prismo").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert everything - {"__init__", "__pycache__"} == set(BELOW), "a part that the table does not know, or no longer"
    order = list(BELOW)
    assert all(order.index(name) < order.index(above) for above, names in BELOW.items() for name in names)
    wrong = {
        (module, name)
        for module, name in imports()
        if module != "prismo" and part(name) not in {part(module), "__version__", *BELOW[part(module)]}
    }
    assert not wrong, "imports that go up"


def test_no_modules_import_one_another() -> None:
    """Neither directly nor in a circle, wherever in a file the import stands."""
    edges: dict[str, set[str]] = {}
    for module, name in imports():
        edges.setdefault(module, set()).add(name)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for name in edges.get(module, ()):
                visit(name, (*above, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("package", ["torch", "peft", "transformers"])
def test_packages_whose_private_names_are_used_have_an_upper_bound(package: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}[package]
    tested = re.search(rf"^{package}==([\w.]+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert tested in needed
    assert "99" not in needed
