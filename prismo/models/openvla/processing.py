"""Images and text of OpenVLA: pixels -> `pixel_values`, instruction -> token ids, for training, evaluation and serving.

Images arrive already resized and cropped (`prismo.data.images`); this module only normalises them for the two towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt
from PIL import Image
from pydantic import FiniteFloat
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, LlamaConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from prismo.models.bin_tokenizer import IGNORE_INDEX, BinTokenizer
from prismo.models.vla import pad
from prismo.util.schema import JsonObject, read_json
from prismo.util.text import first_line

SPACE_ID = 29871  # Llama's lone "▁": the space in front of the first action character
STOP_ID = 2
PLACEHOLDER_ID = 1  # at action positions of a query; their embeddings are replaced before the language model
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BICUBIC = 3  # PIL's and torchvision's number for bicubic resampling


def prompt_text(instruction: str) -> str:
    """The prompt of an instruction, as both training and inference write it (lower case)."""
    return PROMPT.format(instruction=instruction.lower())


class PrismaticImageProcessor(ImageProcessingMixin):
    """PIL images -> stacked channels of the vision towers.

    Args:
        use_fused_vision_backbone, image_resize_strategy, input_sizes, interpolations, means, stds: as in the published
            `preprocessor_config.json`.
        **kwargs: everything else in that file. Its `tvf_normalize_params` win over `means`/`stds`: openvla-7b was
            trained with ImageNet statistics that had been rounded to bfloat16, and only those lists hold them.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers reads this class attribute)

    def __init__(
        self,
        use_fused_vision_backbone: bool = True,
        image_resize_strategy: str = "resize-naive",
        input_sizes: Sequence[Sequence[int]] = ((3, 224, 224), (3, 224, 224)),
        interpolations: Sequence[str] = ("bicubic", "bicubic"),
        means: Sequence[Sequence[float]] = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)),
        stds: Sequence[Sequence[float]] = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5)),
        **kwargs: Any,
    ) -> None:
        if image_resize_strategy not in ("resize-naive", "letterbox"):
            raise ValueError(
                f"image_resize_strategy is {image_resize_strategy!r}; this project reads 'resize-naive' and 'letterbox'"
            )
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [list(size) for size in input_sizes]
        self.interpolations = list(interpolations)
        self.means = [list(mean) for mean in means]
        self.stds = [list(std) for std in stds]
        sizes = [size[-2:] for size in self.input_sizes]
        self.tvf_resize_params = [
            {"antialias": True, "interpolation": _BICUBIC, "max_size": None, "size": s} for s in sizes
        ]
        self.tvf_crop_params = [{"output_size": size} for size in sizes]
        self.tvf_normalize_params: list[dict[str, Any]] = [
            {"inplace": False, "mean": m, "std": s} for m, s in zip(self.means, self.stds, strict=True)
        ]
        self.tvf_do_letterbox = image_resize_strategy == "letterbox"
        self.tvf_letterbox_fill = [int(v * 255) for v in self.means[0]] if self.tvf_do_letterbox else None
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What goes into preprocessor_config.json; the original finds its processor by `processor_class`."""
        values = {key: value for key, value in super().to_dict().items() if not key.startswith("_")}
        return values | {"processor_class": "PrismaticProcessor"}

    @property
    def statistics(self) -> list[tuple[list[float], list[float]]]:
        """(mean, std) per tower, from the lists that training used."""
        return [(list(p["mean"]), list(p["std"])) for p in self.tvf_normalize_params]

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Batched normalisation on the device of `images`.

        Args:
            images: uint8 [B, V, 3, H, W] or float in [0, 1], already at the towers' resolution.
            dtype: of the result.

        Returns:
            [B, V * 3 * towers, H, W]: per view first the DINOv2 channels, then the SigLIP channels.
        """
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        towers = []
        for mean, std in self.statistics:
            m, s = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, std))
            towers.append((pixels - m) / s)
        return torch.cat(towers, dim=2).flatten(1, 2).to(dtype)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """One or several PIL images (or uint8 arrays [H, W, 3]) -> `pixel_values` [n, 3 * towers, H, W] float32."""
        images = images if isinstance(images, (list, tuple)) else [images]
        arrays = np.stack([self._to_array(image) for image in images])
        stacked = torch.from_numpy(arrays).permute(0, 3, 1, 2)[:, None]
        return BatchFeature({"pixel_values": self.normalize(stacked)}, tensor_type=return_tensors)

    __call__ = preprocess

    def _to_array(self, image: Image.Image | np.ndarray) -> np.ndarray:
        picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
        if self.tvf_letterbox_fill is not None:
            side = max(picture.size)
            square = Image.new("RGB", (side, side), tuple(self.tvf_letterbox_fill))
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        height, width = self.input_sizes[0][-2:]
        return np.array(picture.resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class TextBatch:
    """Token ids of a batch, right-padded.

    Attributes:
        input_ids: int64 [B, L].
        attention_mask: bool [B, L], False at padding; None when no sample is padded, so that the kernels without a mask
            can run (asking a GPU tensor would stall the device at every step).
        labels: int64 [B, L], -100 except at the action tokens and the stop token.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor

    def to(self, device: torch.device | str) -> TextBatch:
        """The same batch on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True)
        return TextBatch(self.input_ids.to(device, non_blocking=True), mask, self.labels.to(device, non_blocking=True))


@dataclass(frozen=True)
class _TowerStatistics:
    """One of `tvf_normalize_params`."""

    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Gt(0)]]


@dataclass(frozen=True)
class _PreprocessorFile:
    """preprocessor_config.json, see `PrismaticImageProcessor`."""

    use_fused_vision_backbone: bool = True
    image_resize_strategy: str = ""
    input_sizes: list[tuple[int, int, int]] | None = None
    interpolations: list[str] | None = None
    means: list[list[FiniteFloat]] | None = None
    stds: list[list[FiniteFloat]] | None = None
    tvf_normalize_params: list[_TowerStatistics] | None = None


def _check_files(folder: Path) -> None:
    """One clear error for damaged files, of which the libraries make several kinds of long ones."""
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            read_json(folder / name, JsonObject)
    if (folder / "preprocessor_config.json").is_file():
        read_json(folder / "preprocessor_config.json", _PreprocessorFile)


class PrismaticProcessor(ProcessorMixin):
    """Image processor and tokenizer of an OpenVLA checkpoint folder."""

    def __init__(self, image_processor: PrismaticImageProcessor, tokenizer: PreTrainedTokenizerBase) -> None:
        # Not ProcessorMixin.__init__: it looks both classes up in transformers' registries, which would force every
        # import of this package to register there.
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = None

    @classmethod
    def from_pretrained(  # ty: ignore[incompatible-method-override] (only by name: they go to two classes)
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> PrismaticProcessor:
        """Read `preprocessor_config.json` and the tokenizer files of a folder or hub id; no remote code is run.

        Raises:
            ValueError: one of the files is damaged or missing.
        """
        kwargs.pop("trust_remote_code", None)
        path = pretrained_model_name_or_path
        if Path(path).is_dir():
            _check_files(Path(path))
        # With a config at hand transformers does not read config.json, whose `openvla` it would warn about.
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, config=LlamaConfig(), padding_side="right", **kwargs)
            images = PrismaticImageProcessor.from_pretrained(path, **kwargs)
        except Exception as error:  # the libraries raise whatever they stumble over, down to bare Exception
            raise ValueError(
                f"tokenizer or image settings of {path} cannot be read ({first_line(error)}); download them again"
            ) from error
        return cls(images, tokenizer)

    def save_pretrained(self, save_directory: str | Path, *_: Any, **__: Any) -> None:
        """Write the files that the original project reads (`preprocessor_config.json`, tokenizer files)."""
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    def __call__(self, text: str | list[str], images: Any, return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """Tokenised text and pixel values; one image per text, as in the original.

        Raises:
            ValueError: as many texts as images were expected.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pixels = self.image_processor(images, return_tensors=return_tensors)["pixel_values"]
        if len(texts) != len(pixels):
            raise ValueError(f"expected one image per text, found {len(texts)} texts and {len(pixels)} images")
        tokens = self.tokenizer(texts, return_tensors=return_tensors, **kwargs)
        return BatchFeature({**tokens, "pixel_values": pixels})

    def prompt_ids(self, instruction: str) -> list[int]:
        """Ids of the prompt, beginning with BOS and ending with the space token in front of the actions."""
        ids = self.tokenizer(prompt_text(instruction), add_special_tokens=True)["input_ids"]
        return ids if ids[-1] == SPACE_ID else [*ids, SPACE_ID]

    def training_text(self, instructions: Sequence[str], actions: np.ndarray, tokens: BinTokenizer) -> TextBatch:
        """Prompt, action tokens and stop token of each sample.

        Args:
            instructions: B task descriptions.
            actions: normalised action chunks [B, K, A] in [-1, 1].
            tokens: the action tokenizer.
        """
        prompts = [self.prompt_ids(text) for text in instructions]
        action_ids = tokens.encode(actions.reshape(len(prompts), -1)).tolist()
        return self._checked([(p, [*ids, STOP_ID]) for p, ids in zip(prompts, action_ids, strict=True)])

    def query_text(self, instructions: Sequence[str], action_tokens: int, tokens: BinTokenizer) -> TextBatch:
        """Prompts followed by slots for the actions (parallel decoding)."""
        return query([self.prompt_ids(text) for text in instructions], action_tokens, tokens)

    def prompt_batch(self, instructions: Sequence[str]) -> TextBatch:
        """Prompts alone (token-by-token decoding of vanilla OpenVLA)."""
        return self._checked([(self.prompt_ids(text), []) for text in instructions])

    def _checked(self, rows: list[tuple[list[int], list[int]]]) -> TextBatch:
        longest, limit = max(len(a) + len(b) for a, b in rows), self.tokenizer.model_max_length
        if longest > limit:
            raise ValueError(f"an instruction gives {longest} tokens, the model takes {limit}; shorten it")
        return pad_rows(rows, self.tokenizer.pad_token_id)


def query(prompts: Sequence[list[int]], action_tokens: int, tokens: BinTokenizer) -> TextBatch:
    """Prompt ids followed by `action_tokens` slots and the stop token, as one pass of an OFT model expects them.

    The labels mark the slots like action tokens, so that training and inference find them in the same way.
    """
    batch = pad_rows([(ids, [PLACEHOLDER_ID] * action_tokens + [STOP_ID]) for ids in prompts], tokens.vocab_size)
    slots = (batch.labels != IGNORE_INDEX) & (batch.labels != STOP_ID)
    return TextBatch(batch.input_ids, batch.attention_mask, batch.labels.masked_fill(slots, tokens.first_id + 1))


def pad_rows(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> TextBatch:
    """Concatenate (unsupervised, supervised) id lists and pad on the right."""
    ids = pad([[*prompt, *target] for prompt, target in rows], pad_id)
    labels = pad([[IGNORE_INDEX] * len(prompt) + target for prompt, target in rows], IGNORE_INDEX)
    mask = pad([[1] * (len(prompt) + len(target)) for prompt, target in rows], 0).bool()
    return TextBatch(ids, None if mask.all() else mask, labels)
