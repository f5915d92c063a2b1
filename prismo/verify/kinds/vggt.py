"""VGGT, the geometry teacher: `model.pt` or a safetensors file, or the folder of one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prismo.align.vggt import VGGTAggregator, infer_config, load_vggt
from prismo.verify import tensors
from prismo.verify.checks import Check, Finding, SkippedError, difference, judge, some
from prismo.verify.kinds.policy import model_type
from prismo.verify.memory import check_room, in_bytes, peak_memory, reset_peak
from prismo.verify.sample import VIEWS, images
from prismo.verify.subject import Subject

_NAMES = ("model.safetensors", "model.pt")
_AGGREGATOR = "aggregator"
_ARCHITECTURE = "vggt-1b"  # its groups are those of every size
_TENSORS = ("weight files", "tensor names", "tensor shapes")


class VGGTFile:
    """The checks of one file."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        name = subject.known.architecture if subject.known else None
        self.architecture = subject.facts.architectures[name] if name else None
        self.groups = tuple(subject.facts.architectures[_ARCHITECTURE].groups)
        self.file = weights_file(subject.path)

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.subject.options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @cached_property
    def stored(self) -> Mapping[str, tensors.Stored]:
        return tensors.read_file(self.file)

    @cached_property
    def aggregator(self) -> dict[str, tensors.Stored]:
        """Without the prefix; the other groups are heads, which nothing here uses."""
        prefix = f"{_AGGREGATOR}."
        return {name.removeprefix(prefix): t for name, t in self.stored.items() if name.startswith(prefix)}

    @cached_property
    def expected(self) -> tensors.Shapes:
        with tensors.on_meta():
            state = {name: torch.empty(tensor.shape) for name, tensor in self.aggregator.items()}
            return tensors.shapes_of(VGGTAggregator(infer_config(state, self.file.name)))

    def checks(self) -> list[Check]:
        return [
            Check("weight files", self._weight_files),
            Check("tensor names", self._names, ("weight files",)),
            Check("tensor shapes", lambda: tensors.check_shapes(self.aggregator, self.expected), _TENSORS[:2]),
            Check("tensor types", lambda: tensors.check_dtypes(self.aggregator, None), ("weight files",)),
            Check("counts", lambda: tensors.check_counts(self.stored, self.architecture), _TENSORS),
            Check("groups", self._groups, _TENSORS),
            Check("features", self._features, _TENSORS),
            Check("black image", self._sees, ("features",)),
            Check("time and memory", self._cost, ("features",)),
        ]

    def _weight_files(self) -> Finding:
        size = in_bytes(self.file.stat().st_size)
        return Finding("ok", f"{self.file.name}, whole, {size}, {len(self.stored):,} tensors")

    def _names(self) -> Finding:
        unknown = {name for name in self.stored if name.split(".")[0] not in self.groups}
        lines = [difference("first parts of names", some(set(self.groups)), some(unknown))] if unknown else []
        finding = tensors.check_names(self.aggregator, self.expected)
        return judge(f"{finding.text} (of the aggregator)", [*lines, *finding.details])

    def _groups(self) -> Finding:
        found: Counter[str] = Counter()
        for name, tensor in self.stored.items():
            found[name.split(".")[0]] += tensors.parameters([tensor])
        text = ", ".join(f"{group} {found[group]:,}" for group in self.groups)
        if self.architecture is None:
            return Finding("not known", text)
        pairs = ((group, count, found[group]) for group, count in self.architecture.groups.items())
        return judge(text, [difference(group, f"{a:,}", f"{b:,}") for group, a, b in pairs if a != b])

    # ------------------------------------------------------------------ features

    @cached_property
    def _model(self) -> VGGTAggregator:
        if not self.subject.options.forward:
            raise SkippedError("--no_forward")
        check_room(tensors.parameters(self.aggregator.values()), self.device, self.dtype)
        reset_peak(self.device)
        return load_vggt(self.file, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def _run(self, *, black: bool = False) -> Tensor:
        """Features [V, h, w, 2C] of the last layer, on the host."""
        views = torch.from_numpy(np.stack(images(VIEWS, black=black))).permute(0, 3, 1, 2)
        pixels = (views.float() / 255)[None].to(self.device)
        return self._model.features(pixels, -1)[0].float().cpu()

    @cached_property
    def _real(self) -> Tensor:
        return self._run()

    def _features(self) -> Finding:
        found = self._real
        side = self._model.config.image_size // self._model.config.patch_size
        shape, expected = list(found.shape), [VIEWS, side, side, self._model.width]
        lines = [difference("shape of the features", expected, shape)] if shape != expected else []
        if not torch.isfinite(found).all():
            lines.append("features: expected finite numbers, found others")
        elif found.flatten(0, 2).std(dim=0).max() == 0:
            lines.append("features: expected others at every patch, found the same everywhere")
        text = f"{shape}, mean {found.mean():.4f}, std {found.std():.4f}"
        return judge(f"{text}, {str(self.dtype).removeprefix('torch.')} on {self.device}", lines)

    def _sees(self) -> Finding:
        change = float((self._run(black=True) - self._real).abs().max())
        same = "black images give the same features as real ones: expected others, found the same"
        return judge(f"the largest change is {change:.3g}", [] if change > 0 else [same])

    def _cost(self) -> Finding:
        start = time.perf_counter()
        self._run()
        seconds = time.perf_counter() - start
        return Finding("ok", f"{VIEWS} views in {seconds * 1e3:.0f} ms; peak {peak_memory(self.device)}")


def weights_file(path: Path) -> Path:
    """The file itself, or that in a folder; FileNotFoundError where there is none."""
    for candidate in [path / name for name in _NAMES] if path.is_dir() else [path]:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{path} holds neither {' nor '.join(_NAMES)}")


class VGGT:
    """The kind."""

    title = "VGGT teacher"

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return model_type(path) is None and any((path / name).is_file() for name in _NAMES)
        return path.is_file() and path.suffix in (".pt", ".pth", ".safetensors")

    def checks(self, subject: Subject) -> list[Check]:
        return VGGTFile(subject).checks()
