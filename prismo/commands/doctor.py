"""Check this machine before a long run, in plain words: versions, rendering, physics, attention, memory and disk.

    prismo doctor
    prismo doctor --libero_assets /data/libero_assets --output_dir runs/doctor

Prints one line per check and ends with 1 if something would spoil results. Saves one picture per camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command


@dataclass(frozen=True)
class DoctorConfig:
    # Folder of LIBERO's assets, or "stand-ins". Default: PRISMO_LIBERO_ASSETS, what is installed
    libero_assets: str | None = None
    # For the pictures
    output_dir: Path = Path("runs/doctor")


def run(cfg: DoctorConfig) -> int:
    from prismo.doctor import Doctor, examine

    failures = 0
    for finding in examine(Doctor(cfg.libero_assets, cfg.output_dir)):
        failures += finding.level == "FAIL"
        print(f"[{finding.level:>4}] {finding.text}", flush=True)
    print(f"{failures} problem(s)" if failures else "no problems found")
    return int(failures > 0)


main = partial(run_command, run, DoctorConfig)
