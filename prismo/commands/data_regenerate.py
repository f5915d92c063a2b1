"""Regenerate LIBERO's human demonstrations at 256 pixels, without no-ops and without failures.

    prismo data regenerate --libero_task_suite libero_spatial \\
        --libero_raw_data_dir LIBERO/libero/datasets/libero_spatial \\
        --libero_target_dir demos/libero_spatial_no_noops

Then make the RLDS dataset from them with `prismo data build`. Also writes {suite}_metainfo.json into the
target folder: the initial states of the demonstrations, for `--initial_states_path` of the evaluation. An interrupted
run continues where it stopped; nothing is asked, `--overwrite` starts anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import BrokenOffError, run_command
from prismo.util.flags import at_least, at_most


@dataclass(frozen=True)
class RegenerateConfig:
    # libero_spatial, libero_object, libero_goal, libero_10 or libero_90
    libero_task_suite: str
    # Folder of the raw HDF5 files
    libero_raw_data_dir: Path
    # Folder for the new HDF5 files
    libero_target_dir: Path
    # Empty the target folder first
    overwrite: bool = False
    # Only these tasks (0-based), e.g. "0 5". Default: all
    task_ids: list[int] | None = None
    # Simulator processes
    num_workers: int = 2
    # Height and width of the pictures
    image_size: int = 256
    # Demonstration k uses seed + k for the poses of fixtures, unless its file says which seed it had
    seed: int = 0
    # Folder of LIBERO's assets, or "stand-ins". Default: PRISMO_LIBERO_ASSETS, what is installed
    libero_assets: str | None = None
    # Fetch LIBERO's assets (200 MB) from the hub where none are found
    download_assets: bool = False


def run(cfg: RegenerateConfig) -> None:
    from prismo.sim.assets import resolve_assets
    from prismo.sim.collect import raw_items, regenerate, write_metainfo
    from prismo.sim.collection import Collection, follow
    from prismo.sim.libero_worker import LiberoWorker

    at_least(cfg, num_workers=1, image_size=16, seed=0)
    at_most(cfg, num_workers=1024, image_size=4096, seed=2**31)
    items = raw_items(cfg.libero_task_suite, cfg.libero_raw_data_dir, cfg.task_ids)
    assets = resolve_assets(cfg.libero_assets, download=cfg.download_assets)
    settings = {"seed": cfg.seed, "image_size": cfg.image_size, "assets": assets.source}
    tasks = {item.task for item in items}
    collection = Collection(cfg.libero_target_dir, settings, tasks, overwrite=cfg.overwrite)
    make_worker = partial(LiberoWorker, assets, image_size=cfg.image_size)
    raw, workers = cfg.libero_raw_data_dir, cfg.num_workers
    outcomes = regenerate(items, raw, make_worker, num_workers=workers, seed=cfg.seed, collection=collection)
    finished = follow(outcomes, len(items), cfg.libero_task_suite, "kept")
    with make_worker() as worker:
        counts = collection.join(finished, worker.info)
    metainfo = cfg.libero_target_dir / f"{cfg.libero_task_suite}_metainfo.json"
    write_metainfo(metainfo, finished, cfg.libero_raw_data_dir)
    noops = sum(done.outcome.noops for done in finished)
    print(
        f"kept {sum(counts.values())} of {len(items)} demonstrations, left out {noops} no-ops: {cfg.libero_target_dir}"
    )
    if empty := [task.name for task, count in counts.items() if count == 0]:
        raise BrokenOffError(f"no demonstration is left of {', '.join(empty)}: try `prismo doctor`")
    collection.discard_parts()


main = partial(run_command, run, RegenerateConfig)
