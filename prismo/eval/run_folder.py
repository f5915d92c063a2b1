"""Where a run keeps its files, and how a restarted command finds the run that it has to continue.

{local_log_dir}/EVAL-{suite}-{family}-{timestamp}[--note].txt    text log, as the original writes it
{local_log_dir}/EVAL-{suite}-{family}-{timestamp}[--note]/
    run.json         resolved settings, checkpoint hash, versions: written before the first episode
    plan.json        flags of the last start, and the episodes of every task
    episodes.jsonl   one line per episode as it ends
    results.json     rates and intervals, written at the end
    overview.png     outcome of every episode, rates of every task; drawn at the end and when it is stopped
    videos/          links to the videos, with readable names
{local_log_dir}/latest                                           link to the folder of the run that was started last
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from prismo.eval.config import EvalConfig
from prismo.eval.episode import Episode
from prismo.eval.results import EpisodeLog, EpisodeResult, read_episodes
from prismo.sim.interface import Task
from prismo.util.files import point_link, write_json
from prismo.util.locks import LockedError, take_lock
from prismo.util.schema import read_json

_LOG = logging.getLogger(__name__)

TIMESTAMP = "%Y_%m_%d-%H_%M_%S"
RUN, EPISODES, RESULTS, _PLAN, _LOCK = "run.json", "episodes.jsonl", "results.json", "plan.json", ".lock"
LATEST = "latest"


@dataclass(frozen=True)
class RunIdentity:
    """What makes two commands the same evaluation.

    Attributes:
        suite, family, note: appear in the run's name.
        settings: everything that changes an episode (JSON values); a run with others is never continued.
    """

    suite: str
    family: str
    note: str | None
    settings: dict[str, Any]

    @property
    def prefix(self) -> str:
        """Of the run's name."""
        return f"EVAL-{self.suite}-{self.family}-"


@dataclass(frozen=True)
class RunFile(RunIdentity):
    """Content of run.json.

    Attributes:
        timestamp: of the first start, in the run's name.
        checkpoint: as the user named it.
        versions: at the first start (`prismo.eval.versions.collect_versions`).
    """

    timestamp: Annotated[str, Field(pattern=r"^\d{4}(_\d\d){2}-\d\d(_\d\d){2}$")]
    checkpoint: str
    versions: dict[str, Any]


@dataclass(frozen=True)
class PlannedTask:
    """A task of a run.

    Attributes:
        task_id, task: index and instruction.
        trials: initial states of its episodes.
    """

    task_id: int
    task: str
    trials: tuple[int, ...]


@dataclass(frozen=True)
class PlanFile:
    """Content of plan.json.

    Attributes:
        flags: of the last start.
        tasks: in the order in which they are played.
    """

    flags: dict[str, Any]
    tasks: tuple[PlannedTask, ...]


class EvalFolder:
    """An open run; only one process at a time has it.

    Attributes:
        path: its folder.
        about: its run.json, also after a restart that of the first start.
        log: its episodes.
    """

    def __init__(self, path: Path, about: RunFile, lock: IO[bytes]) -> None:
        self.path = path
        self.about = about
        self.log = EpisodeLog(path / EPISODES)
        self._lock = lock

    @property
    def text_log(self) -> Path:
        """The original's log file, beside the folder."""
        return self.path.with_name(self.path.name + ".txt")

    @property
    def results_file(self) -> Path:
        return self.path / RESULTS

    def begin(self, cfg: EvalConfig, episodes: Sequence[Episode]) -> None:
        """Write plan.json, and let `latest` lead here."""
        tasks: dict[Task, list[int]] = {}
        for episode in episodes:
            tasks.setdefault(episode.task, []).append(episode.init_state)
        planned = [PlannedTask(task.index, task.language, tuple(trials)) for task, trials in tasks.items()]
        write_json(self.path / _PLAN, asdict(PlanFile(asdict(cfg), tuple(planned))))
        point_link(self.path.with_name(LATEST), self.path)

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()


def read_run(folder: Path) -> tuple[RunFile, PlanFile, dict[int, EpisodeResult]]:
    """What a run folder holds: how it was begun, its plan, its episodes by number. Others may be at work on it.

    Raises:
        FileNotFoundError: no evaluation was begun there.
        ValueError: a file of it is damaged.
    """
    for name in (RUN, _PLAN):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no evaluation that was begun: it has no {name}")
    episodes = folder / EPISODES
    results = read_episodes(episodes) if episodes.is_file() else {}
    return read_json(folder / RUN, RunFile), read_json(folder / _PLAN, PlanFile), results


def open_run(cfg: EvalConfig, identity: RunIdentity, versions: dict[str, Any]) -> tuple[EvalFolder, bool]:
    """The newest unfinished run of this identity, or a new one.

    A finished run is continued only for `--retry_errors`, if it has errors. A run that another process is at work on is
    left alone, one whose run.json is damaged is passed over with a warning.

    Args:
        versions: for the run.json of a new run.

    Returns:
        The run, and whether it is continued.

    Raises:
        ValueError: the episodes of the run that is to be continued are damaged.
    """
    root = Path(cfg.local_log_dir)
    root.mkdir(parents=True, exist_ok=True)
    if cfg.resume:
        for path in sorted(root.glob(f"{identity.prefix}*/{RUN}"), reverse=True):
            run = _continue(path.parent, identity, cfg.retry_errors)
            if run is not None:
                return run, True
    return _create(root, identity, cfg.pretrained_checkpoint, versions), False


def _continue(path: Path, identity: RunIdentity, retry_errors: bool) -> EvalFolder | None:
    """The run in `path`, if it is ours to go on with."""
    try:
        about = read_json(path / RUN, RunFile)
    except ValueError as error:
        _LOG.warning("%s is passed over: %s", path.name, error)
        return None
    if about.settings != identity.settings or about.note != identity.note:
        return None
    try:
        lock = take_lock(path / _LOCK)
    except LockedError as error:
        _LOG.info("%s", error)
        return None
    finished = (path / RESULTS).is_file()
    if finished and not retry_errors:
        lock.close()
        return None
    run = EvalFolder(path, about, lock)
    if finished and not any(r.outcome == "error" for r in run.log.results.values()):
        run.close()
        return None
    return run


def _create(root: Path, identity: RunIdentity, checkpoint: str, versions: dict[str, Any]) -> EvalFolder:
    """A new run. Two started in the same second get different names."""
    while True:
        timestamp = datetime.now().strftime(TIMESTAMP)
        note = f"--{identity.note}" if identity.note else ""
        path = root / f"{identity.prefix}{timestamp}{note}"  # the original's run id
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    lock = take_lock(path / _LOCK)
    about = RunFile(**vars(identity), timestamp=timestamp, checkpoint=checkpoint, versions=versions)
    write_json(path / RUN, asdict(about))
    return EvalFolder(path, about, lock)
