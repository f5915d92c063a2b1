"""Collect demonstrations of the scripted expert in LIBERO's HDF5 schema, or measure how often it succeeds.

    prismo data collect --task_suite_name libero_object --output_dir demos/libero_object
    prismo data collect --task_suite_name libero_object --dry_run true

Writes {output_dir}/{task}_demo.hdf5 for `prismo data build`; an interrupted run continues where it stopped.
`--dry_run true` draws and writes nothing and prints the success rates only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import BrokenOffError, run_command
from prismo.util.flags import at_least, at_most


@dataclass(frozen=True)
class CollectConfig:
    # libero_object, or libero_spatial (some tasks)
    task_suite_name: str = "libero_object"
    # Only these tasks (0-based), e.g. "[0, 5]". Default: all that the expert knows
    task_ids: list[int] | None = None
    # Episodes per task, from initial state 0 on; only successes are kept
    num_demos_per_task: int = 50
    # Folder of the HDF5 files
    output_dir: Path = Path("demos/scripted")
    # Simulator processes
    num_workers: int = 2
    # Standard deviation of the noise on the expert's actions (0.05 is 2.5 mm)
    noise: float = 0.05
    # Height and width of the pictures
    image_size: int = 256
    # Seed of scenes and noise: episode k of a task uses seed + k
    seed: int = 0
    # Folder of LIBERO's assets, or "stand-ins". Default: PRISMO_LIBERO_ASSETS, what is installed
    libero_assets: str | None = None
    # Fetch LIBERO's assets (200 MB) from the hub where none are found
    download_assets: bool = False
    # Make the folder anew
    overwrite: bool = False
    # Print success rates only
    dry_run: bool = False


def run(cfg: CollectConfig) -> None:
    from prismo.sim.assets import resolve_assets
    from prismo.sim.collect import expert_items, run_expert, success_table
    from prismo.sim.collection import Collection, follow
    from prismo.sim.libero_worker import LiberoWorker

    at_least(cfg, num_demos_per_task=1, num_workers=1, noise=0, image_size=16, seed=0)
    at_most(cfg, num_demos_per_task=10_000, num_workers=1024, image_size=4096, seed=2**31)
    items = expert_items(cfg.task_suite_name, cfg.task_ids, cfg.num_demos_per_task)
    assets = resolve_assets(cfg.libero_assets, download=cfg.download_assets)
    settings = {"noise": cfg.noise, "seed": cfg.seed, "image_size": cfg.image_size, "assets": assets.source}
    tasks = {item.task for item in items}
    collection = None if cfg.dry_run else Collection(cfg.output_dir, settings, tasks, overwrite=cfg.overwrite)
    make_worker = partial(LiberoWorker, assets, cameras=not cfg.dry_run, image_size=cfg.image_size)
    outcomes = run_expert(
        items, make_worker, num_workers=cfg.num_workers, noise=cfg.noise, seed=cfg.seed, collection=collection
    )
    finished = follow(outcomes, len(items), cfg.task_suite_name, "successes")
    print(f"Scripted expert, assets: {assets.source}, noise {cfg.noise}\n{success_table(finished)}")
    if collection is not None:
        with make_worker() as worker:
            counts = collection.join(finished, worker.info)
        print(f"{sum(counts.values())} demonstrations of {len(counts)} tasks in {cfg.output_dir}")
        if empty := [task.name for task, count in counts.items() if count == 0]:
            raise BrokenOffError(f"no successful demonstration of {', '.join(empty)}")
        collection.discard_parts()


main = partial(run_command, run, CollectConfig)
