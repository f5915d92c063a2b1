"""Jobs on several simulators: each keeps to its task, and a dead one costs nothing but time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import defaultdict

import pytest

from prismo.sim.assets import Assets
from prismo.sim.interface import SimulatorError
from prismo.sim.libero_worker import LiberoWorker
from prismo.sim.parallel import run_jobs

pytestmark = pytest.mark.processes

SUITE = "libero_object"


def test_every_job_runs_once_and_a_dead_simulator_s_again(stand_ins: Assets) -> None:
    jobs = [(task, state) for task in (0, 1) for state in range(3)]
    tasks_of_worker = defaultdict(set)
    victims = {(1, 1)}
    lock = threading.Lock()

    def run(worker: LiberoWorker, job: tuple[int, int]) -> float:
        tasks_of_worker[worker].add(job[0])
        worker.reset(SUITE, *job, settle_steps=0)
        with lock:
            kill = job in victims
            victims.discard(job)
        if kill:
            os.kill(worker.pid, signal.SIGKILL)
        return float(worker.sim_state()[1])

    results = list(run_jobs(jobs, run, lambda: LiberoWorker(stand_ins, cameras=False), 2, group=lambda job: job[0]))
    assert sorted(job for job, _ in results) == jobs
    assert victims == set()
    assert sorted(len(tasks) for tasks in tasks_of_worker.values())[0] == 1  # at most the faster one helps the other
    assert all(worker.pid is None for worker in tasks_of_worker)


def test_first_error_ends_the_work(stand_ins: Assets) -> None:
    workers: list[LiberoWorker] = []

    def make() -> LiberoWorker:
        workers.append(LiberoWorker(stand_ins, cameras=False))
        return workers[-1]

    def run(worker: LiberoWorker, job: int) -> None:
        worker.reset(SUITE, 0, job, settle_steps=0)

    with pytest.raises(SimulatorError, match="initial states 0 to 49; found 50"):
        list(run_jobs([0, 50, 1, 2], run, make, 1, group=lambda _: 0))
    assert [worker.pid for worker in workers] == [None]


def test_nothing_is_started_after_the_end(stand_ins: Assets) -> None:
    """Whoever stops reading (Ctrl-C, an error) stops the work: a killed simulator is not taken for a crashed one."""
    started: list[tuple[int, int]] = []
    workers: list[LiberoWorker] = []
    threads = threading.active_count()

    def make() -> LiberoWorker:
        workers.append(LiberoWorker(stand_ins, cameras=False))
        return workers[-1]

    def run(worker: LiberoWorker, job: tuple[int, int]) -> None:
        started.append(job)
        worker.reset(SUITE, *job, settle_steps=0)
        while job[1]:  # all but the first go on until their simulator is gone
            worker.sim_state()

    results = run_jobs([(task, state) for state in range(3) for task in (0, 1)], run, make, 2, group=lambda job: job[0])
    next(results)
    while (0, 1) not in started and (1, 1) not in started:
        time.sleep(0.01)
    results.close()
    assert threading.active_count() == threads
    assert [worker.pid for worker in workers] == [None, None]
    assert len(started) == len(set(started)) <= 4
