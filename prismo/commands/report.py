"""What a run left and the next command to type; draws its pictures anew. Also for a run that was stopped or killed.

    prismo report runs/latest
    prismo report --run runs/openvla-7b+libero_spatial_no_noops+...
    prismo report experiments/logs/latest

Training and evaluation print the same at their end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command


@dataclass
class ReportConfig:
    # Folder of a training or evaluation, a checkpoint of a training, or the link to the newest run; may stand first,
    # without the flag
    run: Path = Path("runs/latest")


def run(cfg: ReportConfig) -> None:
    if (cfg.run / "run.json").is_file():
        from prismo.eval.summary import report
    else:
        from prismo.training.summary import report

    print(report(cfg.run))


main = partial(run_command, run, ReportConfig, first="run")
