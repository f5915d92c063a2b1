"""What a simulator process can be asked to do; `prismo.sim.server` calls these for `prismo.sim.worker.SimWorker`."""

from __future__ import annotations

import importlib.metadata

import numpy as np

from prismo.sim.assets import Assets
from prismo.sim.demos import Demo
from prismo.sim.expert import run_episode
from prismo.sim.gl import GLBackend
from prismo.sim.interface import AGENT_CAMERA, CAMERAS, Observation, Render, SimInfo, SimulatorError, StepResult
from prismo.sim.libero import LiberoEnv
from prismo.sim.replay import Replay, replay
from prismo.sim.suites import load_init_states, load_task

PACKAGES = ("mujoco", "robosuite", "bddl", "hf-libero")


class Commands:
    """The commands; holds at most one environment, made again when the task changes."""

    def __init__(self, assets: Assets, backend: GLBackend | None, image_size: int) -> None:
        self._assets = assets
        self._backend = backend
        self._image_size = image_size
        self._env: LiberoEnv | None = None

    def info(self) -> SimInfo:
        return SimInfo(
            assets=self._assets.source,
            gl=str(self._backend or "none"),
            versions={name: _version(name) for name in PACKAGES},
        )

    def reset(
        self, suite: str, task_id: int, init_state: int | np.ndarray, seed: int, settle_steps: int
    ) -> Observation:
        env = self._environment(suite, task_id)
        env.reset(self._init_state(suite, task_id, init_state), seed=seed, settle_steps=settle_steps)
        return env.observe()

    def step_chunk(self, actions: np.ndarray, render: Render) -> StepResult:
        env = self._env
        if env is None:
            raise SimulatorError("step before reset")
        frames: list[np.ndarray | None] = []
        success, steps = False, 0
        for steps, action in enumerate(actions, start=1):
            observed = steps == len(actions) and render != "none"
            draw = CAMERAS if observed else (AGENT_CAMERA,) if render == "all" else ()
            success = env.step(action, draw=draw)
            if render == "all":
                frames.append(env.image(AGENT_CAMERA))
            if success:
                break
        if success and render != "none" and steps < len(actions):
            env.draw_now()  # nobody could know that this step would be the last
        filmed = render == "all" and self._backend is not None
        return StepResult(env.observe(), success, steps, np.stack(frames) if filmed else None)

    def expert_episode(
        self, suite: str, task_id: int, init_state: int | np.ndarray, seed: int, noise: float, record: bool
    ) -> tuple[Demo, bool]:
        state = self._init_state(suite, task_id, init_state)
        return run_episode(
            self._environment(suite, task_id), state, seed=seed, noise=noise, draw=record and self._backend is not None
        )

    def replay_demo(self, suite: str, task_id: int, demo: Demo, seed: int, drop_noops: bool) -> Replay:
        return replay(self._environment(suite, task_id), demo, seed=seed, drop_noops=drop_noops)

    def _environment(self, suite: str, task_id: int) -> LiberoEnv:
        task = load_task(suite, task_id)
        if self._env is not None and self._env.task != task:
            self.close()
        if self._env is None:
            self._env = LiberoEnv(task, self._assets, image_size=self._image_size, cameras=self._backend is not None)
        return self._env

    @staticmethod
    def _init_state(suite: str, task_id: int, init_state: int | np.ndarray) -> np.ndarray:
        if np.ndim(init_state):
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
