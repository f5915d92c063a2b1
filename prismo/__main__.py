"""`python -m prismo <command>`, and `torchrun ... -m prismo train`."""

import sys

from prismo.commands import main

if __name__ == "__main__":
    sys.exit(main())
