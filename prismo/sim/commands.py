"""What LIBERO's simulator process can be asked to do, over the pipe of `prismo.sim.server`."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

from prismo.sim import standins
from prismo.sim.assets import ASSETS_VARIABLE, Assets
from prismo.sim.demos import DemoError, EpisodeOutcome, read_demo, write_demo
from prismo.sim.expert import demonstrate
from prismo.sim.gl import GLBackend
from prismo.sim.interface import Observation, Render, SimInfo, SimulatorError, StepResult
from prismo.sim.libero import AGENT_CAMERA, CAMERAS, LiberoEnv
from prismo.sim.replay import replay
from prismo.sim.suites import load_init_states, load_task

_PACKAGES = ("mujoco", "robosuite", "bddl", "hf-libero")


class Commands:
    """The commands; holds at most one environment, made again when the task changes."""

    def __init__(self, assets: Assets, backend: GLBackend | None, image_size: int) -> None:
        self._assets = assets
        self._backend = backend
        self._image_size = image_size
        self._env: LiberoEnv | None = None

    def info(self) -> SimInfo:
        backend = self._backend
        return SimInfo(
            assets=self._assets.source,
            gl=str(backend or "none"),
            versions={name: _version(name) for name in _PACKAGES},
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
        result = replay(self._environment(suite, task_id), demo, seed=seed, drop_noops=drop_noops)
        if result.success and result.demo is not None:
            write_demo(Path(target), result.demo)
        return EpisodeOutcome(result.success, len(demo) - result.noops, result.noops)

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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # e.g. a checkout of LIBERO on the path
