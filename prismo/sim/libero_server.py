"""The process of a LIBERO simulator, `python -m prismo.sim.libero_server`: sets itself up, then serves `Simulator`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prismo.sim import standins
from prismo.sim.assets import ASSETS_VARIABLE, Assets, cache_folder
from prismo.sim.demos import DemoError, EpisodeOutcome, read_demo, replay, write_demo
from prismo.sim.expert import demonstrate
from prismo.sim.gl import GLBackend
from prismo.sim.interface import Observation, Render, SimInfo, SimulatorError, StepResult
from prismo.sim.libero import AGENT_CAMERA, CAMERAS, LiberoEnv
from prismo.sim.server import serve
from prismo.sim.suites import load_init_states, load_task, module_of_file, package_folder
from prismo.util.extras import package_version
from prismo.util.files import atomic_write

_PACKAGES = ("mujoco", "robosuite", "bddl", "hf-libero")


class Simulator:
    """What the process can be asked to do; holds at most one environment, made again when the task changes.

    The arguments are the options of `prismo.sim.libero_worker.LiberoWorker`.
    """

    def __init__(self, assets: dict[str, str], backend: dict[str, Any] | None, image_size: int) -> None:
        self._assets = Assets(Path(assets["folder"]), assets["source"])
        self._backend = None if backend is None else GLBackend(**backend)
        self._image_size = image_size
        self._env: LiberoEnv | None = None
        prepare_process(self._assets, self._backend)

    def info(self) -> SimInfo:
        backend = self._backend
        return SimInfo(
            assets=self._assets.source,
            gl=str(backend or "none"),
            versions={name: package_version(name) or "unknown" for name in _PACKAGES},
            renderer="none" if backend is None else f"{backend.name} ({backend.renderer})",
        )

    def reset(
        self, suite: str, task_id: int, init_state: int | np.ndarray, seed: int, settle_steps: int
    ) -> Observation:
        env = self._environment(suite, task_id)
        env.reset(self._init_state(suite, task_id, init_state), seed=seed, settle_steps=settle_steps)
        return env.observe()

    def step_chunk(self, actions: np.ndarray, render: Render) -> StepResult:
        env = self._running()
        filmed = {"all": (AGENT_CAMERA,), "all_views": CAMERAS}.get(render, ())
        frames: list[np.ndarray] = []
        success, steps = False, 0
        for steps, action in enumerate(actions, start=1):
            observed = steps == len(actions) and render != "none"
            success = env.step(action, draw=CAMERAS if observed else filmed)
            views = [view for camera in filmed if (view := env.image(camera)) is not None]
            if views:
                frames.append(np.concatenate(views, axis=1))
            if success:
                break
        if success and render != "none" and steps < len(actions):
            env.draw_now()  # nobody could know that this step would be the last
        return StepResult(env.observe(), success, steps, np.stack(frames) if frames else None)

    def object_poses(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return self._running().object_poses()

    def sim_state(self) -> np.ndarray:
        return self._running().sim_state()

    def expert_episode(
        self, suite: str, task_id: int, init_state: int | np.ndarray, seed: int, noise: float, target: str | None
    ) -> EpisodeOutcome:
        """An episode of the scripted expert; with `target`, a success is drawn and written there."""
        state = self._init_state(suite, task_id, init_state)
        env = self._environment(suite, task_id)
        demo, success = demonstrate(env, state, seed=seed, noise=noise, draw=target is not None)
        if success and target is not None:
            write_demo(Path(target), demo)
        return EpisodeOutcome(success, len(demo))

    def replay_demo(
        self, suite: str, task_id: int, source: str, index: int, seed: int, drop_noops: bool, target: str
    ) -> EpisodeOutcome:
        """Execute a demonstration of an HDF5 file again; a success is written to `target`.

        `seed` is for files that do not say theirs.
        """
        try:
            demo = read_demo(Path(source), index, images=False)
        except DemoError as error:
            raise SimulatorError(str(error)) from error
        seed = seed if demo.seed is None else demo.seed
        replayed, outcome = replay(self._environment(suite, task_id), demo, seed=seed, drop_noops=drop_noops)
        if outcome.success and replayed is not None:
            write_demo(Path(target), replayed)
        return outcome

    def _running(self) -> LiberoEnv:
        if self._env is None:
            raise SimulatorError("no episode is running: call reset first")
        return self._env

    def _environment(self, suite: str, task_id: int) -> LiberoEnv:
        task = load_task(suite, task_id)
        if self._assets.are_stand_ins and suite not in standins.SUITES:
            raise SimulatorError(
                f"the built-in stand-ins cover {', '.join(standins.SUITES)} only; {suite} needs LIBERO's own assets: "
                f"set {ASSETS_VARIABLE} to their folder"
            )
        if self._env is not None and self._env.task != task:
            self.close()
        if self._env is None:
            self._env = LiberoEnv(task, self._assets, image_size=self._image_size, cameras=self._backend is not None)
        return self._env

    @staticmethod
    def _init_state(suite: str, task_id: int, init_state: int | np.ndarray) -> np.ndarray:
        if isinstance(init_state, np.ndarray):
            return init_state
        states = load_init_states(suite, task_id)
        if not 0 <= init_state < len(states):
            raise SimulatorError(
                f"{suite} task {task_id} has initial states 0 to {len(states) - 1}; found {init_state}. Other "
                f"states go in as arrays"
            )
        return states[init_state]

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


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
    variables |= backend.environment() if backend else {"MUJOCO_GL": "disable", "CUDA_VISIBLE_DEVICES": None}
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
    serve(Simulator)
