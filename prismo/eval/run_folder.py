"""Where a run keeps its files, and how a restarted command finds the run that it has to continue.

{local_log_dir}/EVAL-{suite}-{family}-{timestamp}[--note].txt    text log, as the original writes it
{local_log_dir}/EVAL-{suite}-{family}-{timestamp}[--note]/
    run.json         flags, resolved settings, checkpoint hash, versions: written before the first episode
    episodes.jsonl   one line per episode as it ends
    results.json     rates and intervals, written at the end
"""

from __future__ import annotations

import fcntl
import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from prismo.eval.results import EpisodeLog
from prismo.util.files import write_json
from prismo.util.schema import JsonObject, read_json

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


class RunFolder:
    """An open run; only one process at a time has it.

    Attributes:
        path: its folder.
        timestamp: of its start, also after a restart.
        log: its episodes.
    """

    def __init__(self, path: Path, timestamp: str, lock: IO[bytes]) -> None:
        self.path = path
        self.timestamp = timestamp
        self.log = EpisodeLog(path / _EPISODES)
        self._lock = lock

    @property
    def text_log(self) -> Path:
        """The original's log file, beside the folder."""
        return self.path.with_name(self.path.name + ".txt")

    @property
    def results_file(self) -> Path:
        return self.path / _RESULTS

    @property
    def description(self) -> dict[str, Any]:
        """Content of run.json."""
        return read_json(self.path / _RUN, JsonObject)

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()


def open_run(
    root: str | Path, identity: RunIdentity, description: dict[str, Any], *, resume: bool, retry_errors: bool
) -> tuple[RunFolder, bool]:
    """The newest unfinished run of this identity, or a new one.

    A finished run is continued only for `retry_errors`, if it has errors. A run that another process is at work on is
    left alone.

    Args:
        root: `--local_log_dir`.
        description: what run.json holds besides identity and timestamp.

    Returns:
        The run, and whether it is continued.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    if resume:
        for path in sorted(root.glob(f"{identity.prefix}*/{_RUN}"), reverse=True):
            run = _continue(path.parent, identity, retry_errors)
            if run is not None:
                return run, True
    return _create(root, identity, description), False


def _continue(path: Path, identity: RunIdentity, retry_errors: bool) -> RunFolder | None:
    """The run in `path`, if it is ours to go on with."""
    stored = read_json(path / _RUN, JsonObject)
    if stored.get("settings") != identity.settings or stored.get("note") != identity.note:
        return None
    lock = _lock(path)
    if lock is None:
        _LOG.info("another process is at work on %s", path)
        return None
    run = RunFolder(path, stored["timestamp"], lock)
    finished = run.results_file.is_file()
    if finished and not (retry_errors and any(r.outcome == "error" for r in run.log.results.values())):
        run.close()
        return None
    return run


def _create(root: Path, identity: RunIdentity, description: dict[str, Any]) -> RunFolder:
    """A new run. Two started in the same second get different names."""
    while True:
        timestamp = datetime.now().strftime(TIMESTAMP)
        path = root / identity.name(timestamp)
        try:
            path.mkdir()
            break
        except FileExistsError:
            continue
    lock = _lock(path)
    about = {"suite": identity.suite, "family": identity.family, "note": identity.note, "timestamp": timestamp}
    write_json(path / _RUN, {**about, "settings": identity.settings, **description})
    return RunFolder(path, timestamp, lock)


def _lock(path: Path) -> IO[bytes] | None:
    """The open lock file, or None if another process holds it; the system lets go of it when a process dies."""
    file = (path / _LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
