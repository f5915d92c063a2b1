"""Write a small made-up LIBERO dataset: no simulator, no download, a minute of training fits it.

    prismo data synthetic --data_root_dir data/synthetic

With `prismo tiny` it is all that a first training on any machine needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command
from prismo.util.flags import at_least, at_most


@dataclass
class SyntheticConfig:
    # Folder of the dataset folders
    data_root_dir: Path = Path("data/synthetic")
    # Name of a LIBERO dataset, by which training finds it
    dataset_name: str = "libero_spatial_no_noops"
    # Episodes
    episodes: int = 8
    # Mean length of an episode
    steps: int = 40
    # Height and width of both cameras
    image_size: int = 128
    # The same seed writes the same bytes
    seed: int = 0


def run(cfg: SyntheticConfig) -> None:
    at_least(cfg, episodes=1, steps=4, image_size=16, seed=0)
    at_most(cfg, episodes=100_000, steps=10_000, image_size=4096, seed=2**32 - 1)
    from prismo.data.synthetic import write_synthetic_libero

    if (cfg.data_root_dir / cfg.dataset_name).exists():
        raise FileExistsError(f"{cfg.data_root_dir / cfg.dataset_name} exists; name another --data_root_dir")
    folder = write_synthetic_libero(
        cfg.data_root_dir, cfg.dataset_name, cfg.episodes, cfg.steps, cfg.seed, cfg.image_size
    )
    print(f"wrote {folder}: {cfg.episodes} episodes")


main = partial(run_command, run, SyntheticConfig)
