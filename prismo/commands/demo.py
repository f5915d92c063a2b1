"""The whole chain at a small size: demonstrations, RLDS dataset, training with alignment, merge, roll-outs.

    prismo demo --output demo                      # 5 to 10 minutes on 2 cores, no GPU, no downloads
    prismo demo --output demo2 --train_steps 600   # longer

Every stage is the command that a user would type (it is printed); this one only chains them and collects what they
left. Without LIBERO's assets (PRISMO_LIBERO_ASSETS) the simulator draws built-in stand-ins. The model is tiny and its
weights start at random, so its success rate is that of a few minutes of training: it is printed, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command
from prismo.util.flags import at_least


@dataclass(frozen=True)
class DemoConfig:
    # Folder of everything that is made; it must not exist
    output: Path = Path("demo")
    # Remove the folder first
    overwrite: bool = False
    # Tasks of LIBERO-Object
    tasks: int = 2
    # Demonstrations per task
    demos: int = 6
    # Updates
    train_steps: int = 200
    # Roll-outs per task
    trials: int = 2
    # Simulator steps of a roll-out (LIBERO-Object: 280)
    max_steps: int = 280


def run(cfg: DemoConfig) -> None:
    at_least(cfg, tasks=1, demos=1, train_steps=1, trials=1, max_steps=1)
    from prismo.demo import Demo, fresh_folder
    from prismo.sim.suites import package_folder
    from prismo.util.extras import need

    need("matplotlib", "data")
    package_folder()  # before minutes of work
    fresh_folder(cfg.output, overwrite=cfg.overwrite)
    sizes = {name: getattr(cfg, name) for name in ("tasks", "demos", "train_steps", "trials", "max_steps")}
    Demo(cfg.output, **sizes).run()


main = partial(run_command, run, DemoConfig)
