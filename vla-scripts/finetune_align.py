"""Fine-tune OpenVLA on RLDS data and align it with VGGT's features (Spatial Forcing).

    torchrun --standalone --nnodes 1 --nproc-per-node 8 vla-scripts/finetune_align.py \
        --vla_path openvla/openvla-7b --vggt_path ckpts/vggt/model.pt \
        --data_root_dir data/modified_libero_rlds --dataset_name libero_spatial_no_noops ...

One process needs no torchrun. `scripts/train_libero_align.sh` holds the published commands, `--help` every flag, and
`--dry_run True` shows what a run would do.
"""

import sys

from prismo.training.config import FinetuneAlignConfig
from prismo.training.run import main

if __name__ == "__main__":
    sys.exit(main(FinetuneAlignConfig))
