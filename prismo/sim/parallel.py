"""Many jobs on a few simulator processes, each of which keeps to one task as long as it can.

For work whose jobs need no model: collecting and regenerating demonstrations. (Roll-outs of a policy batch their
queries and are scheduled by the evaluation.)
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

from prismo.sim.interface import SimulatorCrashed, SimulatorTimeout
from prismo.sim.worker import SimWorker

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")

_ATTEMPTS = 3
_LOOK_S = 0.1


def run_jobs(
    jobs: Sequence[Job],
    run: Callable[[SimWorker, Job], Result],
    make_worker: Callable[[], SimWorker],
    num_workers: int,
    group: Callable[[Job], Hashable],
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, result) as they finish. A job whose simulator died or hung is repeated with a new one.

    Args:
        jobs: all of them.
        run: one job; called in a thread of its own per worker.
        make_worker: for each thread.
        num_workers: threads, each with a simulator process.
        group: jobs of the same group (task) go to the same worker while others have work, since changing the task
            means building another scene.

    Raises:
        Exception: the first one that a job raised (after 3 attempts if its simulator died); all workers are ended.
    """
    pending = _Pending(jobs, group)
    done: queue.Queue[tuple[Job | None, Any]] = queue.Queue()
    workers = [make_worker() for _ in range(min(num_workers, len(jobs)))]

    def work(worker: SimWorker) -> None:
        try:
            with worker:
                while (job := pending.take(worker)) is not None:
                    done.put((job, _attempt(run, worker, job, pending)))
        except BaseException as error:  # handed over to the caller's thread
            done.put((None, error))

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            job, result = done.get()
            if job is None:
                raise result
            yield job, result
    finally:
        pending.stop()
        for worker, thread in zip(workers, threads, strict=True):
            while thread.is_alive():  # it may be about to start its simulator
                worker.interrupt()
                thread.join(_LOOK_S)


def _attempt(run: Callable[[SimWorker, Job], Result], worker: SimWorker, job: Job, pending: _Pending) -> Result:
    for _ in range(_ATTEMPTS - 1):
        try:
            return run(worker, job)
        except (SimulatorCrashed, SimulatorTimeout) as error:
            if pending.stopped:
                raise
            log.warning("%s; repeating the job with a new simulator", error)
    return run(worker, job)


class _Pending:
    """Jobs that nobody has taken, by group."""

    def __init__(self, jobs: Sequence[Any], group: Callable[[Any], Hashable]) -> None:
        self._lock = threading.Lock()
        self.stopped = False
        self._groups: dict[Hashable, deque] = {}
        self._owned: dict[SimWorker, Hashable] = {}
        for job in jobs:
            self._groups.setdefault(group(job), deque()).append(job)

    def take(self, worker: SimWorker) -> Any | None:
        """The next job of the worker's group; else of a group that nobody works on, the longest first; else of any."""
        with self._lock:
            current = self._owned.pop(worker, None)
            open_groups = [name for name, jobs in self._groups.items() if jobs]
            if not open_groups:
                return None
            if current not in open_groups:
                taken = set(self._owned.values())
                current = max(open_groups, key=lambda name: (name not in taken, len(self._groups[name])))
            self._owned[worker] = current
            return self._groups[current].popleft()

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            self._groups.clear()
