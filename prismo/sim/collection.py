"""A folder of demonstrations in the making: one HDF5 file per task at the end, nothing lost on the way there.

Used by the scripted expert and by the regeneration of LIBERO's data (`prismo.sim.collect`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prismo.sim.demos import EpisodeOutcome, assemble, demo_file_name
from prismo.sim.interface import SimInfo
from prismo.sim.suites import LiberoTask
from prismo.util.files import write_json
from prismo.util.schema import JsonObject, read_json

_AGAIN = "remove it, and its demonstration is made again"


@dataclass(frozen=True)
class Item:
    """Demonstration `index` of a task."""

    task: LiberoTask
    index: int


@dataclass(frozen=True)
class Finished:
    """An item and what became of it."""

    item: Item
    outcome: EpisodeOutcome


def follow(outcomes: Iterable[Finished], total: int, title: str, word: str) -> list[Finished]:
    """All outcomes, with a progress bar that counts the successes and calls them `word`."""
    finished: list[Finished] = []
    for done in (progress := tqdm(outcomes, total=total, unit="demo", desc=title)):
        finished.append(done)
        progress.set_postfix_str(f"{sum(d.outcome.success for d in finished)} {word}", refresh=False)
    return finished


class Collection:
    """Keeps demonstrations and outcomes of finished items, and joins them when all are there.

    Args:
        folder: of the HDF5 files.
        settings: what all demonstrations in it have in common; a folder takes only one set.
        tasks: that are to be added.
        overwrite: empty the folder first if it is one of ours.

    Raises:
        FileExistsError: a task is already finished in it, or `overwrite` would remove files of others.
        ValueError: the folder holds work done with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], tasks: Iterable[LiberoTask], *, overwrite: bool) -> None:
        self.folder = folder
        note = folder / "collection.json"
        if overwrite and folder.exists():
            if not note.exists() and any(folder.iterdir()):
                raise FileExistsError(f"{folder} holds files of others; choose another folder or empty it yourself")
            shutil.rmtree(folder)
        for task in tasks:
            file = folder / demo_file_name(task)
            if file.exists() and not any(folder.glob(f"parts/{task.name}_*.json")):
                raise FileExistsError(
                    f"{file} is finished; give --overwrite to make the folder anew, or choose another"
                )
        if note.exists() and read_json(note, JsonObject) != settings:
            raise ValueError(
                f"{folder} was made with {read_json(note, JsonObject)}; the flags now say {settings}. "
                "Choose another folder"
            )
        write_json(note, settings)

    def demo_file(self, item: Item) -> Path:
        """Where the simulator process puts the item's demonstration."""
        return self.folder / "parts" / f"{item.task.name}_{item.index}.hdf5"

    def finished(self, items: Sequence[Item]) -> list[Finished]:
        """The items that an earlier run finished."""
        return [
            Finished(item, read_json(note, EpisodeOutcome, advice=_AGAIN))
            for item in items
            if (note := self._note(item)).exists()
        ]

    def note(self, done: Finished) -> None:
        """Remember that an item is finished (after its demonstration was written)."""
        write_json(self._note(done.item), asdict(done.outcome))

    def join(self, done: Sequence[Finished], info: SimInfo) -> dict[LiberoTask, int]:
        """Write `<task>_demo.hdf5` of every task from its successes; return their number by task (perhaps 0)."""
        counts: dict[LiberoTask, int] = {}
        for task in sorted({d.item.task for d in done}, key=lambda task: task.index):
            successes = [d.item for d in done if d.item.task == task and d.outcome.success]
            counts[task] = len(successes)
            if successes:
                parts = {item.index: self.demo_file(item) for item in successes}
                assemble(self.folder / demo_file_name(task), parts, task, info)
        return counts

    def discard_parts(self) -> None:
        """Remove what `join` has made superfluous."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def _note(self, item: Item) -> Path:
        return self.demo_file(item).with_suffix(".json")
