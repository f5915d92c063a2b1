"""Show a dataset's normalisation statistics as a table and as histograms, and write dataset_statistics.json.

    prismo data stats --data_root_dir data --dataset_name libero_spatial_no_noops
    prismo data stats --dataset_name my_robot.yaml --compare ckpts/policy/dataset_statistics.json

Training computes the same statistics by itself; this command is for looking at them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
    from prismo.data.dataset import open_dataset
    from prismo.data.histograms import differences, plot_histograms, statistics_table
    from prismo.data.normalize import dump_statistics
    from prismo.util.extras import need

    need("matplotlib", "data")
    dataset = open_dataset(cfg.data_root_dir, cfg.dataset_name, use_tail=True)
    output = cfg.output_dir or Path("runs/statistics") / Path(cfg.dataset_name).stem
    output.mkdir(parents=True, exist_ok=True)
    for source in dataset.sources:
        picture = output / f"{source.name.replace('/', '_')}.png"
        plot_histograms(source, picture)
        print(f"\n{statistics_table(source)}\nwrote {picture}")
    dump_statistics(dataset.statistics, output / "dataset_statistics.json")
    print(f"wrote {output / 'dataset_statistics.json'}")
    for line in differences(dataset.sources, cfg.compare) if cfg.compare else ():
        print(line)


main = partial(run_command, run, StatsConfig)
