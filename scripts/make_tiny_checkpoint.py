"""`prismo tiny` (see `prismo/commands/tiny.py`)."""

import sys

from prismo.commands.tiny import main

if __name__ == "__main__":
    sys.exit(main())
