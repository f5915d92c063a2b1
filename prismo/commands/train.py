"""Fine-tune OpenVLA on RLDS data and align it with VGGT's features (Spatial Forcing).

    prismo train --vla_path openvla/openvla-7b --vggt_path ckpts/vggt/model.pt \\
        --data_root_dir data --dataset_name libero_spatial_no_noops ...

On several GPUs: `torchrun --standalone --nnodes 1 --nproc-per-node 8 -m prismo train ...`. The folder `recipes` and
`scripts/train_libero_align.sh` hold the published settings, and `--dry_run` shows what a run would do. Ends with 0
after the last update or after a checkpoint on SIGTERM or Ctrl-C, with 1 if training broke off, with 2 if something was
wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from prismo.training.config import FinetuneAlignConfig, FinetuneConfig, parse_config
from prismo.util.cli import log_error, set_up_logging
from prismo.util.processes import end_with_launcher, sigterm_as_exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; None takes the arguments of the process. Returns its exit code."""
    return train(FinetuneAlignConfig, arguments, __doc__)


def train(kind: type[FinetuneConfig], arguments: Sequence[str] | None, about: str | None = None) -> int:
    """Train with flags of a kind; as one of several processes, only the first one says what is wrong with them."""
    is_main = os.environ.get("RANK", "0") == "0"
    set_up_logging(logging.INFO if is_main else logging.ERROR)
    end_with_launcher()
    with sigterm_as_exit():
        try:
            config = parse_config(kind, arguments, about)
        except ValueError as error:
            if is_main:
                log_error(error)
            return 2
        from prismo.training.run import run

        return run(config, is_main)
