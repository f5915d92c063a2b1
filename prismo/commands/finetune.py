"""Fine-tune OpenVLA on RLDS data (OpenVLA-OFT), without alignment; the trainer is that of `prismo train`.

    prismo finetune --vla_path openvla/openvla-7b \\
        --data_root_dir data --dataset_name libero_spatial_no_noops ...
"""

from __future__ import annotations

from collections.abc import Sequence

from prismo.commands.train import train
from prismo.training.config import FinetuneConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; None takes the arguments of the process. Returns its exit code."""
    return train(FinetuneConfig, arguments, __doc__)
