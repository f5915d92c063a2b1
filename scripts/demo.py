"""`prismo demo` (see `prismo/commands/demo.py`)."""

import sys

from prismo.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
