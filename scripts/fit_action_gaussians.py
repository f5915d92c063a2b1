"""`prismo data gaussians` (see `prismo/commands/data_gaussians.py`)."""

import sys

from prismo.commands.data_gaussians import main

if __name__ == "__main__":
    sys.exit(main())
