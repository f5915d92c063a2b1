"""What the tasks of all families have in common: the files of a checkpoint, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from prismo.data.normalize import DatasetStats, dump_statistics
from prismo.embodiment import Embodiment
from prismo.merging.merge import MergeReport, merge
from prismo.models.component_files import Step, check_fits, find_component, read_component, save_component
from prismo.models.lora import LoraSpec, save_adapter
from prismo.models.weight_files import fingerprint, full_fingerprint, stored_tensors
from prismo.training.config import FinetuneConfig
from prismo.training.distributed import World
from prismo.training.objective import Objective
from prismo.training.sharding import local, scatter

T = TypeVar("T", bound=Objective)


@dataclass(eq=False)
class PolicyTask(Generic[T]):
    """Half of a `prismo.training.task.TrainingTask`; a family adds `inputs`, `predict` and its own files.

    Attributes:
        statistics: of the datasets by name, for the checkpoints.
        base: folder of the base model.
        lora: the adapters; None = the weights themselves are trained.
    """

    objective: T
    config: FinetuneConfig
    robot: Embodiment
    statistics: Mapping[str, DatasetStats]
    base: Path
    world: World
    lora: LoraSpec | None

    def __post_init__(self) -> None:
        self.device, self.precision = self.world.device, self.config.precision(self.world.device)
        tensors = stored_tensors(self.base)
        self.base_fingerprint = fingerprint(tensors)
        self._full_fingerprint = full_fingerprint(tensors) if self.world.is_main else None  # that process writes it

    def write(self, folder: Path, step: Step, weights: Mapping[str, Tensor]) -> None:
        """Adapters, modules beside the model and statistics."""
        if self.lora is not None:
            base = str(self.base.resolve()) if Path(self.config.vla_path).is_dir() else self.config.vla_path
            known = {"base_fingerprint": self.base_fingerprint, "base_full_fingerprint": self._full_fingerprint}
            save_adapter(self.objective.vla, folder, self.lora, base=base, **known)
        names = {module: name for name, module in self.objective.named_modules()}
        for stem, module in self.objective.components().items():
            # Published action heads are bf16, the projectors fp32.
            dtype = torch.bfloat16 if stem == "action_head" and self.precision == torch.bfloat16 else None
            save_component(module, folder, stem, step, dtype=dtype, whole=below(weights, f"{names[module]}."))
        dump_statistics(self.statistics, folder / "dataset_statistics.json")

    def merge(self, folder: Path) -> MergeReport:
        return merge(self.base, folder, overwrite=True)

    def load_modules(self, folder: Path, step: int) -> list[str]:
        """Modules of a published checkpoint; what it has of the model itself is already in the merged weights."""
        named, files = any(folder.glob(f"*--{step}_checkpoint.pt")), []
        for stem, module in self.objective.components().items():
            path = find_component(folder, stem, step if named else None)
            stored = read_component(path)
            check_fits(module, stored, path)
            for name, value in module.state_dict().items():
                local(value).copy_(scatter(stored[name], value))
            files.append(path.name)
        return files


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
