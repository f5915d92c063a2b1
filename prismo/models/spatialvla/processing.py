"""Images, text and actions of SpatialVLA: what goes in, what comes out, for training, evaluation and serving.

A checkpoint's `processor_config.json` decides over bins, statistics and cameras. Images arrive already cropped and
resized (`prismo.data.images`); whatever other size comes is resized as the authors do. Neither torchvision nor the
checkpoint's own Python files are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, MinLen
from PIL import Image
from pydantic import FiniteFloat
from tokenizers import Tokenizer
from torch import Tensor

from prismo.data.normalize import (
    DatasetStats,
    parse_statistics,
    resolve_unnorm_key,
    statistics_to_json,
    unnormalize,
)
from prismo.models.spatialvla.action_tokenizer import TOKENS_PER_ACTION, ActionTokenizer
from prismo.models.spatialvla.checkpoint import model_folder
from prismo.models.spatialvla.configuration import SpatialVLAConfig
from prismo.models.spatialvla.ego3d import CameraIntrinsics
from prismo.models.spatialvla.modeling import IGNORE_INDEX, read_config
from prismo.models.vla import pad
from prismo.util.files import atomic_write, write_json
from prismo.util.schema import JsonObject, check, read_json

_CONFIG = "processor_config.json"
_TOKENIZER = "tokenizer.json"
# Files that this processor does not need but the official code and transformers do; they are kept with a checkpoint.
_COMPANIONS = ("preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json")
_MAX_TOKENS = 2048  # what the authors' tokenizer allows; far within Gemma2's sliding window of 4096


_Number = int | FiniteFloat
_Positive = Annotated[int, Gt(0)] | Annotated[FiniteFloat, Gt(0)]
_Row = tuple[_Number, _Number, _Number]
_Edges = Annotated[list[FiniteFloat], MinLen(2)]


@dataclass(frozen=True)
class _Camera:
    """An entry of `intrinsic_config`."""

    intrinsic: tuple[_Row, _Row, _Row]
    width: _Positive
    height: _Positive

    @property
    def intrinsics(self) -> CameraIntrinsics:
        (fx, _, cx), (_, fy, cy), _ = self.intrinsic
        return CameraIntrinsics(fx, fy, cx, cy, self.width, self.height)


@dataclass(frozen=True)
class _ProcessorFile:
    """processor_config.json, as far as it is read."""

    statistics: JsonObject
    bin_policy: dict[str, dict[str, _Edges]]
    intrinsic_config: dict[str, _Camera]
    action_chunk_size: Annotated[int, Ge(1), Le(1000)] = 4


_READ = tuple(field.name for field in fields(_ProcessorFile))


@dataclass(frozen=True)
class SpatialVLATextBatch:
    """Token ids of a batch, padded on the right.

    Attributes:
        input_ids: int64 [B, L]: image placeholders, <bos>, prompt, newline, and in training action tokens and <eos>.
        attention_mask: int64 [B, L], 0 at padding.
        token_type_ids: int64 [B, L], 1 at action tokens and <eos> (and at padding, which nothing sees).
        labels: int64 [B, L], the ids of supervised tokens, -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> SpatialVLATextBatch:
        """The same batch on another device."""
        return SpatialVLATextBatch(*(value.to(device, non_blocking=True) for value in vars(self).values()))


@dataclass(frozen=True, eq=False)
class SpatialVLAProcessor:
    """Everything of a checkpoint except the network.

    Attributes:
        config: the model's configuration (token ids, image size).
        tokenizer: Gemma's; action tokens need not be in it, their ids are numbers here.
        action_tokenizer: the action grid.
        statistics: per dataset key (`droid/1.0.0`).
        cameras: per dataset key, and "default" for the rest.
        chunk: actions predicted at once (4).
        stored: the remaining keys of processor_config.json.
        companions: texts of the files that only other programs read.
    """

    config: SpatialVLAConfig
    tokenizer: Tokenizer
    action_tokenizer: ActionTokenizer
    statistics: Mapping[str, DatasetStats]
    cameras: Mapping[str, CameraIntrinsics]
    chunk: int
    stored: Mapping[str, Any]
    companions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.action_tokenizer.size != self.config.spatial_token_num:
            raise ValueError(
                f"the action grid has {self.action_tokenizer.size} tokens, the model {self.config.spatial_token_num}"
            )
        if "default" not in self.cameras:
            raise ValueError('intrinsic_config has no "default" camera')

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, config: SpatialVLAConfig | None = None
    ) -> SpatialVLAProcessor:
        """Read a checkpoint folder or hub id; nothing in it is executed or written.

        Args:
            config: of the model; None = that in the folder (folders with an adapter alone have none).

        Raises:
            FileNotFoundError: a file misses.
            ValueError: a file is damaged or contradicts another.
        """
        folder = model_folder(pretrained_model_name_or_path)
        for name in (_CONFIG, _TOKENIZER):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; expected a SpatialVLA checkpoint with its processor")
        # Published files hold the literal `Infinity`, which Python's JSON reader accepts.
        stored = read_json(folder / _CONFIG, JsonObject)
        missing = [key for key in ("statistics", "bin_policy", "intrinsic_config") if not stored.get(key)]
        if missing:
            raise ValueError(f"{folder / _CONFIG} lacks {', '.join(missing)}")
        file = check(stored, _ProcessorFile, str(folder / _CONFIG))
        for name in _COMPANIONS:
            if (folder / name).is_file():
                read_json(folder / name, JsonObject)
        return cls(
            config=config or read_config(folder),
            tokenizer=_read_tokenizer(folder / _TOKENIZER),
            action_tokenizer=ActionTokenizer.from_bin_policy(file.bin_policy),
            statistics=parse_statistics(file.statistics),
            cameras={key: camera.intrinsics for key, camera in file.intrinsic_config.items()},
            chunk=file.action_chunk_size,
            stored={key: value for key, value in stored.items() if key not in _READ},
            companions={name: (folder / name).read_text() for name in _COMPANIONS if (folder / name).is_file()},
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the official files. The JSON is strict: numbers that are not finite become null."""
        folder = Path(save_directory)
        config = {
            **self.stored,
            "action_chunk_size": self.chunk,
            "bin_policy": self.action_tokenizer.bin_policy(),
            "intrinsic_config": {key: _camera_to_json(camera) for key, camera in self.cameras.items()},
            "statistics": statistics_to_json(self.statistics),
        }
        write_json(folder / _CONFIG, config)
        with atomic_write(folder / _TOKENIZER) as temporary:
            self.tokenizer.save(str(temporary))
        for name, text in self.companions.items():
            with atomic_write(folder / name) as temporary:
                temporary.write_text(text)

    def for_dataset(
        self,
        key: str,
        stats: DatasetStats,
        camera: CameraIntrinsics | None = None,
        action_tokenizer: ActionTokenizer | None = None,
    ) -> SpatialVLAProcessor:
        """A processor that also knows the dataset of a fine-tuning run, to be saved with its checkpoints.

        Args:
            key: e.g. `libero_spatial_no_noops/1.0.0`.
            stats: its statistics.
            camera: of its images; None leaves the choice to "default", as the authors do.
            action_tokenizer: another grid (see `rediscretize.py`); None keeps the checkpoint's.
        """
        return replace(
            self,
            statistics={**self.statistics, key: stats},
            cameras=self.cameras if camera is None else {**self.cameras, key: camera},
            action_tokenizer=action_tokenizer or self.action_tokenizer,
        )

    @property
    def action_tokens(self) -> int:
        """Tokens of one chunk (12)."""
        return self.chunk * TOKENS_PER_ACTION

    # ------------------------------------------------------------------ images

    def pixel_values(self, images: Sequence[Image.Image | np.ndarray]) -> Tensor:
        """RGB images (PIL or uint8 [H, W, 3], any size) -> float32 [B, 3, 224, 224] in 0..1."""
        arrays = [_resized(image, self.config.image_pixels) for image in images]
        return self.scale(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))

    @staticmethod
    def scale(images: Tensor) -> Tensor:
        """uint8 [..., 3, H, W], already at the model's size, -> float32 in 0..1. The model normalises by itself."""
        return images.float() / 255

    def camera(self, unnorm_key: str | None = None) -> CameraIntrinsics:
        """The camera stored for a dataset key, else the default."""
        return self.cameras.get(unnorm_key or "default", self.cameras["default"])

    def intrinsics(self, camera: CameraIntrinsics, batch: int) -> Tensor:
        """Matrices float32 [B, 3, 3] of a camera in pixels of the model's images."""
        return camera.matrix(self.config.image_pixels).expand(batch, 3, 3)

    # ------------------------------------------------------------------ text

    def prompt_ids(self, instruction: str) -> list[int]:
        """Ids of image placeholders, <bos>, the instruction in lower case (no template) and a newline.

        Raises:
            ValueError: the instruction contains an image placeholder.
        """
        text = self.tokenizer.encode(instruction.lower() + "\n", add_special_tokens=False).ids
        if self.config.image_token_index in text:
            raise ValueError(f"the instruction {instruction!r} contains the image token; remove it")
        image = [self.config.image_token_index] * self.config.num_image_tokens
        return [*image, self.config.bos_token_id, *text]

    def query_text(self, instructions: Sequence[str]) -> SpatialVLATextBatch:
        """Prompts alone, for prediction."""
        return self._pad([(self.prompt_ids(text), [], []) for text in instructions])

    def training_text(
        self, instructions: Sequence[str], actions: np.ndarray, action_is_pad: np.ndarray | None = None
    ) -> SpatialVLATextBatch:
        """Prompts, action tokens and <eos>.

        Args:
            instructions: B task descriptions.
            actions: normalised chunks [B, K, 7], xyz and rotation in -1..1, gripper 1 = open.
            action_is_pad: [B, K] True where a chunk reaches beyond its episode; those tokens give no loss.
        """
        offsets = self.action_tokenizer.encode(actions).reshape(len(instructions), -1)
        ids = offsets + self.config.action_token_begin_idx
        labels = ids.copy()
        if action_is_pad is not None:
            labels[np.repeat(np.asarray(action_is_pad, bool), TOKENS_PER_ACTION, axis=1)] = IGNORE_INDEX
        eos = self.config.eos_token_id
        return self._pad(
            [
                (self.prompt_ids(text), [*row, eos], [*target, eos])
                for text, row, target in zip(instructions, ids.tolist(), labels.tolist(), strict=True)
            ]
        )

    def _pad(self, rows: Sequence[tuple[list[int], list[int], list[int]]]) -> SpatialVLATextBatch:
        """Pad rows of (prompt, suffix, labels of the suffix)."""
        length = max(len(prompt) + len(suffix) for prompt, suffix, _ in rows)
        if length > _MAX_TOKENS:
            raise ValueError(f"an instruction gives {length} tokens, the model takes {_MAX_TOKENS}; shorten it")
        return SpatialVLATextBatch(
            input_ids=pad([prompt + suffix for prompt, suffix, _ in rows], self.config.pad_token_id),
            attention_mask=pad([[1] * len(prompt + suffix) for prompt, suffix, _ in rows], 0),
            token_type_ids=pad([[0] * len(prompt) + [1] * len(suffix) for prompt, suffix, _ in rows], 1),
            labels=pad([[IGNORE_INDEX] * len(prompt) + targets for prompt, _, targets in rows], IGNORE_INDEX),
        )

    # ------------------------------------------------------------------ actions

    def decode_actions(self, token_ids: Tensor | np.ndarray, unnorm_key: str | None) -> np.ndarray:
        """Actions float64 [B, K, 7] in physical units of token ids [B, 3 * K]; gripper 0 = closed, 1 = open.

        Args:
            unnorm_key: whose statistics to use, e.g. `droid/1.0.0` for a Franka.

        Raises:
            ValueError: key absent or unknown; lists all keys.
        """
        key = resolve_unnorm_key(self.statistics, unnorm_key)
        return unnormalize(self.normalized_actions(token_ids), self.statistics[key].action, "bounds_q99")

    def normalized_actions(self, token_ids: Tensor | np.ndarray) -> np.ndarray:
        """Actions float64 [B, K, 7] in -1..1 of token ids [B, 3 * K]."""
        ids = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
        offsets = ids.reshape(len(ids), -1, TOKENS_PER_ACTION) - self.config.action_token_begin_idx
        return self.action_tokenizer.decode(offsets)


def _resized(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.array(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _read_tokenizer(path: Path) -> Tokenizer:
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{path} is only a Git LFS pointer; fetch the file itself (`git lfs pull`)")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no tokenizer file ({error}); download it again") from error


def _camera_to_json(camera: CameraIntrinsics) -> dict[str, Any]:
    matrix = [[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]]
    return {"intrinsic": matrix, "width": camera.width, "height": camera.height}
