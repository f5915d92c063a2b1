"""The process of a LIBERO simulator, `python -m prismo.sim.libero_server`: sets itself up, then serves `Commands`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import yaml

from prismo.sim.assets import Assets, cache_folder
from prismo.sim.commands import Commands
from prismo.sim.gl import GLBackend
from prismo.sim.server import serve
from prismo.sim.suites import module_of_file, package_folder
from prismo.util.files import atomic_write


def start(assets: dict[str, str], backend: dict[str, Any] | None, image_size: int) -> Commands:
    """A simulator from the options of `prismo.sim.libero_worker.LiberoWorker`."""
    found = Assets(Path(assets["folder"]), assets["source"])
    drawing = None if backend is None else GLBackend(**backend)
    prepare_process(found, drawing)
    return Commands(found, drawing, image_size)


def prepare_process(assets: Assets, backend: GLBackend | None) -> None:
    """Set this process up for robosuite and LIBERO; call it once, before anything imports MuJoCo.

    Without it, LIBERO asks for folders on stdin and writes ~/.libero, robosuite logs to a file in /tmp that it shares
    with all users and picks a GPU by misreading CUDA_VISIBLE_DEVICES, numba, matplotlib and Mesa write to the home
    folder.
    """
    cache = cache_folder()
    variables: dict[str, str | None] = {
        "LIBERO_CONFIG_PATH": str(_write_libero_config(cache, assets)),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "MESA_SHADER_CACHE_DISABLE": "true",
        "__GL_SHADER_DISK_CACHE_PATH": str(cache),
    }
    # One thread per simulator: two processes with one thread each draw 1.5 times as much as one with two.
    for name in ("LP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[name] = os.environ.get(name, "1")
    variables |= (
        backend.environment() if backend is not None else {"MUJOCO_GL": "disable", "CUDA_VISIBLE_DEVICES": None}
    )
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    (cache / "matplotlib").mkdir(exist_ok=True)
    _set_robosuite_macros()


def _set_robosuite_macros() -> None:
    """robosuite's settings are module constants that its import already uses, so they are loaded and set beforehand."""
    found = importlib.util.find_spec("robosuite")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("robosuite is not installed: `make setup` installs it")
    macros = module_of_file("robosuite.macros", Path(found.origin).parent / "macros.py")
    vars(macros).update(
        FILE_LOGGING_LEVEL=None,  # /tmp/robosuite.log, which the first user of a machine owns
        CONSOLE_LOGGING_LEVEL="ERROR",
        MUJOCO_GPU_RENDERING=False,  # would replace the backend that was chosen by EGL
    )
    sys.modules["robosuite.macros"] = macros
    sys.modules["robosuite.macros_private"] = types.ModuleType("robosuite.macros_private")  # it warns without one


def _write_libero_config(cache: Path, assets: Assets) -> Path:
    """The folder with the `config.yaml` that LIBERO would otherwise ask for; one per set of folders."""
    root = package_folder()
    text = yaml.safe_dump(
        {
            "benchmark_root": str(root),
            "bddl_files": str(root / "bddl_files"),
            "init_states": str(root / "init_files"),
            "datasets": str(cache / "datasets"),
            "assets": str(assets.folder),
        }
    )
    folder = cache / f"libero-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    with atomic_write(folder / "config.yaml") as temporary:
        temporary.write_text(text)
    return folder


if __name__ == "__main__":
    serve(start)
