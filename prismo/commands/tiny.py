"""Write tiny random checkpoints: `base/` (like openvla-7b), `policy/` (like a fine-tuned one), `spatialvla/` (like
spatialvla-4b) and `vggt/model.pt`.

    prismo tiny --output ckpts/tiny

They run every command of the project on a laptop; the actions are noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command
from prismo.util.flags import at_least, at_most


@dataclass
class TinyConfig:
    # Folder to write into
    output: Path
    # Seed of the random weights
    seed: int = 0
    # Dataset whose statistics and robot the policy has
    dataset: str = "libero_spatial_no_noops"


def run(cfg: TinyConfig) -> None:
    at_least(cfg, seed=0)
    at_most(cfg, seed=2**32 - 1)
    from prismo.testing.tiny import make_tiny_openvla, make_tiny_policy, make_tiny_vggt
    from prismo.testing.tiny_spatialvla import make_tiny_spatialvla

    for path in (
        make_tiny_openvla(cfg.output / "base", cfg.seed),
        make_tiny_policy(cfg.output / "policy", cfg.seed, dataset=cfg.dataset),
        make_tiny_spatialvla(cfg.output / "spatialvla", cfg.seed),
        make_tiny_vggt(cfg.output / "vggt" / "model.pt", cfg.seed),
    ):
        print(path)


main = partial(run_command, run, TinyConfig)
