"""`overview.png` of an evaluation: a row per task with its rate, a cell per trial in the colour of its outcome."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from prismo.eval.results import EpisodeResult, Tally, summarize
from prismo.eval.run_folder import PlanFile, RunFile
from prismo.eval.video import COLORS
from prismo.sim.interface import STAND_INS
from prismo.sim.rates import Rate
from prismo.util.extras import need
from prismo.util.files import atomic_write

OVERVIEW = "overview.png"
_TO_COME = "#e8e8e8"
_LABEL, _TITLE = 56, 120  # letters of an instruction and of a checkpoint in a line


def draw_overview(folder: Path, about: RunFile, plan: PlanFile, results: Iterable[EpisodeResult]) -> None:
    """Draw the picture of a run folder anew.

    Raises:
        ValueError: matplotlib is missing (the message says what to type).
        OSError: the picture cannot be written.
    """
    figure_class, patch = need("matplotlib.figure", "data").Figure, need("matplotlib.patches", "data").Patch
    results = list(results)
    summary = summarize(results, sum(len(task.trials) for task in plan.tasks))
    rows, columns = len(plan.tasks), 1 + max(trial for task in plan.tasks for trial in task.trials)
    figure = figure_class(figsize=(6.5 + max(3.0, 0.18 * columns), 1.9 + 0.36 * rows), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.pcolormesh(_cells(plan, results, columns), edgecolors="white", linewidth=1)
    axes.set(xlabel="trial (initial state)", xlim=(0, columns), ylim=(rows, 0))
    every = -(-columns // 25)
    axes.set_xticks(np.arange(0, columns, every) + 0.5, [str(trial) for trial in range(0, columns, every)])
    names = [textwrap.fill(f"{task.task_id}  {task.task}", _LABEL) for task in plan.tasks]
    axes.set_yticks(np.arange(rows) + 0.5, names, fontsize=8)
    rates = axes.secondary_yaxis("right")
    tallies = [summary.tasks.get(task.task_id) for task in plan.tasks]
    rates.set_yticks(np.arange(rows) + 0.5, ["" if t is None else _rate(t[1]) for t in tallies], fontsize=8)
    for side in (axes, rates):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)
    legend = [patch(color=color, label=outcome) for outcome, color in COLORS.items()]
    legend.append(patch(color=_TO_COME, label="to come"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8, frameon=False)
    smoke = " (smoke run with stand-in scenes: compares with nothing)" if about.settings["assets"] == STAND_INS else ""
    done = f"{about.suite}{smoke}, {summary.total.episodes} of {summary.planned} episodes"
    title = (textwrap.fill(about.checkpoint, _TITLE), done, _rate(summary.total))
    figure.suptitle("\n".join(title), fontsize=9)
    with atomic_write(folder / OVERVIEW) as temporary:
        figure.savefig(temporary, format="png")


def _cells(plan: PlanFile, results: Iterable[EpisodeResult], columns: int) -> np.ndarray:
    """RGB colours [tasks, trials, 3] in 0..1; white where there is no such trial."""
    to_rgb = need("matplotlib.colors", "data").to_rgb
    cells = np.ones((len(plan.tasks), columns, 3))
    row_of = {task.task_id: row for row, task in enumerate(plan.tasks)}
    for task in plan.tasks:
        cells[row_of[task.task_id], list(task.trials)] = to_rgb(_TO_COME)
    for result in results:
        cells[row_of[result.task_id], result.init_state] = to_rgb(COLORS[result.outcome])
    return cells


def _rate(counts: Tally) -> str:
    """Successes with their rate and its 95 % interval, and errors."""
    rate = Rate(counts.successes, counts.successes + counts.failures)
    return (str(rate) if rate.episodes else "no rate") + (f", errors: {counts.errors}" if counts.errors else "")
