"""Roll-out videos under the original's names (other people's scripts glob them)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from prismo.eval.plan import Episode
from prismo.util.extras import install_hint
from prismo.util.files import atomic_write

_FPS = 30  # the original's; the simulator runs at 20 Hz, so videos play 1.5 times as fast
_LABELS = {"openvla": "openvla_oft"}


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


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write uint8 frames [T, H, W, 3] as H.264, atomically."""
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
