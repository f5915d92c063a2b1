"""Episodes in the real simulator, driven by policies whose actions are known."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from prismo.benchmarks.libero import BENCHMARK
from prismo.embodiment import LIBERO
from prismo.eval.config import EvalConfig
from prismo.eval.episode import Episode, RolloutSettings, plan_episodes
from prismo.eval.rollout import run_episode
from prismo.policies.base import PolicyInput
from prismo.sim.libero import CAMERAS, STATES
from prismo.sim.libero_worker import LiberoWorker

pytestmark = pytest.mark.processes

SETTINGS = RolloutSettings(max_steps=10, open_loop_steps=8, settle_steps=10, cameras=CAMERAS, states=STATES)


class ScriptedPolicy:
    """Answers query q with a chunk whose action k moves by 0.01 * (q, k), so that executed actions tell both."""

    robot = LIBERO
    num_images = 2

    def __init__(self, before_query: Callable[[int], None] = lambda query: None, gripper: float = 1.0) -> None:
        self.started: list[tuple[int, int]] = []
        self.inputs: list[PolicyInput] = []
        self._before_query, self._gripper = before_query, gripper

    def start_episode(self, slot: int, seed: int) -> None:
        self.started.append((slot, seed))
        self.inputs = []

    def predict(self, inputs: Sequence[PolicyInput], slots: Sequence[int]) -> np.ndarray:
        self._before_query(len(self.inputs))
        query = len(self.inputs)
        self.inputs.extend(inputs)
        chunk = np.zeros((1, 8, 7))
        chunk[..., 0] = 0.01 * query
        chunk[..., 1] = 0.01 * np.arange(8)
        chunk[..., 6] = self._gripper
        return chunk

    def describe(self) -> dict:
        return {}


class Recorder:
    """Writes down what is sent to a real simulator."""

    def __init__(self, worker: LiberoWorker) -> None:
        self.worker, self.actions, self.renders = worker, [], []

    def reset(self, *args: object, **kwargs: object):
        return self.worker.reset(*args, **kwargs)

    def step_chunk(self, actions: np.ndarray, render: str = "last"):
        self.actions.append(actions.copy())
        self.renders.append(render)
        return self.worker.step_chunk(actions, render)


@pytest.fixture(scope="module")
def episode() -> Episode:
    return plan_episodes(EvalConfig(task_suite_name="libero_object", num_trials_per_task=3), BENCHMARK)[2]


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_first_actions_of_a_chunk_are_executed(simulator: LiberoWorker, episode: Episode, steps: int) -> None:
    recorder, policy = Recorder(simulator), ScriptedPolicy()
    rollout = run_episode(recorder, policy, episode, replace(SETTINGS, open_loop_steps=steps))
    executed = np.concatenate(recorder.actions)
    assert (rollout.outcome, rollout.steps, len(executed)) == ("failure", 10, 10)
    expected = [(0.01 * (i // steps), 0.01 * (i % steps)) for i in range(10)]
    np.testing.assert_allclose(executed[:, :2], expected)
    assert rollout.queries == len(recorder.actions) == -(-10 // steps)
    assert recorder.renders[-1] == "none"  # nobody looks at the last picture
    assert set(recorder.renders[:-1]) <= {"last"}
    assert policy.started == [(0, episode.policy_seed)]


def test_observation_and_repeatability(simulator: LiberoWorker, episode: Episode) -> None:
    policies = ScriptedPolicy(), ScriptedPolicy()
    rollouts = [run_episode(simulator, policy, episode, SETTINGS) for policy in policies]
    assert rollouts[0].actions_sha256 == rollouts[1].actions_sha256
    for first, second in zip(policies[0].inputs, policies[1].inputs, strict=True):
        np.testing.assert_array_equal(first.state, second.state)
        for a, b in zip(first.images, second.images, strict=True):
            np.testing.assert_array_equal(a, b)
    seen = policies[0].inputs[0]
    assert seen.instruction == episode.task.language
    assert [image.shape for image in seen.images] == [(64, 64, 3)] * 2
    direct = simulator.reset(episode.task.suite, episode.task.index, episode.init_state, seed=episode.env_seed)
    np.testing.assert_array_equal(seen.images[0], direct.images[CAMERAS[0]])
    np.testing.assert_array_equal(seen.images[1], direct.images[CAMERAS[1]])


def test_frames_of_every_step(simulator: LiberoWorker, episode: Episode) -> None:
    policy = ScriptedPolicy()
    filmed = run_episode(simulator, policy, episode, replace(SETTINGS, film=CAMERAS[:1]))
    plain = run_episode(simulator, ScriptedPolicy(), episode, SETTINGS)
    assert np.shape(filmed.frames) == (11, 64, 64, 3)
    assert plain.frames == []
    assert filmed.actions_sha256 == plain.actions_sha256
    np.testing.assert_array_equal(filmed.frames[8], policy.inputs[1].images[0])
    both = run_episode(simulator, ScriptedPolicy(), episode, replace(SETTINGS, film=CAMERAS))
    assert both.actions_sha256 == plain.actions_sha256
    np.testing.assert_array_equal(np.stack(both.frames)[:, :, :64], filmed.frames)
    for step, seen in ((0, policy.inputs[0]), (8, policy.inputs[1])):
        np.testing.assert_array_equal(both.frames[step][:, 64:], seen.images[1])


def test_a_custom_initial_state(simulator: LiberoWorker, episode: Episode) -> None:
    simulator.reset(episode.task.suite, episode.task.index, 7, settle_steps=0)
    custom = replace(episode, state=simulator.sim_state())
    expected = simulator.reset(episode.task.suite, episode.task.index, 7, seed=episode.env_seed)
    policy = ScriptedPolicy()
    run_episode(simulator, policy, custom, SETTINGS)
    np.testing.assert_allclose(policy.inputs[0].state, expected.state(STATES), atol=1e-6)
    difference = np.abs(policy.inputs[0].images[0].astype(int) - expected.images[CAMERAS[0]])
    assert difference.mean() < 0.5


class DemonstrationPolicy(ScriptedPolicy):
    """Predicts what the scripted expert did, gripper as in the training data (1 = open, 0 = close)."""

    def __init__(self, actions: np.ndarray) -> None:
        super().__init__()
        self._actions = actions.copy()
        self._actions[:, 6] = (1 - actions[:, 6]) / 2

    def predict(self, inputs: Sequence[PolicyInput], slots: Sequence[int]) -> np.ndarray:
        start = 8 * len(self.inputs)
        self.inputs.extend(inputs)
        return self._actions[None, start : start + 8]


def test_a_policy_that_knows_how_succeeds(simulator: LiberoWorker, episode: Episode, tmp_path: Path) -> None:
    where = {"suite": episode.task.suite, "task_id": episode.task.index, "init_state": episode.init_state}
    file = tmp_path / "demo.hdf5"
    simulator.request("expert_episode", 300.0, **where, seed=episode.env_seed, noise=0.0, target=file)
    with h5py.File(file) as demo:
        actions = demo["demo/actions"][()]
    count = len(actions)
    rollout = run_episode(simulator, DemonstrationPolicy(actions), episode, replace(SETTINGS, max_steps=280))
    assert (rollout.outcome, rollout.steps, rollout.queries) == ("success", count, -(-count // 8))
    short = run_episode(simulator, DemonstrationPolicy(actions), episode, replace(SETTINGS, max_steps=count - 1))
    assert (short.outcome, short.steps) == ("failure", count - 1)


@pytest.mark.parametrize(("gripper", "closes"), [(1.0, False), (0.0, True)])
def test_the_gripper_obeys(simulator: LiberoWorker, episode: Episode, gripper: float, closes: bool) -> None:
    """1 = open and 0 = close, as predicted; the distance of the fingers tells what the robot did."""
    policy = ScriptedPolicy(gripper=gripper)
    run_episode(simulator, policy, episode, replace(SETTINGS, max_steps=24))
    width = [seen.state[6] - seen.state[7] for seen in policy.inputs]
    assert (width[-1] < width[0] - 0.02) if closes else (width[-1] > 0.06)


def test_a_raising_policy_is_an_error(simulator: LiberoWorker, episode: Episode) -> None:
    def fail(query: int) -> None:
        if query == 1:
            raise RuntimeError("CUDA out of memory")

    rollout = run_episode(simulator, ScriptedPolicy(before_query=fail), episode, replace(SETTINGS, film=CAMERAS[:1]))
    assert (rollout.outcome, rollout.steps) == ("error", 8)
    assert "Traceback" in rollout.error
    assert "CUDA out of memory" in rollout.error
    assert len(rollout.frames) == 9


def test_actions_that_are_no_numbers_are_an_error(simulator: LiberoWorker, episode: Episode) -> None:
    rollout = run_episode(simulator, ScriptedPolicy(gripper=np.nan), episode, SETTINGS)
    assert rollout.outcome == "error"
    assert "NaN" in rollout.error


def test_the_episode_of_a_killed_simulator_is_repeated(simulator: LiberoWorker, episode: Episode) -> None:
    expected = run_episode(simulator, ScriptedPolicy(), episode, SETTINGS)
    kills = []

    def kill_once(query: int) -> None:
        if query == 1 and not kills:
            kills.append(simulator.pid)
            os.kill(simulator.pid, signal.SIGKILL)

    rollout = run_episode(simulator, ScriptedPolicy(before_query=kill_once), episode, SETTINGS)
    assert kills
    assert (rollout.outcome, rollout.attempts) == ("failure", 2)
    assert rollout.actions_sha256 == expected.actions_sha256
    assert rollout.steps == expected.steps
