"""Getting the hidden states of a VLA's vision tokens, the second input of `SpatialForcing`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def vision_tokens(hidden: Tensor, count: int, *, start: int = 1, shift: bool = False) -> Tensor:
    """Cut the vision tokens out of one layer's hidden states.

    Args:
        hidden: [B, S, D].
        count: number of vision tokens, views * patches. Proprio and time tokens behind the patches do not count.
        start: position of the first patch: 1 behind a BOS token (OpenVLA), 0 without (PaliGemma, Pi0).
        shift: the original's `gain_feat_1move`, default in its code and used in all published runs: start one position
            later. Teacher patch j then meets the VLA token of patch j + 1, the last patch of one view the first of the
            next, and the very last the token behind the patches (proprio or text).

    Returns:
        [B, count, D], a view of `hidden`.

    Raises:
        ValueError: the sequence is too short. (A plain slice would silently return fewer tokens.)
    """
    first = start + int(shift)
    if first + count > hidden.shape[1]:
        raise ValueError(
            f"expected {count} vision tokens from position {first}, but the sequence has {hidden.shape[1]} positions; "
            "check the number of views and patches"
        )
    return hidden[:, first : first + count]


class LayerTap:
    """Remembers the output of one decoder layer, for VLAs that do not return hidden states.

    Args:
        layer: the module to listen to, e.g. `vla.model.language_model.layers[11]` for the output of the 12th layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._output: Tensor | None = None
        self._hook = layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        self._output = output[0] if isinstance(output, tuple) else output

    def take(self) -> Tensor:
        """Hidden states [B, S, D] of the latest forward pass; forgets them, so that no graph is kept alive.

        Raises:
            RuntimeError: the layer has not run since the last call.
        """
        if self._output is None:
            raise RuntimeError("the tapped layer has not run since the last take(); call the VLA first")
        output, self._output = self._output, None
        return output

    def remove(self) -> None:
        """Stop listening."""
        self._hook.remove()
