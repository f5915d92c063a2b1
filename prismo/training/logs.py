"""Where the figures of a run go: a JSONL file always, Weights & Biases and TensorBoard if asked, a progress bar.

Only the main process has these. Every sink takes `log(split, step, values)` and `image(name, step, path)`.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import torch
from tqdm import tqdm

from prismo.training.config import PLACEHOLDER, FinetuneConfig
from prismo.util.files import atomic_write
from prismo.util.schema import parse_json

_LOG = logging.getLogger(__name__)

Split = Literal["train", "val"]
_WANDB_ID = "wandb_run_id.txt"
# Dense bf16 peak of known GPUs in FLOP/s (NVIDIA's data sheets, without sparsity), by a part of the device's name;
# the first match counts.
_PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 6000 Ada": 364e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Sink(Protocol):
    """A place for figures and pictures."""

    def log(self, split: Split, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, name: str, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object per entry, `{"step": ..., "split": "train", "loss": ...}`.

    Args:
        path: the file.
        step: updates done; entries of later steps, which a killed run left, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.is_file() and step:
            kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, split: Split, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()

    def image(self, name: str, step: int, path: Path) -> None:
        """Pictures are files already."""

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class _Entry:
    """What is looked at of an entry."""

    step: int


def _step_of(line: bytes) -> float:
    """Step of an entry; a line that a kill cut off or a disk damaged belongs to no step that was saved."""
    try:
        return parse_json(line, _Entry, "entry").step
    except ValueError:
        return math.inf


class Wandb:
    """Weights & Biases under the original's names; online or not is up to WANDB_MODE and the user's settings."""

    def __init__(self, config: FinetuneConfig, folder: Path, resumed: bool) -> None:
        import wandb  # noqa: PLC0415 (an extra, and slow to import)

        identity = folder / _WANDB_ID
        if not (resumed and identity.is_file()):
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        given = {
            key: value
            for key, value in (("entity", config.wandb_entity), ("project", config.wandb_project))
            if not value.startswith(PLACEHOLDER)
        }
        self._wandb = wandb
        try:
            self._run = wandb.init(
                entity=given.get("entity"),
                project=given.get("project"),
                name=folder.name,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
                dir=folder,
                config={field: str(value) for field, value in asdict(config).items()},
            )
        except (wandb.Error, ValueError) as error:
            raise ValueError(
                f"Weights & Biases: {' '.join(str(error).split())} (entity and project as given: {given or 'none'}). "
                "Mend that, set WANDB_MODE=offline, or pass --use_wandb False"
            ) from error

    def log(self, split: Split, step: int, values: Mapping[str, float]) -> None:
        self._run.log({chart_name(split, name): value for name, value in values.items()}, step=step)

    def image(self, name: str, step: int, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard files in the run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        # TensorBoard takes the whole of TensorFlow for its file access where it finds it, unless this module is there.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (needs the extra `tensorboard`)

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step or None)

    def log(self, split: Split, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(chart_name(split, name), value, step)

    def image(self, name: str, step: int, path: Path) -> None:
        import numpy as np  # noqa: PLC0415
        from PIL import Image  # noqa: PLC0415

        self._writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def chart_name(split: Split, name: str) -> str:
    """`curr_action_l1_loss` -> `VLA Train/Curr Action L1 Loss`, as the original calls it."""
    return f"VLA {split.title()}/{name.replace('_', ' ').title()}"


def open_online(config: FinetuneConfig, folder: Path, resumed: bool) -> list[Sink]:
    """The sinks outside of this machine that the flags ask for.

    Raises:
        ValueError: it refuses, and why.
    """
    return [Wandb(config, folder, resumed)] if config.wandb_wanted else []


def open_sinks(config: FinetuneConfig, folder: Path, step: int) -> list[Sink]:
    """The sinks in the run's folder that the flags ask for."""
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", step)]
    if config.use_tensorboard:
        sinks.append(TensorBoard(folder, step))
    return sinks


class Progress:
    """Progress bar and speed of the main process.

    Args:
        done, total: updates.
        samples_per_update: of all processes.
        flops_per_update: of one device; 0 = unknown.
        show: False draws no bar (other processes).
    """

    def __init__(self, done: int, total: int, samples_per_update: int, show: bool) -> None:
        # Without a terminal every redraw is a new line of the log file.
        interval = 0.5 if sys.stderr.isatty() else 30
        self._bar = tqdm(total=total, initial=done, desc="train", unit="step", mininterval=interval, disable=not show)
        self._samples = samples_per_update
        self.flops_per_update = 0.0
        self._restart()

    def _restart(self) -> None:
        self._began, self._waited, self._paused, self._updates = time.perf_counter(), 0.0, 0.0, 0

    def update(self, waited: float) -> None:
        """Count an update that waited `waited` seconds for data."""
        self._waited += waited
        self._updates += 1
        self._bar.update()

    def speed(self) -> dict[str, float]:
        """Figures since the last call: seconds per update, samples/s, share of time spent waiting for data, MFU."""
        elapsed = time.perf_counter() - self._began - self._paused
        values = {
            "step_seconds": elapsed / self._updates,
            "samples_per_second": self._samples * self._updates / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        peak = gpu_peak_flops()
        if peak and self.flops_per_update:
            values["mfu"] = self.flops_per_update * self._updates / elapsed / peak
        self._restart()
        return values

    def show(self, values: Mapping[str, float]) -> None:
        """Put the main figures behind the bar."""
        shown = {
            "loss": "loss",
            "align": "align_loss",
            "samples/s": "samples_per_second",
            "data": "data_wait_share",
            "mfu": "mfu",
        }
        parts = [f"{label} {values[name]:.3g}" for label, name in shown.items() if name in values]
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    @contextmanager
    def pause(self) -> Generator[None]:
        """Leave the time of this block (a checkpoint, a validation, a picture) out of the speed."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def close(self) -> None:
        self._bar.close()


def gpu_peak_flops() -> float | None:
    """Dense bf16 peak of this process's GPU; None for a CPU or an unknown one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def log_all(sinks: Sequence[Sink], split: Split, step: int, values: Mapping[str, float]) -> None:
    """Write one entry to every sink."""
    for sink in sinks:
        sink.log(split, step, values)
