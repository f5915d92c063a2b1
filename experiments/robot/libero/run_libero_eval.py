"""`prismo eval` (see `prismo/commands/eval.py`)."""

import sys

from prismo.commands.eval import main

if __name__ == "__main__":
    sys.exit(main())
