"""`prismo finetune` (see `prismo/commands/finetune.py`)."""

import sys

from prismo.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main())
