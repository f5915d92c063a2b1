"""Where a run keeps its files, and how a restarted command finds the run that it has to continue.

{local_log_dir}/EVAL-{suite}-{family}-{timestamp}[--note].txt    text log, as the original writes it
{local_log_dir}/EVAL-{suite}-{family}-{timestamp}[--note]/
    run.json         flags, resolved settings, checkpoint hash, versions: written before the first episode
    episodes.jsonl   one line per episode as it ends
    results.json     rates and intervals, written at the end
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from prismo.eval.results import EpisodeLog
from prismo.util.files import write_json
from prismo.util.locks import LockedError, take_lock
from prismo.util.schema import read_json

_LOG = logging.getLogger(__name__)

TIMESTAMP = "%Y_%m_%d-%H_%M_%S"
_RUN, _EPISODES, _RESULTS, _LOCK = "run.json", "episodes.jsonl", "results.json", ".lock"


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
        return f"EVAL-{self.suite}-{self.family}-"

    def name(self, timestamp: str) -> str:
        """The original's run id."""
        return f"{self.prefix}{timestamp}" + (f"--{self.note}" if self.note else "")


@dataclass(frozen=True)
class RunFile:
    """Content of run.json.

    Attributes:
        suite, family, note, settings: of the identity.
        timestamp: of the first start, in the run's name.
        checkpoint: as the user named it.
        versions: at the first start (`prismo.eval.versions.collect_versions`).
    """

    suite: str
    family: str
    note: str | None
    timestamp: Annotated[str, Field(pattern=r"^\d{4}(_\d\d){2}-\d\d(_\d\d){2}$")]
    settings: dict[str, Any]
    checkpoint: str
    versions: dict[str, Any]


class RunFolder:
    """An open run; only one process at a time has it.

    Attributes:
        path: its folder.
        about: its run.json, also after a restart that of the first start.
        log: its episodes.
    """

    def __init__(self, path: Path, about: RunFile, lock: IO[bytes]) -> None:
        self.path = path
        self.about = about
        self.log = EpisodeLog(path / _EPISODES)
        self._lock = lock

    @property
    def text_log(self) -> Path:
        """The original's log file, beside the folder."""
        return self.path.with_name(self.path.name + ".txt")

    @property
    def results_file(self) -> Path:
        return self.path / _RESULTS

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()


def open_run(
    root: str | Path,
    identity: RunIdentity,
    *,
    checkpoint: str,
    versions: dict[str, Any],
    resume: bool,
    retry_errors: bool,
) -> tuple[RunFolder, bool]:
    """The newest unfinished run of this identity, or a new one.

    A finished run is continued only for `retry_errors`, if it has errors. A run that another process is at work on is
    left alone, one whose run.json is damaged is passed over with a warning.

    Args:
        root: `--local_log_dir`.
        checkpoint, versions: for the run.json of a new run.

    Returns:
        The run, and whether it is continued.

    Raises:
        ValueError: the episodes of the run that is to be continued are damaged.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    if resume:
        for path in sorted(root.glob(f"{identity.prefix}*/{_RUN}"), reverse=True):
            run = _continue(path.parent, identity, retry_errors)
            if run is not None:
                return run, True
    return _create(root, identity, checkpoint, versions), False


def _continue(path: Path, identity: RunIdentity, retry_errors: bool) -> RunFolder | None:
    """The run in `path`, if it is ours to go on with."""
    try:
        about = read_json(path / _RUN, RunFile)
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
    finished = (path / _RESULTS).is_file()
    if finished and not retry_errors:
        lock.close()
        return None
    run = RunFolder(path, about, lock)
    if finished and not any(r.outcome == "error" for r in run.log.results.values()):
        run.close()
        return None
    return run


def _create(root: Path, identity: RunIdentity, checkpoint: str, versions: dict[str, Any]) -> RunFolder:
    """A new run. Two started in the same second get different names."""
    while True:
        timestamp = datetime.now().strftime(TIMESTAMP)
        path = root / identity.name(timestamp)
        try:
            path.mkdir()
            break
        except FileExistsError:
            continue
    lock = take_lock(path / _LOCK)
    about = RunFile(identity.suite, identity.family, identity.note, timestamp, identity.settings, checkpoint, versions)
    write_json(path / _RUN, asdict(about))
    return RunFolder(path, about, lock)
