"""Look at an episode: a contact sheet (PNG) or a film (MP4), with the actions below, and a summary of the dataset.

    prismo data show --data_root_dir data --dataset_name libero_spatial_no_noops --episode 3
    prismo data show --dataset_name my_robot.yaml --output episode.mp4

Check here that pictures are upright, that the first camera is the outside one, and that the gripper goes 1 = open to
0 = closed when the robot grasps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command
from prismo.util.flags import at_least, at_most, ends_in


@dataclass
class ShowConfig:
    # Known dataset or mixture, or a YAML file
    dataset_name: str
    # Folder of the dataset folders
    data_root_dir: Path = Path("data")
    # Number of the episode, over all datasets of a mixture
    episode: int = 0
    # Picture (.png, .pdf, .svg) or film (.mp4); default runs/show/{dataset}_{episode}.png
    output: Path | None = None
    # Frames in a contact sheet
    frames: int = 8


def run(cfg: ShowConfig) -> None:
    at_least(cfg, episode=0, frames=1)
    at_most(cfg, frames=1000)
    ends_in(cfg, "output", ".png", ".pdf", ".svg", ".mp4")
    output = cfg.output or Path("runs/show") / f"{Path(cfg.dataset_name).stem}_{cfg.episode}.png"
    from prismo.data.dataset import open_dataset
    from prismo.data.show import pick, summary, write_film, write_sheet
    from prismo.util.extras import need

    for module in ("matplotlib", "imageio_ffmpeg") if output.suffix == ".mp4" else ("matplotlib",):
        need(module, "data")
    dataset = open_dataset(cfg.data_root_dir, cfg.dataset_name, use_tail=True)
    for source in dataset.sources:
        print(summary(source))
    episode = pick(dataset.sources, cfg.episode)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".mp4":
        write_film(episode, output)
    else:
        write_sheet(episode, output, cfg.frames)
    print(f"wrote {output}: episode {cfg.episode}, {episode.steps} steps, {episode.instruction!r}")


main = partial(run_command, run, ShowConfig)
