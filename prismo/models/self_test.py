"""A cheap check after loading: does attention go where the checkpoint needs it, and does the image matter?

Both failures are silent otherwise: with causal attention an OFT checkpoint loses half of its success, and some
transformers versions dropped the image of OpenVLA without an error.
"""

from __future__ import annotations

import math
from typing import Literal

AttentionKind = Literal["bidirectional", "causal"]  # parallel decoding of a chunk; token by token


class SelfTestError(RuntimeError):
    """The loaded model does not do what its configuration says."""


def judge_influences(kind: AttentionKind, before: float, after: float, image: float) -> None:
    """Compare the influences that a model was measured to have with those that it needs.

    Args:
        kind: how the model is to attend.
        before, after: largest change of earlier states by a later token, and of later states by it.
        image: largest change of states by the image.

    Raises:
        SelfTestError: a later token does (causal) or does not (bidirectional) influence an earlier one, or a black and
            a white image give the same states.
    """
    if not math.isfinite(before + after + image):
        raise SelfTestError("self-test failed: the model computes numbers that are not finite; its weights are damaged")
    if kind == "bidirectional" and not before > 0:
        raise SelfTestError(
            "attention self-test failed: a later token does not influence an earlier one, but this model needs "
            "bidirectional attention (chunks are decoded in one pass). Load it with attention='causal' only if it is "
            "a vanilla OpenVLA checkpoint; otherwise the attention function of transformers was replaced"
        )
    if kind == "causal" and before > 0:
        raise SelfTestError(
            "attention self-test failed: a later token influences an earlier one, but attention='causal' was asked"
        )
    if not after > 0 or not image > 0:
        raise SelfTestError(
            "self-test failed: "
            + ("the image does not influence the output" if after > 0 else "an earlier token has no influence")
            + "; actions would not depend on what the robot sees"
        )
