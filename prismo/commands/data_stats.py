"""Show a dataset's normalisation statistics as a table and as histograms, and write dataset_statistics.json.

    prismo data stats --data_root_dir data --dataset_name libero_spatial_no_noops
    prismo data stats --dataset_name my_robot.yaml --compare ckpts/policy/dataset_statistics.json

Training computes the same statistics by itself; this command is for looking at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prismo.util.cli import run_command


@dataclass
class StatsConfig:
    # Known dataset or mixture, or a YAML file
    dataset_name: str
    # Folder of the dataset folders
    data_root_dir: Path = Path("data")
    # Folder for dataset_statistics.json and {dataset}.png; default runs/statistics/{dataset_name}
    output_dir: Path | None = None
    # Another dataset_statistics.json to compare with
    compare: Path | None = None


def run(cfg: StatsConfig) -> None:
    from prismo.data.histograms import show_statistics

    output = cfg.output_dir or Path("runs/statistics") / Path(cfg.dataset_name).stem
    show_statistics(cfg.dataset_name, cfg.data_root_dir, output, cfg.compare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; None takes the arguments of the process. Returns its exit code (`run_command`)."""
    return run_command(run, StatsConfig, arguments)
