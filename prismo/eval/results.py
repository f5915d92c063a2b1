"""Results of an evaluation: one JSON line per episode as it ends, and a summary with intervals.

`EpisodeLog` is the memory of a run: what is in it is done, whatever happens to the process afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import Field, FiniteFloat

from prismo.eval.episode import Outcome
from prismo.sim.rates import Rate
from prismo.util.schema import read_json_lines

Count = Annotated[int, Ge(0)]
Ordinal = Annotated[int, Ge(1)]
Seconds = Annotated[FiniteFloat, Ge(0)]


@dataclass(frozen=True)
class EpisodeResult:
    """One line of `episodes.jsonl`.

    Attributes:
        episode: 1-based number in the run.
        suite, task_id, task: what was to be done.
        init_state: index of the initial state.
        env_seed, policy_seed: seeds of the scene and of the policy.
        outcome: "success", "failure" or "error" (something broke; says nothing of the policy).
        steps: policy steps executed.
        queries: predictions asked of the policy.
        seconds, policy_seconds: wall time, and the policy's share.
        actions_sha256: of the executed actions (16 hex digits).
        attempts: 1, or more where a simulator had died.
        video: path, or None.
        error: traceback, or None.
        finished: local time, ISO 8601.
        versions: of what played it (`prismo.eval.versions.episode_versions`); empty in lines of earlier releases.
    """

    episode: Ordinal
    suite: str
    task_id: Count
    task: str
    init_state: Count
    env_seed: Count
    policy_seed: Count
    outcome: Outcome
    steps: Count
    queries: Count
    seconds: Seconds
    policy_seconds: Seconds
    actions_sha256: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    attempts: Ordinal = 1
    video: str | None = None
    error: str | None = None
    finished: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)


class EpisodeLog:
    """An append-only file of `EpisodeResult` lines that survives a killed process.

    Args:
        path: `episodes.jsonl`; created if need be. A half-written last line is cut off.

    Attributes:
        results: by episode number; the last line of an episode counts.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.results: dict[int, EpisodeResult] = {}
        if self._path.is_file():
            content = self._path.read_bytes()
            os.truncate(self._path, content.rfind(b"\n") + 1)
            self.results = read_episodes(self._path)

    def append(self, result: EpisodeResult) -> None:
        """Add one line and flush it to the disk; a line that does not fit there is taken back.

        Raises:
            OSError: the disk is full or gone.
        """
        line = (json.dumps(asdict(result), ensure_ascii=False) + "\n").encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(handle).st_size
            try:
                while line:
                    line = line[os.write(handle, line) :]  # a disk that fills up takes a part of it
                os.fsync(handle)
            except BaseException as error:
                if line or isinstance(error, OSError):  # a signal during the flush costs no episode
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
        self.results[result.episode] = result


def read_episodes(path: Path) -> dict[int, EpisodeResult]:
    """Episodes of an `episodes.jsonl` by number, also while it is written; the last line of an episode counts.

    Raises:
        ValueError: a line is damaged.
        OSError: it cannot be read.
    """
    advice = "remove the line (its episode is then repeated) or start a new run with --resume False"
    return {r.episode: r for r in read_json_lines(path, EpisodeResult, advice=advice, growing=True)}


@dataclass(frozen=True)
class Tally:
    """Outcomes of a group of episodes.

    Attributes:
        episodes: successes + failures + errors.
        success_rate: successes among successes and failures, in 0..1; None without any. Errors are in neither.
        wilson_95: 95 % interval of that rate.
    """

    episodes: int
    successes: int
    failures: int
    errors: int
    success_rate: float | None
    wilson_95: tuple[float, float] | None


@dataclass(frozen=True)
class Summary:
    """A whole run.

    Attributes:
        total: over all tasks.
        tasks: by task index, with the instruction.
        planned: episodes of the run; more than `total.episodes` while it is unfinished.
    """

    total: Tally
    tasks: Mapping[int, tuple[str, Tally]]
    planned: int

    @property
    def complete(self) -> bool:
        return self.total.episodes == self.planned

    def to_json(self) -> dict[str, Any]:
        """`complete`, `planned`, `total` and `tasks` of results.json."""
        tasks = [{"task_id": i, "task": task, **asdict(tally)} for i, (task, tally) in self.tasks.items()]
        return {"complete": self.complete, "planned": self.planned, "total": asdict(self.total), "tasks": tasks}


def summarize(results: Iterable[EpisodeResult], planned: int) -> Summary:
    """Count outcomes per task and in total."""
    ordered = sorted(results, key=lambda result: result.episode)
    tasks: dict[int, list[EpisodeResult]] = {}
    for result in ordered:
        tasks.setdefault(result.task_id, []).append(result)
    return Summary(
        total=tally(ordered),
        tasks={index: (group[0].task, tally(group)) for index, group in tasks.items()},
        planned=planned,
    )


def tally(results: Sequence[EpisodeResult]) -> Tally:
    """Count outcomes."""
    outcomes = [result.outcome for result in results]
    successes, failures, errors = map(outcomes.count, ("success", "failure", "error"))
    rate = Rate(successes, successes + failures)
    known = (rate.value, rate.wilson()) if rate.episodes else (None, None)
    return Tally(len(outcomes), successes, failures, errors, *known)


def format_table(summary: Summary) -> str:
    """The summary as text: one line per task, then the total."""
    rows = [("task", "", "episodes", "success", "95 % interval", "errors")]
    for index, (task, counts) in summary.tasks.items():
        rows.append((str(index), task, *_columns(counts)))
    rows.append(("total", "", *_columns(summary.total)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _columns(counts: Tally) -> tuple[str, str, str, str]:
    if counts.success_rate is None or counts.wilson_95 is None:
        return str(counts.episodes), "-", "-", str(counts.errors)
    low, high = counts.wilson_95
    rate = f"{100 * counts.success_rate:.1f} %"
    return str(counts.episodes), rate, f"{100 * low:.1f} - {100 * high:.1f}", str(counts.errors)
