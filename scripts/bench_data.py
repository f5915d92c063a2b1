"""Our data pipeline beside one in tf.data that does the same work with the original's settings, in one run.

    python scripts/bench_data.py                                     # generates 1 GB of LIBERO-like data first
    python scripts/bench_data.py --data_root_dir data --dataset_name libero_spatial_no_noops

Every measurement is a process of its own, and the best of `--repeats` rounds counts, for every side alike. samples/s
are per second of processor time of that process and its workers, that is, per fully used core. `tf.data` follows
OpenVLA's loader: TFDS episodes, gripper and normalisation, chunking, flattening to frames, a shuffle buffer of 100,000
encoded frames, decoding (16 parallel calls), lanczos3 resize, augmentation, numpy iterator, stacking. Rows:

    stored size     both cameras decoded, normalised actions and proprio, collated
    resized         and resized to 224 x 224 on the same core
    augmented       and cropped and colour-jittered there, too
    resized, GPU    what a core does for a training sample: ours decodes, collates and leaves the rest to the GPU, which
    augmented, GPU  tf.data cannot (the figures are those of the first row, of the second and of the third)

The last column is what the original does for the same samples: it also draws a goal image for each camera, which
nothing uses, and gives it the same treatment. Memory is the proportional set size (PSS) of the process and its workers,
less what it was after the imports. Without tensorflow-datasets only our column is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from prismo.util.cli import parse_or_exit

Mode = Literal["stored size", "resized", "augmented"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass
class BenchConfig:
    # Folder of the dataset folders; left out, data are generated
    data_root_dir: str = ""
    # A LIBERO dataset
    dataset_name: str = "libero_spatial_no_noops"
    # Size of generated data
    generate_gb: float = 1.0
    # Where data are generated
    work_dir: Path = Path("runs/bench_data")
    # Samples
    batch_size: int = 16
    # Length of each throughput measurement
    seconds: float = 10
    # Rounds over all measurements; the best one counts
    repeats: int = 3
    # Of tf.data only; the original's default
    shuffle_buffer_size: int = 100_000
    # Rows to measure
    modes: list[Mode] = field(default_factory=lambda: list(MODES))
    # --- of a child process that the script starts
    # Statistics that tf.data's side takes over
    statistics: str = ""
    # What to measure
    measure: str | None = None
    # Row
    mode: Mode | None = None


if __name__ == "__main__":
    CONFIG = parse_or_exit(BenchConfig, __doc__)  # before the imports that take seconds

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIDES = ("prismo", "tfdata", "original")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
VIEWS = ("primary", "wrist")


def main(args: BenchConfig) -> None:
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args)))
        return
    root = Path(args.data_root_dir) if args.data_root_dir else generate(args)
    folder = version_folder(root, args.dataset_name)
    size = sum(file.stat().st_size for file in folder.glob("*.tfrecord*"))
    print(f"{folder}: {size / 1e9:.2f} GB of shards, batch {args.batch_size}, {os.cpu_count()} cores")
    shutil.rmtree(folder / ".prismo_index", ignore_errors=True)
    for file in folder.glob("*.tfrecord*"):
        file.read_bytes()  # both sides find the shards in the page cache
    sides = SIDES if importlib.util.find_spec("tensorflow_datasets") else SIDES[:1]
    with tempfile.TemporaryDirectory() as cache:  # an index that lies in the user's cache would not be built
        environment = os.environ | ONE_THREAD | {"XDG_CACHE_HOME": cache}
        built = run(args, root, "index", MODES[0], environment)
        print(
            f"index built at {size / 1e6 / built['seconds']:.0f} MB/s, {built['seconds']:.1f} s; checksums verified\n"
        )
        args.statistics = built["statistics"]
        measure_gpu(args.batch_size)
        rounds = [
            {(mode, side): run(args, root, side, mode, environment) for mode in args.modes for side in sides}
            for _ in range(args.repeats)
        ]
    print_table({key: best([measured[key] for measured in rounds]) for key in rounds[0]}, sides)


def version_folder(root: Path, name: str) -> Path:
    from prismo.data.store import find_folder  # noqa: PLC0415  (each side imports only its own libraries)

    return find_folder(root / name)


def generate(args: BenchConfig) -> Path:
    from prismo.data.synthetic import write_synthetic_libero  # noqa: PLC0415

    root = args.work_dir / f"{args.generate_gb:g}gb"
    if not (root / args.dataset_name).exists():
        print(f"generating {args.generate_gb:g} GB in {root} ...")
        episodes = round(args.generate_gb * 1e9 / (120 * 2 * 16_500))
        write_synthetic_libero(root, args.dataset_name, episodes=episodes, steps=120)
    return root


def run(args: BenchConfig, root: Path, measure: str, mode: str, environment: dict[str, str]) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", measure, "--mode", mode, "--data_root_dir", str(root)]
    for name in ("dataset_name", "batch_size", "seconds", "shuffle_buffer_size", "statistics"):
        command += [f"--{name}", str(getattr(args, name))]
    print(f"  measuring {measure}, {mode} ...", file=sys.stderr)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The highest rate, and the lowest of everything else."""
    return {key: (max if key == "rate" else min)(measured[key] for measured in rounds) for key in rounds[0]}


def print_table(measured: dict[tuple[str, str], dict[str, float]], sides: tuple[str, ...]) -> None:
    """`measured` maps (mode, side) to what `throughput` returned."""
    titles = {
        "prismo": f"{'prismo':>10}",
        "tfdata": f"{'tf.data':>10}{'ratio':>8}",
        "original": f"{'original':>12}{'ratio':>8}",
    }
    print(f"{'two cameras, per core':<26}" + "".join(titles[side] for side in sides))

    def line(name: str, key: str, mode: str, our_mode: str) -> None:
        values = [measured[our_mode if side == "prismo" else mode, side][key] for side in sides]
        text = f"{name:<26}{values[0]:>10.2f}"
        for value, width in zip(values[1:], (10, 12), strict=False):
            text += f"{value:>{width}.2f}{values[0] / value if key == 'rate' else value / values[0]:>7.1f}x"
        print(text)

    modes = [mode for mode in MODES if (mode, "prismo") in measured]
    for mode in modes:
        line(f"samples/s, {mode}", "rate", mode, mode)
    for mode in modes[1:] if modes[0] == MODES[0] else ():
        line(f"samples/s, {mode}, GPU", "rate", mode, MODES[0])
    for name, key in (("first batch (s)", "first_batch"), ("imports (s)", "imports"), ("memory (MB)", "memory")):
        line(name, key, modes[-1], modes[-1])


# --- measuring --------------------------------------------------------------------------------------------------------


def throughput(args: BenchConfig, started: float, open_batches: Callable[[], Iterator[Any]]) -> dict[str, float]:
    """Imports, time to the first batch, samples/s and memory of an endless iterator over batches."""
    imported = time.perf_counter()
    before = memory()
    batches = open_batches()
    next(batches)
    first = time.perf_counter()
    for _ in range(4):  # what was prefetched in the meantime is not work of the measured time
        next(batches)
    start, count = cpu_seconds(), 0
    while cpu_seconds() - start < args.seconds:
        for _ in range(4):
            next(batches)
        count += 4 * args.batch_size
    return {
        "imports": imported - started,
        "first_batch": first - imported,
        "rate": count / (cpu_seconds() - start),
        "memory": memory() - before,
    }


def processes() -> list[str]:
    """This process and its children."""
    return ["self", *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def cpu_seconds() -> float:
    """Processor time, user and system, of this process and its children."""
    ticks = 0
    for pid in processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory() -> float:
    """PSS of this process and its children in MB."""
    total = 0
    for pid in processes():
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += int(next(entry for entry in text.splitlines() if entry.startswith("Pss:")).split()[1])
    return total / 1024


def measure_index(args: BenchConfig) -> dict[str, Any]:
    from prismo.data.resolve import resolve  # noqa: PLC0415
    from prismo.data.statistics import dataset_statistics  # noqa: PLC0415
    from prismo.data.store import open_store  # noqa: PLC0415

    entry = resolve(args.data_root_dir, args.dataset_name)[0]
    start = time.perf_counter()
    store = open_store(entry.folder, entry.spec)
    seconds = time.perf_counter() - start
    dataset_statistics(store)
    return {"seconds": seconds, "statistics": str(store.cache / "statistics.json")}


def measure_prismo(args: BenchConfig) -> dict[str, float]:
    started = time.perf_counter()
    from prismo.data.dataset import open_dataset  # noqa: PLC0415
    from prismo.data.images import prepare_images  # noqa: PLC0415
    from prismo.data.loader import Loader  # noqa: PLC0415

    def batches() -> Iterator[Any]:
        dataset = open_dataset(args.data_root_dir, args.dataset_name)
        for batch in Loader(dataset, args.batch_size, num_workers=1):
            if args.mode != "stored size":
                prepare_images(batch.images, 224, batch.seeds if args.mode == "augmented" else None)
            yield batch

    return throughput(args, started, batches)


def measure_gpu(batch_size: int) -> None:
    """Print how fast a GPU, if there is one, resizes and augments."""
    import torch  # noqa: PLC0415

    from prismo.data.images import prepare_images, sample_seeds  # noqa: PLC0415

    if not torch.cuda.is_available():
        return
    images = torch.randint(0, 256, (batch_size, 2, 3, 256, 256), dtype=torch.uint8).cuda()
    seeds = sample_seeds(0, 0, torch.arange(batch_size))
    for repeats in (5, 50):  # the first are for warming up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            prepare_images(images, 224, seeds)
        torch.cuda.synchronize()
    rate = repeats * batch_size / (time.perf_counter() - start)
    print(f"resize and augmentation on {torch.cuda.get_device_name()}: {rate:.0f} samples/s\n")


def measure_tfdata(args: BenchConfig) -> dict[str, float]:
    started = time.perf_counter()
    import numpy as np  # noqa: PLC0415
    import tensorflow as tf  # noqa: PLC0415
    import tensorflow_datasets as tfds  # noqa: PLC0415
    import torch  # noqa: PLC0415

    folder = version_folder(Path(args.data_root_dir), args.dataset_name)
    stats = next(iter(json.loads(Path(args.statistics).read_text())["content"].values()))

    def batches() -> Iterator[Any]:
        frames = tf_frames(tf, tfds, folder, stats, args).as_numpy_iterator()
        while True:
            taken = [next(frames) for _ in range(args.batch_size)]
            yield {
                "images": torch.from_numpy(np.stack([np.stack([f[view] for view in VIEWS]) for f in taken])),
                "actions": torch.from_numpy(np.stack([f["action"] for f in taken])),
                "proprio": torch.from_numpy(np.stack([f["proprio"] for f in taken])),
                "instructions": [f["instruction"].decode() for f in taken],
            }

    return throughput(args, started, batches)


def tf_frames(tf: Any, tfds: Any, folder: Path, stats: dict[str, Any], args: BenchConfig) -> Any:
    """The original's tf.data pipeline up to single frames."""
    chunk, size = 8, 224
    goals = args.measure == "original"
    views = (*VIEWS, *(f"goal_{view}" for view in VIEWS)) if goals else VIEWS
    bounds = {k: [tf.constant(stats[k][q], tf.float32) for q in ("q01", "q99")] for k in ("action", "proprio")}
    mask = tf.constant(stats["action"]["mask"])

    def scale(x: Any, key: str) -> Any:
        low, high = bounds[key]
        return tf.clip_by_value(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)

    def trajectory(episode: dict[str, Any]) -> dict[str, Any]:
        steps = episode["steps"]
        gripper = 1 - tf.clip_by_value(steps["action"][:, -1:], 0, 1)
        action = tf.concat([steps["action"][:, :6], gripper], axis=1)
        action = tf.where(mask, scale(action, "action"), action)
        windows = tf.shape(action)[0] - (chunk - 1)
        ahead = tf.range(windows)[:, None] + tf.range(chunk)[None]
        images = dict(zip(VIEWS, (steps["observation"]["image"], steps["observation"]["wrist_image"]), strict=True))
        if goals:  # a random later frame for every frame
            share = tf.random.uniform([windows])
            later = tf.range(windows) + 1
            goal = later + tf.cast(share * tf.cast(tf.shape(action)[0] - later, tf.float32), tf.int32)
            images |= {f"goal_{view}": tf.gather(image, goal) for view, image in images.items()}
        return {
            **{view: image[:windows] for view, image in images.items()},
            "action": tf.gather(action, ahead),
            "proprio": scale(steps["observation"]["state"][:windows], "proprio"),
            "instruction": steps["language_instruction"][:windows],
        }

    def decode(frame: dict[str, Any]) -> dict[str, Any]:
        for key in views:
            image = tf.io.decode_image(frame[key], expand_animations=False, dtype=tf.uint8)
            if args.mode != "stored size":
                image = tf.image.resize(image, (size, size), method="lanczos3", antialias=True)
                image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
            frame[key] = image
        return frame

    def augment(frame: dict[str, Any]) -> dict[str, Any]:
        seed = tf.random.uniform([2], maxval=tf.dtypes.int32.max, dtype=tf.int32)
        for number, key in enumerate(views):
            frame[key] = tf_augment(tf, frame[key], seed + number, size)
        return frame

    frames = tf_episodes(tf, tfds, folder).map(trajectory, num_parallel_calls=1).repeat()
    frames = frames.flat_map(tf.data.Dataset.from_tensor_slices).shuffle(args.shuffle_buffer_size)
    frames = frames.map(decode, num_parallel_calls=16)
    return frames.map(augment, num_parallel_calls=16) if args.mode == "augmented" else frames


def tf_episodes(tf: Any, tfds: Any, folder: Path) -> Any:
    """Episodes with encoded images, read with the original's options."""
    reading = tfds.ReadConfig(
        skip_prefetch=True, num_parallel_calls_for_interleave_files=1, interleave_cycle_length=1, try_autocache=False
    )
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_optimization.apply_default_optimizations = True
    return (
        tfds.builder_from_directory(str(folder))
        .as_dataset(
            split="train", shuffle_files=True, decoders={"steps": tfds.decode.SkipDecoding()}, read_config=reading
        )
        .with_options(options)
    )


def tf_augment(tf: Any, image: Any, seed: Any, size: int) -> Any:
    """The original's augmentation chain."""

    def next_seed(seed: Any) -> Any:
        return tf.random.stateless_uniform([2], seed, maxval=tf.dtypes.int32.max, dtype=tf.int32)

    image = tf.image.convert_image_dtype(image, tf.float32)
    side = tf.sqrt(0.9)
    offset = tf.random.stateless_uniform((1,), seed, 0, 1 - side)
    box = tf.stack([offset, offset, offset + side, offset + side], axis=1)
    image = tf.clip_by_value(tf.image.crop_and_resize(image[None], box, [0], (size, size))[0], 0, 1)
    for change in (
        lambda x, s: tf.image.stateless_random_brightness(x, 0.2, s),
        lambda x, s: tf.image.stateless_random_contrast(x, 0.8, 1.2, s),
        lambda x, s: tf.image.stateless_random_saturation(x, 0.8, 1.2, s),
        lambda x, s: tf.image.stateless_random_hue(x, 0.05, s),
    ):
        seed = next_seed(seed)
        image = tf.clip_by_value(change(image, seed), 0, 1)
    return tf.image.convert_image_dtype(image, tf.uint8, saturate=True)


MEASURES: dict[str, Callable[[BenchConfig], dict[str, Any]]] = {
    "index": measure_index,
    "prismo": measure_prismo,
    "tfdata": measure_tfdata,
    "original": measure_tfdata,
}


if __name__ == "__main__":
    main(CONFIG)
