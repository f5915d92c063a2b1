"""What an evaluation left, where it lies, and the next command to type: at its end, when it is stopped, at any time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismo.eval.config import EvalConfig
from prismo.eval.overview import OVERVIEW, draw_overview
from prismo.eval.results import EpisodeResult, Summary, format_table, summarize
from prismo.eval.run_folder import RESULTS, read_run
from prismo.eval.video import VIDEOS, link_videos
from prismo.util.flags import flag_words

# Flags that are said anew at every start, and those that another checkpoint's run does not take over.
_OF_A_START = ("resume", "retry_errors")
_OF_A_RUN = ("run_id_note", "allow_mixed")


def report(path: Path) -> str:
    """Draw the overview of an evaluation anew, link its videos, and return its summary.

    Args:
        path: folder of the run, or a link to it.

    Raises:
        FileNotFoundError: no evaluation was begun there.
        ValueError: a file of it is damaged.
        OSError: a file of it cannot be read.
    """
    folder = path.resolve()
    about, plan, results = read_run(folder)
    summary = summarize(results.values(), sum(len(task.trials) for task in plan.tasks))
    finished = summary.complete and (folder / RESULTS).is_file()
    picture = f"{folder / OVERVIEW}"
    try:
        draw_overview(folder, about, plan, results.values())
    except (OSError, ValueError) as error:
        picture = f"not drawn: {error}"
    rows = [
        ("results", f"{folder / RESULTS}" if finished else f"{folder / RESULTS} follows at the end"),
        ("text log", f"{folder}.txt"),
        ("overview", picture),
        *_videos(folder, results),
    ]
    state = "finished" if finished else "not finished"
    lines = [f"{folder.name}: {summary.total.episodes} of {summary.planned} episodes, {state}", format_table(summary)]
    lines += [f"  {name:10s} {text}" for name, text in rows]
    return "\n".join([*lines, *_next(folder, plan.flags, summary, finished)])


def _videos(folder: Path, results: Mapping[int, EpisodeResult]) -> list[tuple[str, str]]:
    """Where the videos lie, and where links lead to them."""
    videos = [Path(result.video) for result in results.values() if result.video is not None]
    if not videos:
        return []
    links = link_videos(folder, results.values())
    place = f"{folder / VIDEOS} (links: {links}), " if links else ""
    return [("videos", f"{place}{', '.join(sorted({str(video.parent) for video in videos}))} (files: {len(videos)})")]


def _next(folder: Path, flags: Mapping[str, Any], summary: Summary, finished: bool) -> list[str]:
    """The command that usually comes next, behind a line that says what it does."""
    given = {name: value for name, value in flags.items() if name not in _OF_A_START}
    if Path(given["local_log_dir"]).resolve() != folder.parent:  # typed elsewhere, or the run was moved
        given["local_log_dir"] = str(folder.parent)
    if summary.total.errors:
        what = "run the episodes again that ended in an error" + ("" if finished else ", and go on with this run")
        return [f"{what}:", f"  {_command(given | {'retry_errors': True})}"]
    if not finished:
        return ["go on with this run:", f"  {_command(given)}"]
    kept = {name: given[name] for name in EvalConfig.__annotations__ if name in given and name not in _OF_A_RUN}
    other = {"pretrained_checkpoint": "OTHER_CHECKPOINT"} | kept  # none of the flags that describe a policy
    return ["compare: another checkpoint in the same episodes:", f"  {_command(other)}"]


def _command(flags: Mapping[str, Any]) -> str:
    return shlex.join(["prismo", "eval", *flag_words(EvalConfig, flags)])
