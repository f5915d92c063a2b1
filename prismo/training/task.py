"""What the trainer must know of a model family: one objective and a handful of functions.

`prismo.training.openvla` and `prismo.training.spatialvla` bring a `ModelFamily` each; once a model is loaded, all
goes through the `TrainingTask` that its `load_task` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from prismo.data.loader import Batch, CollateText
from prismo.data.normalize import DatasetStats
from prismo.embodiment import Embodiment
from prismo.models.component_files import Step
from prismo.training.config import FinetuneConfig
from prismo.training.distributed import World
from prismo.training.objective import Objective

C = TypeVar("C", bound=FinetuneConfig)


class TrainingTask(Protocol):
    """A model that is ready to be trained. `prismo.training.policy_task.PolicyTask` has the part with the files.

    Attributes:
        objective: takes what `inputs` gives. Holds every trained weight, in fp32; whatever gets no gradient is frozen.
        robot: whose actions are predicted.
        base_fingerprint: identity of the frozen weights.
    """

    robot: Embodiment
    base_fingerprint: str

    @property
    def objective(self) -> Objective: ...

    def inputs(self, batch: Batch, train: bool) -> Any:
        """Inputs of the objective on the device; their `images` are what the model sees, float [B, V, 3, H, W] in
        [0, 1]. With `train` False as in evaluation, without augmentation.
        """

    def predict(self, inputs: Any) -> Tensor:
        """Normalised actions [B, K, A], as the policy will give them."""

    def write(self, folder: Path, step: Step, weights: Mapping[str, Tensor]) -> None:
        """Write the published files of the policy. Main process only; the weights are whole and on the CPU, by name in
        the objective, which may hold but its part of them.
        """

    def merge(self, folder: Path) -> object:
        """Write the merged model into a complete checkpoint folder."""

    def load_modules(self, folder: Path, step: int) -> list[str]:
        """Restore what a published checkpoint holds beside the merged weights; returns the names of its files."""


@dataclass(frozen=True)
class RunSizes:
    """Sizes of a run, from configurations alone.

    Attributes:
        base: frozen weights of the policy.
        trained: trained weights by part.
        llm: configuration of the language model.
        tokens: of one sample, about.
    """

    base: int
    trained: dict[str, int]
    llm: Any
    tokens: int

    @property
    def total_trained(self) -> int:
        return sum(self.trained.values())


class CheckFlags(Protocol):
    """Flags in, flags of the same kind out."""

    def __call__(self, config: C, base: Path, processes: int, /) -> C: ...


@dataclass(frozen=True)
class ModelFamily:
    """What the trainer must know of a family before a model is loaded.

    Attributes:
        check_flags: (flags, base folder, number of processes) -> the flags as this family means them. Reads small
            files only and raises ValueError for flags that the family does not have.
        chunk: base folder -> actions per chunk; None = the robot's.
        image_size: base folder -> height and width of the pictures that the model sees.
        hidden_states: base folder -> number of hidden states that auxiliary losses can ask for.
        load_collate: base folder and flags -> what makes token ids in the data workers, without weights.
        load_task: loads the model (and the auxiliary losses) and puts together what is trained.
        sizes: (flags, base folder, robot) -> sizes; nothing is allocated.
        prompt: instruction -> the text that the model reads before it acts.
        usual_batch: samples per update of the published runs.
    """

    check_flags: CheckFlags
    chunk: Callable[[Path], int | None]
    image_size: Callable[[Path], int]
    hidden_states: Callable[[Path], int]
    load_collate: Callable[[FinetuneConfig, Path], CollateText]
    load_task: Callable[[FinetuneConfig, Path, Embodiment, Mapping[str, DatasetStats], World], TrainingTask]
    sizes: Callable[[FinetuneConfig, Path, Embodiment], RunSizes]
    prompt: Callable[[str], str]
    usual_batch: int
