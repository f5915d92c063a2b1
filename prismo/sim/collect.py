"""Demonstrations of the scripted expert and of LIBERO's humans: what `prismo data collect` and `regenerate` do.

The latter follows the procedure with which OpenVLA made its `libero_*_no_noops` data: replay each demonstration at 256
pixels, leaving out actions that do nothing, and keep it if the task succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prismo.sim.collection import Collection, Finished, Item
from prismo.sim.demos import EpisodeOutcome, demo_file_name, demo_indices, read_demo
from prismo.sim.parallel import run_jobs
from prismo.sim.rates import Rate
from prismo.sim.suites import check_task_ids, load_init_states, load_tasks
from prismo.sim.worker import SimWorker
from prismo.util.files import write_json

# Tasks that the expert solves; measured with `prismo data collect --dry_run true`.
EXPERT_TASKS = {"libero_object": tuple(range(10)), "libero_spatial": (0, 1, 2, 3, 5, 8)}
_EPISODE_TIMEOUT_S, _REPLAY_TIMEOUT_S = 1200.0, 1800.0


def expert_items(suite: str, task_ids: list[int] | None, demos_per_task: int) -> list[Item]:
    """The first episodes of the wanted tasks (default: all that the expert knows).

    Raises:
        ValueError: the expert does not know one of them.
    """
    check_task_ids(suite, task_ids)
    tasks = load_tasks(suite)
    known = EXPERT_TASKS.get(suite, ())
    wanted = known if task_ids is None else tuple(sorted(set(task_ids)))
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        table = "; ".join(f"{name} {list(ids)}" for name, ids in EXPERT_TASKS.items())
        raise ValueError(f"the scripted expert does not know {suite} {unknown or ''}. It knows tasks of {table}")
    return [Item(tasks[task_id], index) for task_id in wanted for index in range(demos_per_task)]


def run_expert(
    items: Sequence[Item],
    make_worker: Callable[[], SimWorker],
    *,
    num_workers: int,
    noise: float,
    seed: int,
    collection: Collection | None,
) -> Iterator[Finished]:
    """Run the expert and yield outcomes as they come.

    Args:
        items: episode k of a task starts from initial state k (modulo their number).
        make_worker: simulators; they need cameras only for a collection.
        num_workers: of them.
        noise: see `prismo.sim.expert.Expert`.
        seed: episode k uses seed + k for scene and noise.
        collection: takes successes, and knows what an earlier run did. None: only outcomes.
    """

    def run(worker: SimWorker, item: Item, **where: Any) -> dict[str, Any]:
        init_state = item.index % len(load_init_states(item.task.suite, item.task.index))
        chosen = {"init_state": init_state, "seed": seed + item.index, "noise": noise}
        return worker.request("expert_episode", _EPISODE_TIMEOUT_S, **where, **chosen)

    return run_items(items, run, make_worker, num_workers, collection)


def success_table(finished: Sequence[Finished]) -> str:
    """Markdown: success per task with 95 % intervals, and the length of successful episodes."""
    rows = ["| task | instruction | success [Wilson 95 %] | mean steps | max steps |", "|---|---|---|---|---|"]
    for task in sorted({done.item.task for done in finished}, key=lambda task: task.index):
        outcomes = [done.outcome for done in finished if done.item.task == task]
        rate = Rate(sum(outcome.success for outcome in outcomes), len(outcomes))
        steps = [outcome.steps for outcome in outcomes if outcome.success] or [0]
        mean = sum(steps) / len(steps)
        rows.append(f"| {task.suite} {task.index} | {task.language} | {rate} | {mean:.0f} | {max(steps)} |")
    total = Rate(sum(done.outcome.success for done in finished), len(finished))
    return "\n".join([*rows, f"| all | | {total} | | |"])


def raw_items(suite: str, raw_folder: Path, task_ids: list[int] | None = None) -> list[Item]:
    """All demonstrations of a suite's HDF5 files.

    Raises:
        FileNotFoundError: a task's file is missing.
        ValueError: the suite has no such task, or a file does not have LIBERO's schema.
    """
    check_task_ids(suite, task_ids)
    tasks = load_tasks(suite)
    wanted = tasks if task_ids is None else tuple(tasks[index] for index in sorted(set(task_ids)))
    missing = [demo_file_name(task) for task in wanted if not (raw_folder / demo_file_name(task)).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{raw_folder} lacks {len(missing)} of {len(wanted)} demonstration files of {suite}, e.g. {missing[0]}. "
            "Expected the folder of that suite from LIBERO's download"
        )
    return [Item(task, index) for task in wanted for index in demo_indices(raw_folder / demo_file_name(task))]


def regenerate(
    items: Sequence[Item],
    raw_folder: Path,
    make_worker: Callable[[], SimWorker],
    *,
    num_workers: int,
    seed: int,
    collection: Collection,
) -> Iterator[Finished]:
    """Replay demonstrations, keep successes in `collection`, yield outcomes as they come.

    Args:
        items: of `raw_items`.
        raw_folder: with the files.
        make_worker: simulators with cameras.
        num_workers: of them.
        seed: demonstration k uses seed + k for the poses of fixtures, unless its file says which seed it had.
        collection: the target.
    """

    def run(worker: SimWorker, item: Item, **where: Any) -> dict[str, Any]:
        demo = {"source": raw_folder / demo_file_name(item.task), "index": item.index, "seed": seed + item.index}
        return worker.request("replay_demo", _REPLAY_TIMEOUT_S, **where, **demo, drop_noops=True)

    return run_items(items, run, make_worker, num_workers, collection)


def write_metainfo(path: Path, finished: Sequence[Finished], raw_folder: Path) -> None:
    """Success and initial state of every demonstration, as `--initial_states_path` of the evaluation reads them."""
    info: dict[str, dict[str, Any]] = {}
    for done in sorted(finished, key=lambda done: (done.item.task.index, done.item.index)):
        task, index = done.item.task, done.item.index
        state = read_demo(raw_folder / demo_file_name(task), index, images=False).states[0]
        entry = {"success": done.outcome.success, "initial_state": state.tolist()}
        info.setdefault(task.language.replace(" ", "_"), {})[f"demo_{index}"] = entry
    write_json(path, info)


def run_items(
    items: Sequence[Item],
    request: Callable[..., dict[str, Any]],
    make_worker: Callable[[], SimWorker],
    num_workers: int,
    collection: Collection | None,
) -> Iterator[Finished]:
    """Yield what the collection has of `items`, then the rest as workers finish it.

    Args:
        request: asks a worker for an item, given suite, task_id and target; the answer is an `EpisodeOutcome`.
    """

    def run(worker: SimWorker, item: Item) -> EpisodeOutcome:
        target = collection.demo_file(item) if collection else None
        where = {"suite": item.task.suite, "task_id": item.task.index, "target": target}
        return EpisodeOutcome(**request(worker, item, **where))

    finished = collection.finished(items) if collection else []
    yield from finished
    known = {done.item for done in finished}
    missing = [item for item in items if item not in known]
    for item, outcome in run_jobs(missing, run, make_worker, num_workers, group=lambda item: item.task):
        done = Finished(item, outcome)
        if collection is not None:
            collection.note(done)
        yield done
