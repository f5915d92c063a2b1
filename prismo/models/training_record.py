"""What a checkpoint's files say about its training: `training_config.json`, or what gives it away without one.

Merging writes down what it finds here, evaluation goes by it, so that both say the same of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from prismo.embodiment import Camera, Embodiment
from prismo.models.component_files import has_component
from prismo.models.folder import TRAINING_CONFIG
from prismo.models.heads import HEADS, NO_HEAD
from prismo.models.self_test import AttentionKind
from prismo.util.schema import JsonObject, read_json
from prismo.util.text import did_you_mean

Count = Annotated[int, Ge(1)]
_CODE = "modeling_prismatic.py"
_PARALLEL = ("action_head", "proprio_projector", "vision_backbone")


@dataclass(frozen=True)
class TrainingRecord:
    """What evaluation must know of the run, of all that `training_config.json` holds; None = it does not say.

    Attributes:
        attention: how the language model attended.
        num_images_in_input: camera views.
        image_aug: random crops and colours.
        chunk: actions per prediction.
        num_diffusion_steps_train: length of the diffusion schedule.
        intrinsics: camera of SpatialVLA's pictures.
        embodiment: the robot.
        action_head, use_l1_regression, use_diffusion, use_film, use_proprio: modules beside an OpenVLA.
    """

    attention: AttentionKind = "bidirectional"
    num_images_in_input: Count | None = None
    image_aug: bool | None = None
    chunk: Count | None = None
    num_diffusion_steps_train: Count | None = None
    intrinsics: Camera | None = None
    embodiment: Embodiment | None = None
    action_head: str | None = None
    use_l1_regression: bool = False
    use_diffusion: bool = False
    use_film: bool = False
    use_proprio: bool = False

    @property
    def head(self) -> str:
        """How actions are predicted, a key of `HEADS`, as far as a head of that name is here."""
        flagged = (kind for kind, head in HEADS.items() if head.flag is not None and getattr(self, head.flag))
        return self.action_head or next(flagged, NO_HEAD)

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that an OpenVLA checkpoint of this run has files of."""
        others = {"proprio_projector": self.use_proprio, "vision_backbone": self.use_film}
        return (*HEADS[self.head].stems(), *(stem for stem, is_wanted in others.items() if is_wanted))


def read_training_record(folder: Path) -> TrainingRecord | None:
    """The record of a checkpoint folder; None where there is none (published checkpoints).

    Raises:
        ValueError: the file is damaged, or its robot cannot be.
    """
    path = folder / TRAINING_CONFIG
    if not path.is_file():
        return None
    record = read_json(path, TrainingRecord)
    if not read_json(path, JsonObject):
        raise ValueError(f"{path} is empty; restore it or fetch it again")
    if record.head not in HEADS:
        raise ValueError(f"{path}: {did_you_mean('action_head', record.head, HEADS)}")
    robot = record.embodiment
    if robot is not None and not all(-robot.action_dim <= dim < robot.action_dim for dim in robot.gripper_dims):
        raise ValueError(
            f"{path}: embodiment.gripper_dims {list(robot.gripper_dims)} are not among its {robot.action_dim} action "
            "numbers; restore it or fetch it again"
        )
    return record


def check_modules(folder: Path, record: TrainingRecord | None) -> None:
    """Without one of its modules an OpenVLA would run as another kind of policy.

    Raises:
        FileNotFoundError: naming the file.
    """
    for stem in () if record is None else record.modules:
        if not has_component(folder, stem):
            raise FileNotFoundError(
                f"{folder} has no {stem}--*_checkpoint.pt, which its {TRAINING_CONFIG} says it was trained with; copy "
                "the checkpoint again"
            )


def attention_kind(
    folder: Path, record: TrainingRecord | None, config: Mapping[str, Any]
) -> tuple[AttentionKind | None, str]:
    """How an OpenVLA checkpoint attends, and what says so. Published files do not state it, others give it away.

    Args:
        folder: of the checkpoint.
        record: its training record.
        config: its config.json; empty for a folder with an adapter alone.
    """
    if record is not None:
        return record.attention, f"its {TRAINING_CONFIG} says {record.attention}"
    if any(has_component(folder, stem) for stem in _PARALLEL):
        return "bidirectional", "its action head and projectors are those of parallel decoding (bidirectional)"
    if config.get("attention"):
        return config["attention"], f"its config.json says {config['attention']}"
    code = folder / _CODE
    if code.is_file():
        # OFT's model code is copied into its checkpoints; only that one knows of chunks. Read as text, never run.
        if "NUM_ACTIONS_CHUNK" in code.read_text(encoding="utf-8", errors="replace"):
            return "bidirectional", "the model code in its folder is that of OpenVLA-OFT (bidirectional)"
        return "causal", "the model code in its folder is that of vanilla OpenVLA (causal)"
    return None, "nothing says which"
