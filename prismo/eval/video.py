"""Roll-out videos under the original's names (other people's scripts glob them), and links with readable ones."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prismo.eval.episode import Episode, Outcome
from prismo.eval.results import EpisodeResult
from prismo.util.extras import install_hint
from prismo.util.files import atomic_write, point_link

_FPS = 30  # the original's; the simulator runs at 20 Hz, so videos play 1.5 times as fast
_LABELS = {"openvla": "openvla_oft"}
VIDEOS = "videos"
# Colours that the colour-blind can tell apart.
COLORS: dict[Outcome, str] = {"success": "#009e73", "failure": "#d55e00", "error": "#4d4d4d"}


def check_video_writer() -> None:
    """Raises ValueError with what to type where videos cannot be written."""
    for module in ("imageio", "imageio_ffmpeg"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"videos need {module}: {install_hint('data')}, or pass --save_videos none")


def video_path(folder: str | Path, timestamp: str, family: str, episode: Episode, success: bool) -> Path:
    """`{folder}/{date}/{timestamp}--openvla_oft--episode=N--success=True--task=....mp4`.

    Args:
        timestamp: start of the run, `YYYY_MM_DD-HH_MM_SS`.
        family: "openvla" (which the original calls openvla_oft) or "svla".
    """
    task = episode.task.language.lower()
    for character in " \n.":
        task = task.replace(character, "_")
    label = _LABELS.get(family, family)
    name = f"{timestamp}--{label}--episode={episode.number}--success={success}--task={task[:50]}.mp4"
    return Path(folder) / timestamp.split("-", maxsplit=1)[0] / name


def link_videos(folder: Path, results: Iterable[EpisodeResult]) -> int:
    """Make `videos/` of a run folder lead to its videos, under names that say suite, task, trial and outcome.

    A link of an episode that has ended otherwise since then goes. Videos that are not there (moved, or given relative
    to another working folder) keep the link that they have. Nothing happens where links cannot be made.

    Returns:
        Links in the folder.
    """
    links = folder / VIDEOS
    wanted = {_link_name(result): Path(result.video) for result in results if result.video is not None}
    with contextlib.suppress(OSError):
        for name, video in wanted.items():
            if video.is_file():
                links.mkdir(exist_ok=True)
                point_link(links / name, video)
        for link in links.glob("*.mp4"):
            if link.is_symlink() and link.name not in wanted:
                link.unlink()
    return sum(link.is_symlink() for link in links.glob("*.mp4"))


def _link_name(result: EpisodeResult) -> str:
    task = re.sub(r"[^a-z0-9]+", "_", result.task.lower()).strip("_")
    return f"{result.suite}--task_{result.task_id:02d}--trial_{result.init_state:02d}--{result.outcome}--{task}.mp4"


def write_video(path: Path, frames: Iterable[np.ndarray]) -> None:
    """Write uint8 frames [H, W, 3] as H.264, atomically."""
    import imageio  # noqa: PLC0415 (not needed without videos)

    with atomic_write(path) as temporary:
        imageio.mimwrite(
            temporary,
            list(frames),
            format="mp4",
            fps=_FPS,
            macro_block_size=1,  # sizes that are no multiple of 16 stay as they are
            output_params=["-f", "mp4"],  # the temporary name has no suffix to tell
        )


def annotated(frames: np.ndarray, episode: Episode, outcome: Outcome, max_steps: int) -> Iterator[np.ndarray]:
    """Frames with a band below them: instruction, step, and how the episode ends.

    Args:
        frames: uint8 [T, H, W, 3], the first one from before the first step.
        max_steps: of the episode.

    Yields:
        uint8 [H + band, W, 3]; the band is of the same height in all of them.
    """
    _, height, width, _ = frames.shape
    size, margin = max(8, height // 16), max(2, height // 40)
    font, line = ImageFont.load_default(size), round(1.4 * size)
    rows = _wrapped(episode.task.language, font, width - 2 * margin)
    below = (len(rows) + 1) * line + 2 * margin
    band = Image.new("RGB", (width, below + (height + below) % 2), "white")  # H.264 wants an even height
    pen = ImageDraw.Draw(band)
    for number, row in enumerate(rows):
        pen.text((margin, margin + number * line), row, "black", font)
    last = margin + len(rows) * line
    pen.text((width - margin, last), outcome, COLORS[outcome], font, anchor="ra")
    for step, frame in enumerate(frames):
        caption = band.copy()
        ImageDraw.Draw(caption).text((margin, last), f"step {step} of {max_steps}", "black", font)
        yield np.concatenate([frame, np.asarray(caption)])


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels (a longer word has its own)."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
