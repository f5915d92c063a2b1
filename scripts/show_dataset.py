"""`prismo data show` (see `prismo/commands/data_show.py`)."""

import sys

from prismo.commands.data_show import main

if __name__ == "__main__":
    sys.exit(main())
