"""`prismo train` (see `prismo/commands/train.py`)."""

import sys

from prismo.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
