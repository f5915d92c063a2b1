"""Demonstrations of the scripted expert: the work behind `scripts/collect_scripted_demos.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prismo.sim.demos import Demo, assemble, demo_file_name, write_demo
from prismo.sim.interface import SimulatorError
from prismo.sim.parallel import run_jobs
from prismo.sim.rates import Rate
from prismo.sim.suites import load_init_states, load_task, load_tasks
from prismo.sim.worker import SimWorker
from prismo.util.files import read_json, write_json

# Tasks that the expert solves; measured with `scripts/collect_scripted_demos.py --dry_run true`.
EXPERT_TASKS = {"libero_object": tuple(range(10)), "libero_spatial": (0, 1, 2, 3, 5, 8)}
_EPISODE_TIMEOUT_S = 1200.0


@dataclass(frozen=True)
class Attempt:
    """One episode of the expert: initial state `index` (modulo their number), scene and noise seeded by `seed`."""

    suite: str
    task_id: int
    index: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt."""

    attempt: Attempt
    success: bool
    steps: int


def expert_task_ids(suite: str, wanted: list[int] | None = None) -> tuple[int, ...]:
    """The wanted tasks (default: all that the expert knows).

    Raises:
        ValueError: the expert does not know one of them.
    """
    load_tasks(suite)  # names the suites if this one does not exist
    known = EXPERT_TASKS.get(suite, ())
    unknown = [task for task in wanted or () if task not in known]
    if unknown or not known:
        table = "; ".join(f"{name}: {list(tasks)}" for name, tasks in EXPERT_TASKS.items())
        raise ValueError(f"the scripted expert does not know {suite} tasks {unknown or 'at all'}. It knows {table}")
    return tuple(wanted) if wanted else known


class Collection:
    """A folder that fills with one HDF5 file per task; whatever is finished in it is not done again.

    Args:
        folder: e.g. `demos/libero_object_scripted`.
        noise: the expert's; part of the identity of the collection, like the assets.
        assets: `SimInfo.assets`.

    Raises:
        ValueError: the folder holds demonstrations made with another setting.
    """

    def __init__(self, folder: Path, noise: float, assets: str) -> None:
        self._folder = folder
        settings = {"noise": noise, "assets": assets}
        note = folder / "collection.json"
        if note.exists() and read_json(note) != settings:
            raise ValueError(f"{folder} was collected with {read_json(note)}, not {settings}; choose another folder")
        write_json(note, settings)

    def outcome(self, attempt: Attempt) -> Outcome | None:
        """Of a former run, None if this attempt was not finished."""
        note = self._note(attempt)
        return Outcome(attempt, **read_json(note)) if note.exists() else None

    def add(self, outcome: Outcome, demo: Demo) -> None:
        """Keep a demonstration if it succeeded, and note the outcome."""
        if outcome.success:
            write_demo(self._part(outcome.attempt), demo)
        write_json(self._note(outcome.attempt), {"success": outcome.success, "steps": outcome.steps})

    def finish(self, outcomes: list[Outcome], worker: SimWorker) -> list[Path]:
        """Join the successes of each task into its `<task>_demo.hdf5`; return these files.

        Raises:
            SimulatorError: a task has none (the files of the others are written).
        """
        written, empty = [], []
        for suite, task_id in sorted({(o.attempt.suite, o.attempt.task_id) for o in outcomes}):
            task = load_task(suite, task_id)
            parts = {
                o.attempt.index: self._part(o.attempt)
                for o in outcomes
                if o.success and (o.attempt.suite, o.attempt.task_id) == (suite, task_id)
            }
            if not parts:
                empty.append(task.name)
                continue
            written.append(self._folder / demo_file_name(task))
            assemble(written[-1], parts, task, worker.info)
        if empty:
            raise SimulatorError(f"no successful demonstration of {', '.join(empty)}")
        shutil.rmtree(self._folder / "parts")
        return written

    def _stem(self, attempt: Attempt) -> Path:
        return self._folder / "parts" / f"{load_task(attempt.suite, attempt.task_id).name}_{attempt.index}"

    def _part(self, attempt: Attempt) -> Path:
        return self._stem(attempt).with_suffix(".hdf5")

    def _note(self, attempt: Attempt) -> Path:
        return self._stem(attempt).with_suffix(".json")


def run_attempts(
    attempts: list[Attempt],
    make_worker: Callable[[], SimWorker],
    *,
    num_workers: int,
    noise: float,
    collection: Collection | None,
) -> Iterator[Outcome]:
    """Run the expert and yield outcomes as they come; with a `collection`, record pictures and keep successes."""

    def run(worker: SimWorker, attempt: Attempt) -> tuple[Demo, bool]:
        count = len(load_init_states(attempt.suite, attempt.task_id))
        return worker.request(
            "expert_episode",
            _EPISODE_TIMEOUT_S,
            suite=attempt.suite,
            task_id=attempt.task_id,
            init_state=attempt.index % count,
            seed=attempt.seed,
            noise=noise,
            record=collection is not None,
        )

    finished = [collection.outcome(attempt) for attempt in attempts] if collection else [None] * len(attempts)
    yield from (outcome for outcome in finished if outcome is not None)
    missing = [attempt for attempt, outcome in zip(attempts, finished, strict=True) if outcome is None]
    for attempt, (demo, success) in run_jobs(
        missing, run, make_worker, num_workers, group=lambda attempt: (attempt.suite, attempt.task_id)
    ):
        outcome = Outcome(attempt, success, len(demo))
        if collection is not None:
            collection.add(outcome, demo)
        yield outcome


def table(outcomes: list[Outcome]) -> str:
    """Success per task with 95 % intervals, and the length of successful episodes."""
    rows, total = [], Rate(0, 0)
    for suite, task_id in sorted({(o.attempt.suite, o.attempt.task_id) for o in outcomes}):
        own = [o for o in outcomes if (o.attempt.suite, o.attempt.task_id) == (suite, task_id)]
        rate = Rate(sum(o.success for o in own), len(own))
        steps = [o.steps for o in own if o.success] or [0]
        name = load_task(suite, task_id).language
        rows.append(f"| {suite} {task_id} | {name} | {rate} | {sum(steps) / len(steps):.0f} | {max(steps)} |")
        total += rate
    head = ["| task | instruction | success [Wilson 95 %] | mean steps | max steps |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, f"| all | | {total} | | |"])
