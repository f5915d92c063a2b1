"""`prismo verify` (see `prismo/commands/verify.py`)."""

import sys

from prismo.commands.verify import main

if __name__ == "__main__":
    sys.exit(main())
