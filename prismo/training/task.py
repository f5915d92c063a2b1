"""What the trainer must know of a model family: one objective and a handful of functions. No base classes.

`prismo.training.openvla` and `prismo.training.spatialvla` bring a `ModelFamily` each; once a model is loaded, all
goes through the `TrainingTask` that its `build_task` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from prismo.data.loader import Batch, CollateText
from prismo.data.normalize import DatasetStats
from prismo.embodiment import Embodiment
from prismo.models.component_files import Step
from prismo.training.config import FinetuneConfig
from prismo.training.distributed import World

C = TypeVar("C", bound=FinetuneConfig)


@dataclass(frozen=True)
class TrainingTask:
    """A model that is ready to be trained.

    Attributes:
        objective: takes what `inputs` gives and returns `prismo.training.objective.Losses`. Holds every trained
            weight, in fp32; whatever gets no gradient is frozen.
        robot: whose actions are predicted.
        inputs: (batch from the loader, train) -> inputs of the objective on the device; with `train` False as in
            evaluation, without augmentation.
        predict: inputs -> normalised actions [B, K, A], as the policy will give them.
        write: (folder, step for file names, trained weights) writes the published files of the policy. Main process
            only; the weights are whole and on the CPU, by name in the objective, which may hold but its part of them.
        merge: writes the merged model into a complete checkpoint folder; None where there is nothing to merge.
        load_modules: (folder, step) restores what a published checkpoint holds beside the merged weights and says what.
        cosine_map: inputs -> cosine of policy and teacher [B, V, rows, columns]; None without alignment.
        pictures: inputs -> what the model sees, float [B, V, 3, H, W] in [0, 1].
        base_fingerprint: identity of the frozen weights.
    """

    objective: nn.Module
    robot: Embodiment
    inputs: Callable[[Batch, bool], Any]
    predict: Callable[[Any], Tensor]
    write: Callable[[Path, Step, Mapping[str, Tensor]], None]
    merge: Callable[[Path], object] | None
    load_modules: Callable[[Path, int], list[str]]
    cosine_map: Callable[[Any], Tensor] | None
    pictures: Callable[[Any], Tensor]
    base_fingerprint: str


@dataclass(frozen=True)
class Outline:
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


class Settle(Protocol):
    """Flags in, flags of the same kind out."""

    def __call__(self, config: C, base: Path, processes: int, /) -> C: ...


@dataclass(frozen=True)
class ModelFamily:
    """What the trainer must know of a family before a model is loaded.

    Attributes:
        settle: (flags, base folder, number of processes) -> the flags as this family means them. Reads small files
            only and raises ValueError for flags that the family does not have.
        chunk: base folder -> actions per chunk; None = the robot's.
        image_size: base folder -> height and width of the pictures that the model sees.
        hidden_states: base folder -> number of hidden states that can be aligned.
        load_collate: base folder and flags -> what makes token ids in the data workers, without weights.
        build_task: loads the model (and the teacher) and puts together what is trained.
        outline: (flags, base folder, robot) -> sizes; nothing is allocated.
        pictures: (flags, base folder, batch) -> what the model sees of a batch, float [B, V, 3, H, W] in [0, 1].
        prompt: instruction -> the text that the model reads before it acts.
        usual_batch: samples per update of the published runs.
    """

    settle: Settle
    chunk: Callable[[Path], int | None]
    image_size: Callable[[Path], int]
    hidden_states: Callable[[Path], int]
    load_collate: Callable[[FinetuneConfig, Path], CollateText]
    build_task: Callable[[FinetuneConfig, Path, Embodiment, Mapping[str, DatasetStats], World], TrainingTask]
    outline: Callable[[FinetuneConfig, Path, Embodiment], Outline]
    pictures: Callable[[FinetuneConfig, Path, Batch], Tensor]
    prompt: Callable[[str], str]
    usual_batch: int
