"""What is asked of a SpatialVLA besides: tokenizer and action grid."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from prismo.models.spatialvla import SpatialVLAProcessor
from prismo.models.spatialvla.action_tokenizer import OFFICIAL_GAUSSIANS, ActionTokenizer
from prismo.policies.flags import PolicyFlags
from prismo.verify.checks import Check, Finding, difference, judge, needed
from prismo.verify.kinds.policy import PolicyFolder
from prismo.verify.sample import instruction

_MIN_SIGMA = 0.5  # with which the published bins were made
_NEWLINE_ID, _UNKNOWN_ID = 108, 3
_ROUNDING = 2e-6  # the known actions have six digits


class SpatialVLAFolder(PolicyFolder):
    """The checks of one folder."""

    shown_settings = ("chunk", "center_crop", "intrinsics", "unnorm_key")

    def flags(self, folder: str, base: str | None, key: str) -> PolicyFlags:
        # Without the ensemble, whose answer is one action, the whole chunk can be looked at.
        return replace(super().flags(folder, base, key), adaptive_ensemble=False)

    def own_checks(self) -> list[Check]:
        return [Check("tokenizer", self._tokenizer), Check("action grid", self._action_grid)]

    @cached_property
    def _processor(self) -> SpatialVLAProcessor:
        for names in self.needed_files:
            self.file(*names)
        needed(lambda: self.statistics, "statistics")  # read with the rest
        config = needed(lambda: self.config, "configuration")
        return SpatialVLAProcessor.from_pretrained(self.folder, config)

    def _tokenizer(self) -> Finding:
        config, tokenizer = needed(lambda: self.config, "configuration"), self._processor.tokenizer
        prompt = self._processor.prompt_ids(instruction())[config.num_image_tokens :]
        lines = [
            difference(f"id of {token!r}", expected, tokenizer.token_to_id(token))
            for token, expected in (
                ("<image>", config.image_token_index),
                ("<bos>", config.bos_token_id),
                ("<eos>", config.eos_token_id),
                ("<pad>", config.pad_token_id),
                ("\n", _NEWLINE_ID),
            )
            if tokenizer.token_to_id(token) != expected
        ]
        first_action = tokenizer.token_to_id("<ACTION00000>")
        if first_action not in (None, config.action_token_begin_idx):  # ours need none: their ids are numbers
            lines.append(difference("id of '<ACTION00000>'", config.action_token_begin_idx, first_action))
        if _UNKNOWN_ID in prompt:
            lines.append(difference("the prompt", "known tokens", f"<unk> in {prompt}"))
        return judge(f"{tokenizer.get_vocab_size():,} tokens, special ids, a prompt of {len(prompt)}", lines)

    def _action_grid(self) -> Finding:
        grid = needed(lambda: self._processor, "tokenizer").action_tokenizer
        bins = " x ".join(str(count) for count in grid.bins.values())
        known = self.architecture.action_grid if self.architecture else None
        if known is None:
            return Finding("not known", f"{grid.size:,} tokens ({bins} and 2)")
        official, lines = ActionTokenizer.from_gaussians(OFFICIAL_GAUSSIANS, min_sigma=_MIN_SIGMA), []
        for name, edges in official.edges.items():
            found = grid.edges[name]
            if found.shape != edges.shape or np.abs(found - edges).max() > _ROUNDING:
                lines.append(difference(f"bin edges of {name}", edges.round(4).tolist(), found.round(4).tolist()))
        for offsets, expected in known:
            found = grid.decode(np.array(offsets, np.int64))
            if np.abs(found - expected).max() > _ROUNDING:
                lines.append(difference(f"action of {[int(i) for i in offsets]}", expected, found.round(6).tolist()))
        return judge(f"{grid.size:,} tokens ({bins} and 2), {len(known)} actions as published", lines)
