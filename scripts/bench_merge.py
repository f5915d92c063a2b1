"""Merge a full-size random adapter (OpenVLA-7B, rank 32) and print time and peak memory beside a plain file copy.

    python scripts/bench_merge.py --folder /tmp/bench_merge

Needs 31 GB of disk and no GPU; removes everything it wrote.
"""

import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import draccus
import torch
from safetensors.torch import save_file
from torch import Tensor

from prismo.data.normalize import dump_statistics
from prismo.embodiment import LIBERO
from prismo.models.full_size import build_openvla_7b
from prismo.models.lora import LoraSpec, add_lora, lora_parameters, published_config
from prismo.models.openvla import OpenVLAConfig
from prismo.models.tiny import tiny_statistics
from prismo.models.weight_files import INDEX, StoredTensor, write_shards
from prismo.util.files import write_json

_MERGE = "import sys; from prismo.models.merge import merge; print(merge(*sys.argv[1:4], verify=sys.argv[4] == '1'))"


@dataclass
class BenchConfig:
    # Scratch folder; must not exist
    folder: Path = Path("bench_merge")
    # LoRA rank
    rank: int = 32
    # Threads of the merge; 0 = PyTorch's default
    threads: int = 0


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

    _, weight_map = write_shards(folder, layout, produce, shard_bytes=7_000_000_000, wrote=lambda _: None)
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


def copy_files(source: Path, target: Path) -> float:
    """Seconds of a plain copy of the weights, flushed to disk."""
    target.mkdir()
    began = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 2**24)
            writer.flush()
            subprocess.run(["sync", target / path.name], check=True)
    return time.monotonic() - began


def run_merge(base: Path, checkpoint: Path, output: Path, verify: bool, threads: int) -> tuple[float, float]:
    """Seconds and peak resident memory (bytes) of a merge in a process of its own."""
    setup = f"import torch; torch.set_num_threads({threads}); " if threads else ""
    began = time.monotonic()
    arguments = [str(base), str(checkpoint), str(output), "1" if verify else "0"]
    measured = "; import resource; print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", setup + _MERGE + measured, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, file=sys.stderr)
    return time.monotonic() - began, float(done.stdout.split()[-1]) * 1024


@draccus.wrap()
def main(cfg: BenchConfig) -> None:
    cfg.folder.mkdir(parents=True)
    base, checkpoint, output = (cfg.folder / name for name in ("base", "checkpoint", "output"))
    try:
        size = write_base(base)
        write_adapter(checkpoint, LoraSpec(cfg.rank))
        rows = [("plain copy of the same bytes", copy_files(base, output), None)]
        for verify in (False, True):
            shutil.rmtree(output)
            name = "merge and verify (the default)" if verify else "merge only"
            rows.append((name, *run_merge(base, checkpoint, output, verify, cfg.threads)))
    finally:
        shutil.rmtree(cfg.folder)
    print(f"{size / 1e9:.1f} GB of bf16 weights, rank {cfg.rank}, {cfg.threads or torch.get_num_threads()} threads")
    print(f"{'':32} {'seconds':>8} {'x copy':>7} {'MB/s':>6} {'peak RSS':>10}")
    for name, seconds, peak in rows:
        memory = f"{peak / 1e9:.2f} GB" if peak else ""
        print(f"{name:32} {seconds:8.1f} {seconds / rows[0][1]:7.2f} {size / 1e6 / seconds:6.0f} {memory:>10}")


if __name__ == "__main__":
    main()
