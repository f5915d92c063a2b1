"""`prismo data collect` (see `prismo/commands/data_collect.py`)."""

import sys

from prismo.commands.data_collect import main

if __name__ == "__main__":
    sys.exit(main())
