"""What is asked of OpenVLA, OpenVLA-OFT and Spatial-Forcing besides: tokenizer, images, modules beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import nn

from prismo.models.component_files import find_component, has_component
from prismo.models.heads import HEADS, HeadSizes, recognise
from prismo.models.openvla import PrismaticImageProcessor, PrismaticProcessor
from prismo.models.openvla.processing import SPACE_ID, STOP_ID
from prismo.models.projectors import ProprioProjector
from prismo.verify import tensors
from prismo.verify.checks import Check, Finding, SkippedError, difference, judge, needed, some
from prismo.verify.kinds.policy import PolicyFolder
from prismo.verify.sample import instruction

_BOS_ID, _PAD_ID, _TOKENS = 1, 32000, 32001
# Llama-2's ids of the prompt with the sample observation's instruction.
_PROMPT = (
    *(1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 5839, 701, 278, 4628, 12580, 29880, 1546, 278, 15284),
    *(322, 278, 364, 420, 9089, 322, 2058, 372, 373, 278, 15284, 29973, 13, 3744, 29901, SPACE_ID),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_PARTS = {
    "action_head": "action head",
    "proprio_projector": "proprio projector",
    "noisy_action_projector": "noisy action projector",
    "align_projector": "align projector",
    "vision_backbone": "FiLM backbone",
} | {stem: stem.replace("_", " ") for head in HEADS.values() for stem in head.stems()}


class OpenVLAFolder(PolicyFolder):
    """The checks of one folder."""

    more_files = ("tokenizer_config.json",)
    shown_settings = ("head", "attention", "film", "num_images", "proprio", "center_crop", "chunk", "unnorm_key")
    loading = "self-test"

    def own_checks(self) -> list[Check]:
        expected = self.known.parts if self.known else {}
        stems = [stem for stem in _PARTS if stem in expected or any(self.folder.glob(f"*{stem}*checkpoint*.pt"))]
        return [
            *(Check(_PARTS[stem], lambda stem=stem: self._part(stem)) for stem in stems),
            Check("images", self._images),
            Check("tokenizer", self._tokenizer),
        ]

    # ------------------------------------------------------------------ modules beside the model

    def _part(self, stem: str) -> Finding:
        if not has_component(self.folder, stem):
            raise SkippedError("missing, see 'files'")
        found = tensors.read_file(find_component(self.folder, stem))
        if stem in ("align_projector", "vision_backbone"):  # the one serves training only, the other is loaded strictly
            return Finding("ok", f"{tensors.parameters(found.values()):,} parameters; not compared here")
        with tensors.on_meta():
            module = self._build_part(stem, found)
        known = self.known.parts.get(stem) if self.known else None
        return tensors.check_part(found, tensors.shapes_of(module), known)

    def _build_part(self, stem: str, found: Mapping[str, tensors.Stored]) -> nn.Module:
        robot = self.robot(needed(lambda: self.unnorm_key, "statistics"))
        width = needed(lambda: self.config, "configuration").text_config.hidden_size
        if stem == "proprio_projector":
            return ProprioProjector(width, robot.proprio_dim)
        sizes = HeadSizes(width, robot.action_dim, robot.chunk)
        if stem != "action_head":
            return next(head for head in HEADS.values() if stem in head.stems()).build(sizes).modules[stem]
        shapes = {name: tensor.shape for name, tensor in found.items()}
        return HEADS[recognise(shapes)].build(sizes, shapes).modules[stem]

    # ------------------------------------------------------------------ processor

    @cached_property
    def _image_processor(self) -> PrismaticImageProcessor:
        return PrismaticImageProcessor.from_pretrained(self.file("preprocessor_config.json").parent)

    def _images(self) -> Finding:
        processor = self._image_processor
        size = needed(lambda: self.config, "configuration").towers[0].image_size
        sizes = {tuple(entry[-2:]) for entry in processor.input_sizes}
        found = [[mean, std] for mean, std in processor.statistics]
        numbers = "; ".join(" ".join(f"{v:.4g}" for v in (*mean, *std)) for mean, std in found)
        text = f"{size} pixels, mean and std {numbers}"
        lines = [] if sizes == {(size, size)} else [difference("image sizes", f"{size} x {size}", sizes)]
        known = self.architecture.normalization if self.architecture else None
        if known is None:
            return judge(text, lines) if lines else Finding("not known", text)
        if found != known:
            lines.append(difference("mean and std (tvf_normalize_params)", known, found))
        return judge(f"{size} pixels, mean and std as published", lines)

    def _tokenizer(self) -> Finding:
        needed(lambda: self._image_processor, "images")
        self.file("tokenizer_config.json")
        processor = PrismaticProcessor.from_pretrained(self.file(*_TOKENIZERS).parent)
        tokenizer = processor.tokenizer
        lines = [
            difference(what, expected, found)
            for what, expected, found in (
                ("tokens", _TOKENS, len(tokenizer)),
                ("id of BOS", _BOS_ID, tokenizer.bos_token_id),
                ("id of EOS", STOP_ID, tokenizer.eos_token_id),
                ("id of PAD", _PAD_ID, tokenizer.pad_token_id),
                ("prompt ids", list(_PROMPT), processor.prompt_ids(instruction())),
            )
            if expected != found
        ]
        action_ids = list(range(_PAD_ID - 256, _PAD_ID))
        longer = [token for token in tokenizer.convert_ids_to_tokens(action_ids) if token is None or len(token) != 1]
        if longer:
            lines.append(difference("the 256 action tokens", "single characters", some(set(map(str, longer)))))
        return judge(f"{len(tokenizer):,} tokens, special ids, {len(_PROMPT)} prompt ids and 256 action tokens", lines)
