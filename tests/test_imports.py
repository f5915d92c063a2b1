"""The package imports without torchvision, timm and TensorFlow, and importing has no side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
