"""`prismo data build` (see `prismo/commands/data_build.py`)."""

import sys

from prismo.commands.data_build import main

if __name__ == "__main__":
    sys.exit(main())
