"""RLDS datasets: one dataset's folder, or the root of several."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from prismo.data.dataset import open_dataset
from prismo.data.features import DatasetInfo, read_dataset_info
from prismo.data.normalize import DatasetStats
from prismo.data.resolve import resolve
from prismo.data.specs import SPECS
from prismo.data.statistics import dataset_statistics
from prismo.data.store import EpisodeStore, find_folder, open_store
from prismo.data.tfrecord import read_records
from prismo.verify.checks import Check, Finding, SkippedError, difference, judge, needed
from prismo.verify.facts import DatasetFacts, Published
from prismo.verify.memory import in_bytes
from prismo.verify.statistics import check_plausible, quantile_differences
from prismo.verify.subject import Subject


class RLDSFolder:
    """The checks of one dataset."""

    def __init__(self, subject: Subject, path: Path) -> None:
        self.subject = subject
        self.version = find_folder(path)
        self.name = dataset_name(self.version)

    @cached_property
    def info(self) -> DatasetInfo:
        return read_dataset_info(self.version)

    @cached_property
    def id(self) -> str | None:
        """The user's choice; else the published dataset of that folder name, unless the builder has the folder's name.

        The published builders have other names than their folders; a dataset that was built here has the same.
        """
        if self.subject.name is not None:
            return self.subject.name
        folder = self.version.parent.name
        names = [name for name in self.subject.facts.published if name.rpartition("/")[2] == folder]
        own = needed(lambda: self.info, "description").name == folder
        return None if own or self.subject.alone or not names else names[0]

    @property
    def known(self) -> Published | None:
        return None if self.id is None else self.subject.facts.get(self.id)

    @property
    def facts(self) -> DatasetFacts | None:
        return self.subject.facts.dataset(self.known.keys[0]) if self.known and self.known.keys else None

    @cached_property
    def store(self) -> EpisodeStore:
        if self.name not in SPECS:
            raise SkippedError(f"no description of a dataset `{self.name}` here (data/README.md, 'Your own data')")
        (entry,) = resolve(self.version, self.name)
        return open_store(entry.folder, entry.spec)

    @cached_property
    def statistics(self) -> DatasetStats:
        return dataset_statistics(needed(lambda: self.store, "features"))

    def checks(self, prefix: str) -> Iterator[Check]:
        for name, run, needs in (
            ("description", self._description, ()),
            ("records", self._records, ()),
            ("features", self._features, ("records",)),
            ("instructions", self._instructions, ("features",)),
            ("statistics", lambda: check_plausible({self.name: self.statistics}), ("features",)),
            ("statistics of this id", self._known_statistics, ("features",)),
            ("images", self._images, ("features",)),
            ("windows", self._windows, ("features",)),
        ):
            yield Check(prefix + name, run, tuple(prefix + need for need in needs))

    def _description(self) -> Finding:
        info, known = self.info, self.known
        shards = sum(len(split.files) for split in info.splits)
        splits = ", ".join(f"{split.name} {sum(split.episodes):,}" for split in info.splits)
        text = f"`{info.name}`, {shards} shard{'s' * (shards > 1)}, episodes: {splits}, {len(info.features)} features"
        if known is None:
            return Finding("not known", text)
        pairs = (("builder", known.builder, info.name), ("shards", known.shards, shards))
        lines = [difference(what, a, b) for what, a, b in pairs if a not in (None, b)]
        return judge(f"{text}, as `{self.id}`", lines)

    def _records(self) -> Finding:
        lines, total, size = [], 0, 0
        for split in needed(lambda: self.info, "description").splits:
            for file, expected in zip(split.files, split.episodes, strict=True):
                found, size = 0, size + file.stat().st_size
                try:
                    found = sum(1 for _ in read_records(file))
                except ValueError as error:
                    lines.append(str(error))
                    continue
                total += found
                if found != expected:
                    lines.append(difference(f"episodes in `{file.name}`", expected, found))
        return judge(f"{total:,} episodes in {in_bytes(size)}, all checksums right", lines)

    def _features(self) -> Finding:
        store, robot = self.store, self.store.spec.embodiment
        sizes = {store.image_size(camera) for camera in range(len(store.spec.cameras))}
        pixels = ", ".join("any" if size is None else f"{size[0]} x {size[1]}" for size in sizes)
        text = f"{len(store.spec.cameras)} cameras ({pixels}), action {robot.action_dim}, state {robot.proprio_dim}"
        return Finding("ok", f"{text}, {store.episodes['steps'].sum():,} steps")

    def _instructions(self) -> Finding:
        texts, unnamed = self.store.instructions, int((~self.store.episodes["named"]).sum())
        given = [text for text in texts if text]
        lines = [difference("episodes without an instruction", 0, unnamed)] if unnamed else []
        if self.facts and self.facts.tasks not in (None, len(given)):
            lines.append(difference("tasks", self.facts.tasks, len(given)))
        return judge(f"{len(given)} texts, e.g. {min(given, default='none')!r}", lines)

    def _known_statistics(self) -> Finding:
        stats = self.statistics
        text = f"{stats.num_transitions:,} steps, {stats.num_trajectories:,} episodes"
        if self.facts is None:
            return Finding("not known", text)
        return judge(f"{text} and quantiles as published", quantile_differences(self.name, stats, self.facts))

    def _images(self) -> Finding:
        store, lines = self.store, []
        for episode in sorted({0, len(store.episodes) - 1}):
            row = store.rows(episode, 0, 1)[0]
            for camera, name in enumerate(store.spec.cameras):
                if store.image(episode, row, camera).std() < 1:
                    lines.append(difference(f"`{name}` of episode {episode}", "a picture", "one colour"))
        return judge("first frames of the first and the last episode are pictures", lines)

    def _windows(self) -> Finding:
        windows = open_dataset(self.version, self.name)
        sample, lines = windows[len(windows) // 2], []
        for what, values in (("actions", sample.actions.numpy()), ("state", sample.proprio.numpy())):
            if not np.isfinite(values).all() or np.abs(values).max() > 1 + 1e-5:
                lines.append(difference(what, "numbers in -1..1", f"{values.min():.4g} to {values.max():.4g}"))
        return judge(f"{len(windows):,} training windows, the middle one within -1..1", lines)


def dataset_name(version: Path) -> str:
    """The name under which the project knows the dataset of a version folder."""
    names = (version.parent.name, version.name)
    return next((name for name in names if name in SPECS), version.parent.name)


class RLDS:
    """The kind."""

    title = "RLDS dataset"

    def recognises(self, path: Path) -> bool:
        return bool(self._folders(path))

    def checks(self, subject: Subject) -> list[Check]:
        folders = self._folders(subject.path)
        checks: list[Check] = []
        for folder in folders:
            checks += RLDSFolder(subject, folder).checks(f"{folder.name}: " if len(folders) > 1 else "")
        return checks

    @staticmethod
    def _folders(path: Path) -> list[Path]:
        """The dataset itself, or those below a root."""
        if (path / "dataset_info.json").is_file() or any(path.glob("*/dataset_info.json")):
            return [path]
        return sorted({file.parent.parent for file in path.glob("*/*/dataset_info.json")})
