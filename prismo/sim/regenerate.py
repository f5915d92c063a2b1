"""LIBERO's human demonstrations without no-ops and failures: the work behind `prismo data regenerate`.

The procedure with which OpenVLA made its `libero_*_no_noops` data: replay each demonstration at 256 pixels, leaving out
actions that do nothing, and keep it if the task succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prismo.sim.collect import run_items
from prismo.sim.collection import Collection, Finished, Item
from prismo.sim.demos import demo_file_name, demo_indices, read_demo
from prismo.sim.suites import check_task_ids, load_tasks
from prismo.sim.worker import SimWorker
from prismo.util.files import write_json

_REPLAY_TIMEOUT_S = 1800.0


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
