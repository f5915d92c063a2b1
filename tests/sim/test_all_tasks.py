"""LIBERO's own assets: all 40 tasks of the benchmark's four suites load, reset to their states, step and draw."""

from __future__ import annotations

import numpy as np
import pytest

from prismo.doctor import BOWL_OFF_MM, DARK_FLOOR, probe_floor, probe_settling
from prismo.sim.assets import Assets
from prismo.sim.collect import expert_items, run_expert
from prismo.sim.libero import CAMERAS
from prismo.sim.libero_worker import LiberoWorker
from prismo.sim.parallel import run_jobs
from prismo.sim.suites import load_init_states, load_tasks

pytestmark = pytest.mark.processes

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PUSH = np.array([[0.3, 0.1, -0.2, 0.0, 0.0, 0.1, 1.0]])


@pytest.mark.slow
def test_all_forty_tasks_load_reset_and_step(libero_assets: Assets) -> None:
    jobs = [(suite, task.index) for suite in SUITES for task in load_tasks(suite)]

    def run(worker: LiberoWorker, job: tuple[str, int]) -> tuple[float, float, bool]:
        state = (7 * job[1]) % 50
        worker.reset(*job, state, settle_steps=0)
        error = np.abs(worker.sim_state() - load_init_states(*job)[state]).max()
        worker.reset(*job, state)
        before = worker.object_poses()
        result = worker.step_chunk(np.repeat(PUSH, 3, axis=0), render="none")
        moved = max(np.abs(worker.object_poses()[name][0] - before[name][0]).max() for name in before)
        return error, moved, result.success

    results = dict(run_jobs(jobs, run, lambda: LiberoWorker(libero_assets, cameras=False), 2, group=lambda job: job[0]))
    assert sorted(results) == sorted(jobs)
    for job, (error, moved, success) in results.items():
        assert error == 0.0, job
        assert moved < 0.01, job  # objects are at rest; the arm is far from them
        assert not success, job


@pytest.mark.usefixtures("drawing")
def test_tasks_of_every_suite_draw_and_probes_find_the_right_physics(libero_assets: Assets) -> None:
    with LiberoWorker(libero_assets, image_size=128) as worker:
        pictures = [worker.reset(suite, 3, 0) for suite in ("libero_goal", "libero_10")]
        brightness, _ = probe_floor(worker)
        distance, tilt = probe_settling(worker, (0,))
    for picture in pictures:
        assert all(image.std() > 25 for image in picture.pictures(CAMERAS))
    assert brightness == pytest.approx(133.5, abs=4)
    assert brightness > DARK_FLOOR
    assert distance == pytest.approx(14.5, abs=1)
    assert distance < BOWL_OFF_MM
    assert tilt == pytest.approx(15.9, abs=1)


@pytest.mark.parametrize(("suite", "task"), [("libero_object", 4), ("libero_spatial", 2)])
def test_expert_succeeds_with_the_real_assets(suite: str, task: int, libero_assets: Assets) -> None:
    """One episode each; the rates over 50 states come from `scripts/collect_scripted_demos.py --dry_run true`."""
    items = expert_items(suite, [task], 1)
    (done,) = run_expert(
        items,
        lambda: LiberoWorker(libero_assets, cameras=False),
        num_workers=1,
        noise=0.05,
        seed=0,
        collection=None,
    )
    assert done.outcome.success
