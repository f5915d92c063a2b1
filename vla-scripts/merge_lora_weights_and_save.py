"""`prismo merge` (see `prismo/commands/merge.py`)."""

import sys

from prismo.commands.merge import main

if __name__ == "__main__":
    sys.exit(main())
