"""Regenerate LIBERO's human demonstrations at 256 pixels, without no-ops and without failures.

    python scripts/regenerate_libero_dataset.py --libero_task_suite libero_spatial \\
        --libero_raw_data_dir LIBERO/libero/datasets/libero_spatial \\
        --libero_target_dir demos/libero_spatial_no_noops

Then make the RLDS dataset from them with scripts/build_rlds_dataset.py. Also writes {suite}_metainfo.json into the
target folder: the initial states of the demonstrations, for `--initial_states_path` of the evaluation. An interrupted
run continues where it stopped; nothing is asked, `--overwrite` starts anew.
"""

import argparse
import logging
from pathlib import Path

from tqdm import tqdm

from prismo.sim import SUITES, SimWorker
from prismo.sim.assets import resolve_assets
from prismo.sim.collection import Collection, Finished
from prismo.sim.regenerate import raw_items, regenerate, write_metainfo


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        items = raw_items(args.libero_task_suite, args.libero_raw_data_dir, args.task_ids)
        assets = resolve_assets(args.libero_assets, download=args.download_assets)
        settings = {"seed": args.seed, "image_size": args.image_size, "assets": assets.source}
        tasks = {item.task for item in items}
        collection = Collection(args.libero_target_dir, settings, tasks, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error

    def make_worker() -> SimWorker:
        return SimWorker(assets, image_size=args.image_size)

    finished: list[Finished] = []
    with tqdm(total=len(items), unit="demo", desc=args.libero_task_suite) as progress:
        for done in regenerate(
            items,
            args.libero_raw_data_dir,
            make_worker,
            num_workers=args.num_workers,
            seed=args.seed,
            collection=collection,
        ):
            finished.append(done)
            progress.set_postfix_str(f"{sum(d.outcome.success for d in finished)} kept", refresh=False)
            progress.update()
    counts = collection.join(finished, make_worker().info)
    metainfo = args.libero_target_dir / f"{args.libero_task_suite}_metainfo.json"
    write_metainfo(metainfo, finished, args.libero_raw_data_dir)
    noops = sum(done.outcome.noops for done in finished)
    print(
        f"kept {sum(counts.values())} of {len(items)} demonstrations, left out {noops} no-ops: {args.libero_target_dir}"
    )
    if empty := [task.name for task, count in counts.items() if count == 0]:
        raise SystemExit(f"no demonstration is left of {', '.join(empty)}: check the simulator with scripts/doctor.py")
    collection.discard_parts()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libero_task_suite", required=True, choices=SUITES)
    parser.add_argument("--libero_raw_data_dir", required=True, type=Path, help="folder of the raw HDF5 files")
    parser.add_argument("--libero_target_dir", required=True, type=Path, help="folder for the new HDF5 files")
    parser.add_argument("--overwrite", action="store_true", help="empty the target folder first")
    parser.add_argument("--task_ids", type=int, nargs="+", help="only these tasks (0-based)")
    parser.add_argument("--num_workers", type=int, default=2, help="simulator processes")
    parser.add_argument("--image_size", type=int, default=256, help="height and width of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="demonstration k uses seed + k for the poses of fixtures")
    parser.add_argument("--libero_assets", help='folder of LIBERO\'s assets, or "stand-ins"')
    parser.add_argument("--download_assets", action="store_true", help="fetch the assets (200 MB) where none are found")
    return parser.parse_args()


if __name__ == "__main__":
    main()
