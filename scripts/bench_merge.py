"""Merge a full-size random adapter (OpenVLA-7B, rank 32) and print time and peak memory beside a plain file copy.

    python scripts/bench_merge.py --folder /tmp/bench_merge

Needs 31 GB of disk and no GPU; removes everything it wrote.
"""

from dataclasses import dataclass
from pathlib import Path

from prismo.util.cli import parse_or_exit


@dataclass
class BenchConfig:
    # Scratch folder; must not exist
    folder: Path = Path("bench_merge")
    # LoRA rank
    rank: int = 32


if __name__ == "__main__":
    CONFIG = parse_or_exit(BenchConfig, __doc__)  # before the imports that take seconds

import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_models import build_openvla_7b
from safetensors.torch import save_file
from torch import Tensor

from prismo.data.normalize import dump_statistics
from prismo.embodiment import LIBERO
from prismo.models.lora import LoraSpec, add_lora, lora_parameters, published_config
from prismo.models.openvla import OpenVLAConfig
from prismo.models.weight_files import INDEX, StoredTensor, write_shards
from prismo.testing.tiny import tiny_statistics
from prismo.util.files import write_json

_MERGE = """
import resource, sys
from prismo.merging.merge import merge
merge(*sys.argv[1:4], verify=sys.argv[4] == "1")
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss)
"""


def write_base(folder: Path) -> int:
    """A random base in the official layout, tensor by tensor; returns its bytes."""
    folder.mkdir(parents=True)
    OpenVLAConfig().save_pretrained(folder)
    noise = torch.randn(2**25, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    layout = {
        name: StoredTensor(folder, "BF16", tuple(value.shape), 0, value.numel() * 2)
        for name, value in build_openvla_7b("meta").state_dict().items()
    }

    def produce(name: str) -> Tensor:
        count = math.prod(layout[name].shape)
        return noise.repeat(math.ceil(count / len(noise)))[:count].view(layout[name].shape)

    weight_map = write_shards(folder, layout, produce, shard_bytes=7_000_000_000, wrote=lambda _: None)
    size = sum(stored.size for stored in layout.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return size


def write_adapter(checkpoint: Path, spec: LoraSpec) -> None:
    """A random adapter of the recipe and the statistics that belong to a checkpoint."""
    model = build_openvla_7b("meta")
    add_lora(model, spec)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"base_model.model.{name}": torch.randn(p.shape, generator=generator) * 0.02
        for name, p in lora_parameters(model).items()
    }
    (checkpoint / "lora_adapter").mkdir(parents=True)
    save_file(tensors, checkpoint / "lora_adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(checkpoint / "lora_adapter" / "adapter_config.json", published_config(spec, "random"))
    dump_statistics({"libero_spatial_no_noops": tiny_statistics(LIBERO)}, checkpoint / "dataset_statistics.json")


@dataclass(frozen=True)
class Cost:
    """Wall and processor seconds, and peak resident memory in bytes."""

    seconds: float
    cpu: float
    peak: float | None = None


def copy_files(source: Path, target: Path) -> Cost:
    """A plain copy of the weights, flushed to disk."""
    target.mkdir()
    began, cpu = time.monotonic(), time.process_time()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 2**24)
            writer.flush()
            os.fsync(writer.fileno())
    return Cost(time.monotonic() - began, time.process_time() - cpu)


def run_merge(base: Path, checkpoint: Path, output: Path, verify: bool) -> Cost:
    """A merge in a process of its own, imports included."""
    began = time.monotonic()
    command = [sys.executable, "-c", _MERGE, str(base), str(checkpoint), str(output), "1" if verify else "0"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cpu, peak = (float(value) for value in done.stdout.split()[-2:])
    return Cost(time.monotonic() - began, cpu, peak)


def main(cfg: BenchConfig) -> None:
    cfg.folder.mkdir(parents=True)
    base, checkpoint, output = (cfg.folder / name for name in ("base", "checkpoint", "output"))
    try:
        size = write_base(base)
        write_adapter(checkpoint, LoraSpec(cfg.rank))
        rows = [("plain copy of the same bytes", copy_files(base, output))]
        for verify in (False, True):
            shutil.rmtree(output)
            name = "merge and verify (the default)" if verify else "merge only"
            rows.append((name, run_merge(base, checkpoint, output, verify)))
    finally:
        shutil.rmtree(cfg.folder)
    print(f"{size / 1e9:.1f} GB of bf16 weights, rank {cfg.rank}, {os.cpu_count()} processors")
    print(f"{'':32} {'seconds':>8} {'x copy':>7} {'cpu s':>7} {'MB/s':>6} {'peak RSS':>10}")
    for name, cost in rows:
        ratio, rate = cost.seconds / rows[0][1].seconds, size / 1e6 / cost.seconds
        memory = f"{cost.peak / 1e9:.2f} GB" if cost.peak else ""
        print(f"{name:32} {cost.seconds:8.1f} {ratio:7.2f} {cost.cpu:7.1f} {rate:6.0f} {memory:>10}")


if __name__ == "__main__":
    main(CONFIG)
