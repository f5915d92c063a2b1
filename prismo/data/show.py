"""Pictures of an episode: a contact sheet (PNG) or a film (MP4), with the actions below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from prismo.data.dataset import Source
from prismo.data.names import action_names, proprio_groups, proprio_names, view_name
from prismo.util.extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_OP = 1e-4  # movement (norm of the first six action numbers) below which a step counts as idle


@dataclass(frozen=True)
class ShownEpisode:
    """What is drawn: actions [T, A] and proprio [T, P] in physical units, frames uint8 [T][V][H, W, 3]."""

    source: Source
    number: int
    rows: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def instruction(self) -> str:
        return self.source.store.instructions[self.rows["instruction"][0]]

    def views(self, step: int) -> list[np.ndarray]:
        cameras = range(len(self.source.store.spec.cameras))
        return [self.source.store.image(self.number, self.rows[step], camera) for camera in cameras]


def summary(source: Source) -> str:
    """What a dataset holds, in five lines."""
    store, spec = source.store, source.store.spec
    steps = store.episodes["steps"]
    idle = float((np.linalg.norm(store.column("action", slice(0, 6)), axis=1) < NO_OP).mean())
    sizes = [store.image_size(camera) for camera in range(len(spec.cameras))]
    robot = spec.embodiment
    return "\n".join(
        (
            f"{source.name} ({store.root})",
            f"  {len(steps)} episodes of {steps.min()} to {steps.max()} steps, {steps.sum()} in all, {idle:.1%} idle",
            f"  cameras {', '.join(f'{c} {s}' for c, s in zip(spec.cameras, sizes, strict=True))}",
            f"  {robot.action_dim} action and {robot.proprio_dim} proprio numbers, gripper {spec.gripper}",
            f"  {len(store.instructions)} instructions, such as {store.instructions[0]!r}",
        )
    )


def pick(sources: tuple[Source, ...], number: int) -> ShownEpisode:
    """Episode `number` of all that the datasets of a mixture hold.

    Raises:
        ValueError: there are fewer.
    """
    all_of_them = [(source, stored) for source in sources for stored in source.episodes.tolist()]
    if not 0 <= number < len(all_of_them):
        total = len(all_of_them)
        raise ValueError(f"episode {number} asked for, the dataset has {total} (0 to {total - 1})")
    source, stored = all_of_them[number]
    return ShownEpisode(source, stored, source.store.rows(stored, 0, int(source.store.episodes["steps"][stored])))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches, of 100 pixels each in a film."""
    return need("matplotlib.figure", "data").Figure(figsize=(width, height), dpi=100, layout="constrained")


def write_sheet(episode: ShownEpisode, path: Path, frames: int) -> None:
    shown = np.unique(np.linspace(0, episode.steps - 1, frames).astype(int))
    spec = episode.source.store.spec
    cameras, groups = len(spec.cameras), proprio_groups(spec.embodiment)
    rows = cameras + 1 + len(groups)
    figure = new_figure(max(1.9 * len(shown), 8), 1.9 * cameras + 1.9 + 1.3 * len(groups))
    grid = figure.add_gridspec(rows, len(shown), height_ratios=[1.9] * cameras + [1.9] + [1.3] * len(groups))
    for column, step in enumerate(shown):
        for camera, view in enumerate(episode.views(step)):
            panel = figure.add_subplot(grid[camera, column])
            panel.imshow(view)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if column == 0:
                panel.set_ylabel(view_name(camera), fontsize=8)
            if camera == 0:
                panel.set_title(f"step {step}", fontsize=8)
    names = action_names(spec.embodiment)
    plot(figure.add_subplot(grid[cameras, :]), "action", episode.rows["action"], names, list(shown))
    for row, (title, part) in enumerate(groups, cameras + 1):
        values, names = episode.rows["proprio"][:, part], proprio_names(spec.embodiment)[part]
        plot(panel := figure.add_subplot(grid[row, :]), title, values, names, list(shown))
    panel.set_xlabel("step", fontsize=8)
    figure.suptitle(f"{episode.source.name}: {episode.instruction}", fontsize=10)
    figure.savefig(path, dpi=110)


def plot(panel: Axes, title: str, values: np.ndarray, names: Sequence[str], marks: list[int]) -> None:
    """Lines of values [T, D] over the steps, with their names beside them."""
    for dim, name in enumerate(names):
        panel.plot(values[:, dim], linewidth=1, label=name)
    for mark in marks:
        panel.axvline(mark, color="gray", linewidth=0.4)
    panel.set_xlim(0, max(1, len(values) - 1))
    panel.set_ylabel(title, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def write_film(episode: ShownEpisode, path: Path) -> None:
    """All cameras side by side with the actions below and a moving cursor, at the robot's control rate."""
    rate = max(1, round(episode.source.store.spec.embodiment.control_hz))
    with need("imageio.v2", "data").get_writer(path, fps=rate, macro_block_size=2) as film:
        for picture in tqdm(film_frames(episode), total=episode.steps, unit="frame"):
            film.append_data(picture)


def film_frames(episode: ShownEpisode) -> Iterator[np.ndarray]:
    cameras = len(episode.source.store.spec.cameras)
    figure = new_figure(3.2 * cameras, 5.2)
    canvas = need("matplotlib.backends.backend_agg", "data").FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, cameras, height_ratios=[3, 1.6])
    pictures = [figure.add_subplot(grid[0, c]).imshow(view) for c, view in enumerate(episode.views(0))]
    for camera, picture in enumerate(pictures):
        picture.axes.set_axis_off()
        picture.axes.set_title(view_name(camera), fontsize=8)
    panel = figure.add_subplot(grid[1, :])
    names = action_names(episode.source.store.spec.embodiment)
    plot(panel, "action", episode.rows["action"], names, [])
    panel.set_xlabel("step", fontsize=8)
    cursor = panel.axvline(0, color="black", linewidth=1)
    figure.suptitle(episode.instruction, fontsize=9)
    canvas.draw()
    figure.set_layout_engine("none")  # keep the first layout: it costs more than drawing
    for step in range(episode.steps):
        for picture, view in zip(pictures, episode.views(step), strict=True):
            picture.set_data(view)
        cursor.set_xdata([step, step])
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()
