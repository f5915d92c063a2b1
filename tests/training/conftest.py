"""A small RLDS dataset, tiny models and the command line that trains them; everything made once per session."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prismo.commands import train as command
from prismo.data.synthetic import write_synthetic_libero
from prismo.testing.tiny import make_tiny_vggt
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig

REPOSITORY = Path(__file__).resolve().parents[2]
DATASET = "libero_spatial_no_noops"
Flags = Callable[..., list[str]]


@pytest.fixture(scope="session")
def libero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with one LIBERO-like dataset of 8 episodes."""
    root = tmp_path_factory.mktemp("rlds")
    write_synthetic_libero(root, DATASET, episodes=8, steps=16, image_size=64)
    return root


@pytest.fixture(scope="session")
def small_vggt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VGGT for pictures of 56 pixels, so that a training step takes a fraction of a second."""
    return make_tiny_vggt(tmp_path_factory.mktemp("vggt") / "model.pt", image_size=56)


@pytest.fixture(scope="session")
def flags(tiny_base: Path, small_vggt: Path, libero: Path) -> Flags:
    """`flags(run_root, batch_size=2)` -> arguments of finetune_align.py: the published recipe at tiny size."""

    def build(run_root: Path, **changes: object) -> list[str]:
        values: dict[str, object] = {
            "vla_path": tiny_base,
            "vggt_path": small_vggt,
            "data_root_dir": libero,
            "dataset_name": DATASET,
            "run_root_dir": run_root,
            "run_id_override": "run",
            "vla_layers_align": 2,
            "use_vlm_norm": True,
            "use_vggt_pe": True,
            "num_images_in_input": 2,
            "use_proprio": True,
            "lora_rank": 4,
            "batch_size": 2,
            "num_workers": 0,
            "wandb_log_freq": 1,
            "max_steps": 3,
            "save_freq": 100,
            "merge_lora_during_training": False,
            "align_map_freq": 0,
        } | changes
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return build


def train(arguments: list[str], kind: type[FinetuneConfig] = FinetuneAlignConfig) -> int:
    """Run the trainer in this process; returns the exit code."""
    return command.train(kind, arguments)


def environment() -> dict[str, str]:
    """For training processes: this checkout, one thread each."""
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def metrics(run: Path, split: str = "train") -> dict[int, dict[str, float]]:
    """Entries of metrics.jsonl by step; fails on a step that is there twice."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = [entry for entry in entries if entry.pop("split") == split]
    by_step = {int(entry.pop("step")): entry for entry in chosen}
    assert len(by_step) == len(chosen), "a step was logged twice"
    return by_step


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def long_run(flags: Flags, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Six updates with a checkpoint at 4 and at the end; returns the run folder."""
    before, root = contents(tiny_base), tmp_path_factory.mktemp("long")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)  # as in a process of its own
    assert train(flags(root, max_steps=6, save_freq=4, align_map_freq=5, lora_dropout=0.1)) == 0
    logging.getLogger().setLevel(level)
    # The original rewrites config.json and model code of whatever it loads (defect 21).
    assert contents(tiny_base) == before
    return root / "run"


TIMES = ("step_seconds", "samples_per_second", "data_wait_share")


def figures(run: Path) -> dict[int, dict[str, float]]:
    """Entries without the measured times: what must be equal bit for bit."""
    return {
        step: {name: value for name, value in entry.items() if name not in TIMES}
        for step, entry in metrics(run).items()
    }


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a trainer state."""
    folder = checkpoint / "trainer_state"
    return {
        f"{name}:{key}": value
        for name in ("weights", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def assert_same_state(left: Path, right: Path) -> None:
    """Weights, moments and position of two checkpoints are equal bit for bit."""
    a, b = state(left), state(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} tensors differ, e.g. {different[:3]}"
    numbers = [json.loads((folder / "trainer_state" / "state.json").read_text()) for folder in (left, right)]
    for number in numbers:
        number.pop("world_size")
    assert numbers[0] == numbers[1]


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.ERROR)
    return caplog
