"""`prismo doctor` (see `prismo/commands/doctor.py`)."""

import sys

from prismo.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
