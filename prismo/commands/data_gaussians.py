"""Fit the Gaussians from which SpatialVLA cuts its action bins, on any dataset or mixture.

    prismo data gaussians --data_root_dir data/libero --dataset_name libero_spatial_no_noops \\
        --output libero_spatial_gaussians.json

Every action of the dataset is normalised as in training (1 % and 99 % quantiles to -1 and 1, clipped), its translation
converted to spherical coordinates; the file holds mean and deviation of each variable, in the authors' format. Pass it
to fine-tuning as `--adapt_emb`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command
from prismo.util.flags import ends_in


@dataclass
class FitConfig:
    # Folder of the dataset folders
    data_root_dir: Path
    # Dataset, mixture or YAML file (data/README.md)
    dataset_name: str
    # JSON file to write
    output: Path


def run(cfg: FitConfig) -> None:
    ends_in(cfg, "output", ".json")
    from prismo.data.dataset import open_dataset
    from prismo.data.normalize import normalize
    from prismo.models.spatialvla.action_tokenizer import OFFICIAL_GAUSSIANS, fit_gaussians, save_gaussians

    dataset = open_dataset(cfg.data_root_dir, cfg.dataset_name)
    gaussians = fit_gaussians(
        normalize(source.store.column("action"), source.statistics.action, "bounds_q99") for source in dataset.sources
    )
    save_gaussians(gaussians, cfg.output)
    frames = sum(source.statistics.num_transitions for source in dataset.sources)
    print(f"{frames} actions of {cfg.dataset_name} -> {cfg.output}\n")
    print(f"{'':6} {'mu':>9} {'sigma':>8}   published bins")
    for name, fitted in gaussians.items():
        official = OFFICIAL_GAUSSIANS.get(name)
        print(
            f"{name:6} {fitted.mu:9.5f} {fitted.sigma:8.5f}",
            f"  {official.mu:.5f} / {official.sigma:.5f}" if official else "",
        )


main = partial(run_command, run, FitConfig)
