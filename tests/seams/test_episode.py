"""An episode is a generator: whoever answers its requests with the same simulator and policy gets the same actions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prismo.benchmarks.libero import BENCHMARK
from prismo.embodiment import LIBERO
from prismo.eval.config import EvalConfig
from prismo.eval.episode import Query, Reset, Rollout, RolloutSettings, Step, plan_episodes, play
from prismo.eval.rollout import run_episode
from prismo.policies.base import Policy
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from prismo.sim.assets import STAND_INS, resolve_assets
from prismo.sim.gl import GLBackend
from prismo.sim.libero import CAMERAS, STATES
from prismo.sim.libero_worker import LiberoWorker
from prismo.testing.tiny import make_tiny_policy

pytestmark = pytest.mark.processes

SETTINGS = RolloutSettings(max_steps=11, open_loop_steps=4, settle_steps=2, cameras=CAMERAS, states=STATES)


@pytest.fixture(scope="module")
def simulators(drawing: GLBackend) -> Iterator[list[LiberoWorker]]:
    assets = resolve_assets(STAND_INS)
    with LiberoWorker(assets, image_size=64) as first, LiberoWorker(assets, image_size=64) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = make_tiny_policy(tmp_path_factory.mktemp("seam") / "policy", dataset="libero_object_no_noops")
    return prepare_policy(PolicyFlags(pretrained_checkpoint=str(folder), device="cpu"), LIBERO, "libero_object").load()


def test_episodes_in_turn_are_the_episodes_of_the_player(simulators: list[LiberoWorker], policy: Policy) -> None:
    """Two episodes at once, each answered a request at a time: the generators mix nothing and own no process."""
    episodes = plan_episodes(EvalConfig(task_suite_name="libero_object", num_trials_per_task=2), BENCHMARK)[:2]
    progresses = [Rollout() for _ in episodes]
    flows = [play(episode, SETTINGS, LIBERO, progress) for episode, progress in zip(episodes, progresses, strict=True)]
    kinds: list[type] = []
    waiting = {slot: next(flow) for slot, flow in enumerate(flows)}
    while waiting:
        for slot, request in list(waiting.items()):
            worker = simulators[slot]
            if isinstance(request, Query):
                answer = policy.predict([request.input], [slot])[0]
            elif isinstance(request, Step):
                answer = worker.step_chunk(request.actions, request.render)
            else:
                told = request.episode
                policy.start_episode(slot, told.policy_seed)
                where = (told.task.suite, told.task.index, told.init_state)
                answer = worker.reset(*where, seed=told.env_seed, settle_steps=request.settle_steps)
            kinds += [type(request)] if slot == 0 else []
            try:
                waiting[slot] = flows[slot].send(answer)
            except StopIteration:
                del waiting[slot]
    assert kinds == [Reset, *[Query, Step] * 3]
    for episode, progress in zip(episodes, progresses, strict=True):
        rollout = run_episode(simulators[0], policy, episode, SETTINGS)
        assert (rollout.outcome, rollout.steps, rollout.queries) == ("failure", 11, 3)
        assert progress.digest.hexdigest()[:16] == rollout.actions_sha256
        assert (progress.steps, progress.queries) == (11, 3)
    hashes = {progress.digest.hexdigest() for progress in progresses}
    assert len(hashes) == 2


def test_an_episode_that_breaks_off_says_how_far_it_came() -> None:
    (episode, *_) = plan_episodes(EvalConfig(task_suite_name="libero_object", num_trials_per_task=1), BENCHMARK)
    progress = Rollout()
    flow = play(episode, SETTINGS, LIBERO, progress)
    assert isinstance(next(flow), Reset)
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        flow.throw(RuntimeError("the simulator is gone"))
    assert (progress.steps, progress.queries, progress.success, progress.frames) == (0, 0, False, [])
