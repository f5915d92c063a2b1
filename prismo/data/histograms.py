"""A dataset's normalisation statistics as a table and as histograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prismo.data.dataset import Source
from prismo.data.names import action_names, proprio_names
from prismo.data.normalize import FieldStats, load_statistics, resolve_unnorm_key
from prismo.util.extras import need

_FEW = 12  # different values
COLUMNS = ("mean", "std", "min", "q01", "q99", "max")


def statistics_table(source: Source) -> str:
    """Statistics of action and proprio, a line per number."""
    stats, robot = source.statistics, source.store.spec.embodiment
    lines = [f"{source.name}: {stats.num_trajectories} episodes, {stats.num_transitions} steps"]
    lines += _rows("action", stats.action, action_names(robot))
    return "\n".join([*lines, *_rows("proprio", stats.of_proprio(), proprio_names(robot))])


def _rows(title: str, stats: FieldStats, names: Sequence[str]) -> list[str]:
    rows = [f"  {title:>13}" + "".join(f"{column:>11}" for column in COLUMNS) + "   scaled"]
    for dim, name in enumerate(names):
        scaled = "yes" if stats.mask is None or stats.mask[dim] else "no"
        values = "".join(f"{getattr(stats, column)[dim]:11.5f}" for column in COLUMNS)
        rows.append(f"  {name:>13}{values}   {scaled:>6}")
    return rows


def plot_histograms(source: Source, path: Path) -> None:
    """One histogram per dimension with its 1 % and 99 % quantiles."""
    fields = {"action": source.statistics.action, "proprio": source.statistics.of_proprio()}
    robot = source.store.spec.embodiment
    names = {"action": action_names(robot), "proprio": proprio_names(robot)}
    width = max(stats.dim for stats in fields.values())
    figure = need("matplotlib.figure", "data").Figure(figsize=(2.2 * width, 4.6), layout="constrained")
    axes = figure.subplots(2, width, squeeze=False)
    for row, (name, stats) in enumerate(fields.items()):
        for dim in range(width):
            panel = axes[row][dim]
            if dim >= stats.dim:
                panel.axis("off")
                continue
            values = source.store.column(name, slice(dim, dim + 1)).ravel()
            # An open or closed gripper would be two lines of a pixel.
            bins = _FEW if len(np.unique(values)) <= _FEW else 80
            panel.hist(values, bins=bins, color="tab:blue")
            for quantile in (stats.q01[dim], stats.q99[dim]):
                panel.axvline(quantile, color="tab:red", linewidth=1)
            panel.set_title(f"{name}: {names[name][dim]}", fontsize=9)
            panel.set_yticks([])
            panel.locator_params(axis="x", nbins=4)
            panel.tick_params(labelsize=7)
    figure.suptitle(f"{source.name}: {source.statistics.num_transitions} steps; red: 1 % and 99 % quantiles")
    figure.savefig(path, dpi=110)


def differences(sources: tuple[Source, ...], path: Path) -> list[str]:
    """How far another statistics file is from the data, in units of each dimension's 1 %..99 % range; a line a field.

    Raises:
        ValueError: it belongs to another robot.
    """
    others, lines = load_statistics(path), []
    for source in sources:
        other = others[resolve_unnorm_key(others, source.name, source.store.spec.embodiment.normalization)]
        pairs = [("action", source.statistics.action, other.action)]
        if other.proprio:
            pairs.append(("proprio", source.statistics.of_proprio(), other.proprio))
        for name, ours, theirs in pairs:
            if ours.dim != theirs.dim:
                raise ValueError(f"{path}: {name} has {theirs.dim} numbers, the data have {ours.dim}")
            span = np.maximum(ours.q99 - ours.q01, 1e-8)
            worst = max(float(np.abs((getattr(ours, c) - getattr(theirs, c)) / span).max()) for c in COLUMNS)
            lines.append(f"{source.name} {name}: largest difference to {path} is {worst:.2e} of a dimension's range")
    return lines
