"""`prismo data regenerate` (see `prismo/commands/data_regenerate.py`)."""

import sys

from prismo.commands.data_regenerate import main

if __name__ == "__main__":
    sys.exit(main())
