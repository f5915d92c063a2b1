"""Write tiny random checkpoints: `base/` (like openvla-7b), `policy/` (like a fine-tuned one) and `vggt/model.pt`.

    python scripts/make_tiny_checkpoint.py --output ckpts/tiny

They run every command of the project on a laptop; the actions are noise.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from prismo.models.tiny import make_tiny_openvla, make_tiny_policy, make_tiny_vggt
from prismo.util.cli import run_command


@dataclass
class TinyConfig:
    # Folder to write into
    output: Path
    # Seed of the random weights
    seed: int = 0
    # Dataset whose statistics and robot the policy has
    dataset: str = "libero_spatial_no_noops"


def main(cfg: TinyConfig) -> None:
    for path in (
        make_tiny_openvla(cfg.output / "base", cfg.seed),
        make_tiny_policy(cfg.output / "policy", cfg.seed, dataset=cfg.dataset),
        make_tiny_vggt(cfg.output / "vggt" / "model.pt", cfg.seed),
    ):
        print(path)


if __name__ == "__main__":
    sys.exit(run_command(main, TinyConfig))
