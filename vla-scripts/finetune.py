"""Fine-tune OpenVLA on RLDS data (OpenVLA-OFT), without alignment. See `finetune_align.py`; the trainer is the same."""

import sys

from prismo.training.config import FinetuneConfig
from prismo.training.run import main

if __name__ == "__main__":
    sys.exit(main(FinetuneConfig))
