"""Turn regenerated LIBERO demonstrations (HDF5) into an RLDS dataset that prismo, OpenVLA and tfds can load.

    prismo data build --hdf5_dir demos/libero_spatial_no_noops \\
        --dataset_name libero_spatial_no_noops --data_root_dir data

Needs no TensorFlow. The HDF5 files come from `prismo data regenerate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command
from prismo.util.flags import at_least


@dataclass
class BuildConfig:
    # Folder with one {task}_demo.hdf5 per task
    hdf5_dir: Path
    # Name of the dataset and of its shards, for example libero_spatial_no_noops
    dataset_name: str
    # Folder of the dataset folders; writes {data_root_dir}/{dataset_name}/1.0.0
    data_root_dir: Path = Path("data")
    # Size at which a shard is closed, in MB
    shard_mb: int = 128
    # Replace a dataset that is already there
    overwrite: bool = False


def run(cfg: BuildConfig) -> None:
    from tqdm import tqdm

    from prismo.data.hdf5 import convert_episodes, find_demonstrations, image_size
    from prismo.data.rlds_writer import libero_features, write_rlds

    at_least(cfg, shard_mb=1)
    folder = cfg.data_root_dir / cfg.dataset_name / "1.0.0"
    if folder.exists() and not cfg.overwrite:
        raise FileExistsError(f"{folder} exists; give --overwrite true to replace it")
    demonstrations = find_demonstrations(cfg.hdf5_dir)
    features = libero_features(*image_size(demonstrations[0]))
    episodes = tqdm(convert_episodes(demonstrations), total=len(demonstrations), unit="episode", desc=cfg.dataset_name)
    write_rlds(folder, cfg.dataset_name, features, episodes, shard_bytes=cfg.shard_mb << 20)
    tasks = len({demo.instruction for demo in demonstrations})
    print(f"{folder}: {len(demonstrations)} episodes of {tasks} tasks")


main = partial(run_command, run, BuildConfig)
