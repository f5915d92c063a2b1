"""`prismo data stats` (see `prismo/commands/data_stats.py`)."""

import sys

from prismo.commands.data_stats import main

if __name__ == "__main__":
    sys.exit(main())
