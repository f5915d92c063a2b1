"""`curves.png` of a run: losses, alignment, action errors and learning rate over the updates, from `metrics.jsonl`.

The trainer draws it with every checkpoint, `prismo.training.summary` again at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismo.data.names import view_name
from prismo.util.extras import need
from prismo.util.files import atomic_write
from prismo.util.schema import JsonObject, read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
METRICS = "metrics.jsonl"
_SMOOTH_FROM = 100  # entries, from which on a running mean is drawn over the single ones


@dataclass(frozen=True)
class _Panel:
    """One diagram.

    Attributes:
        title, unit: above it and beside its vertical axis.
        lines: name in the log -> name in the legend.
        exact: single entries say all, a mean of them nothing.
    """

    title: str
    unit: str
    lines: dict[str, str]
    exact: bool = False


_PANELS = (
    _Panel("losses", "loss", {"loss": "action loss", "align_loss": "alignment loss (1 - cosine)"}),
    _Panel(
        "alignment with the teacher",
        "cosine",
        {"align_cosine": "all views"} | {f"align_cosine_view{i}": view_name(i) for i in range(4)},
    ),
    _Panel(
        "action error, normalised",
        "mean absolute error",
        {"curr_action_l1_loss": "first action", "next_actions_l1_loss": "later actions", "l1_loss": "all actions"},
    ),
    _Panel("position error", "mm", {"position_error_mm": "all actions"}),
    _Panel("rotation error", "degrees", {"rotation_error_deg": "all actions"}),
    _Panel("learning rate", "rate", {"learning_rate": "learning rate"}, exact=True),
)


def draw_curves(run: Path, fewest: int = 1) -> None:
    """Draw the picture of a run folder anew.

    Args:
        run: the folder.
        fewest: entries in the log below which nothing is drawn.

    Raises:
        ValueError: matplotlib is missing (the message says what to type), or the log is damaged.
        OSError: no log, or the picture cannot be written.
    """
    figure_class = need("matplotlib.figure", "data").Figure
    entries = read_json_lines(run / METRICS, JsonObject, advice="delete that line to draw the others")
    if len(entries) < fewest:
        return
    splits = {name: [entry for entry in entries if entry.get("split") == name] for name in ("train", "val")}
    names = {name for entry in entries for name in entry}
    panels = [panel for panel in _PANELS if names & panel.lines.keys()]
    columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns) or 1
    figure = figure_class(figsize=(5 * columns, 3.4 * rows + 0.4), dpi=90)
    figure.subplots_adjust(
        left=0.22 / columns, right=1 - 0.05 / columns, bottom=0.18 / rows, top=1 - 0.2 / rows, hspace=0.42, wspace=0.28
    )
    for number, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, columns, number + 1), panel, splits["train"], splits["val"])
    figure.suptitle(run.name, fontsize=10)
    with atomic_write(run / CURVES) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes: Axes, panel: _Panel, train: Sequence[JsonObject], val: Sequence[JsonObject]) -> None:
    for number, (name, label) in enumerate(panel.lines.items()):
        color = f"C{number}"
        steps, values = _series(train, name)
        if steps and (panel.exact or len(steps) < _SMOOTH_FROM):
            axes.plot(steps, values, color=color, linewidth=1, marker="." if len(steps) == 1 else None, label=label)
        elif steps:
            axes.plot(steps, values, color=color, linewidth=1, alpha=0.3)
            axes.plot(steps, _running_mean(values, len(values) // 50), color=color, linewidth=1.5, label=label)
        held_out, errors = _series(val, name)
        if held_out:
            axes.plot(held_out, errors, "o--", color=color, markersize=4, linewidth=1, label=f"{label}, validation")
    axes.set(title=panel.title, xlabel="update", ylabel=panel.unit)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _series(entries: Sequence[JsonObject], name: str) -> tuple[list[int], list[float]]:
    """Updates and values of one figure; entries without it (or of another type) are left out."""
    pairs: list[tuple[int, Any]] = [(entry["step"], entry.get(name)) for entry in entries if "step" in entry]
    kept = [(step, value) for step, value in pairs if isinstance(value, (int, float))]
    return [step for step, _ in kept], [value for _, value in kept]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - width)]) / min(i, width) for i in range(1, len(sums))]
