"""What the trainer must know of a model family: one objective and a handful of functions. No base classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prismo.data.loader import Batch
from prismo.embodiment import Embodiment
from prismo.models.component_files import Step


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
        write: (folder, step for file names) writes the published files of the policy. Main process only.
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
    write: Callable[[Path, Step], None]
    merge: Callable[[Path], object] | None
    load_modules: Callable[[Path, int], list[str]]
    cosine_map: Callable[[Any], Tensor] | None
    pictures: Callable[[Any], Tensor]
    base_fingerprint: str
