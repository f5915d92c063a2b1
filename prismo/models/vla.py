"""What the models of all families have in common: a language model in the middle, and a config.json that is checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from prismo.models.folder import CONFIG
from prismo.util.schema import JsonObject, check, read_json
from prismo.util.text import first_line

K = TypeVar("K", bound=PreTrainedConfig)


class VLAModel(PreTrainedModel):
    """A model whose `language_model` is a causal one of transformers."""

    language_model: Any

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

    @property
    def llm_dim(self) -> int:
        """Width of the language model."""
        return self.config.text_config.hidden_size

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model (32 of OpenVLA-7B, 26 of SpatialVLA-4B)."""
        return len(self.language_model.model.layers)

    def layer_index(self, layer: int) -> int:
        """Non-negative index of a state: 0 = input embeddings, i = output of decoder layer i-1, last = after the norm.

        Raises:
            IndexError: outside the `num_layers + 1` states.
        """
        count = self.num_layers + 1
        if not -count <= layer < count:
            raise IndexError(f"hidden layer {layer} asked, the language model has {-count}..{count - 1}")
        return layer % count

    def run_llm(
        self,
        embeddings: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        *,
        hidden_layers: Sequence[int] = (),
        cache: Any = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The decoder stack of the language model on embeddings.

        Args:
            embeddings: [B, Q, D].
            mask: in the form that transformers' attention function takes.
            positions: [B, Q], or [1, Q] for every sample.
            hidden_layers: indices of `layer_index` to keep; only these are, not all.
            cache: like one of transformers: its `update(keys, values, layer_idx)` stores those of new tokens and
                returns all that the layer's queries look at.

        Returns:
            Final states after the norm [B, Q, D], and the kept ones by the index that was asked.
        """
        decoder = self.language_model.model
        wanted = {self.layer_index(i) for i in hidden_layers}
        rotary = decoder.rotary_emb(embeddings, positions)
        x, kept = embeddings, {0: embeddings}
        for i, layer in enumerate(decoder.layers, start=1):
            x = layer(x, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rotary)
            if i in wanted:
                kept[i] = x
        kept[self.num_layers] = x = decoder.norm(x)  # the last state is the one behind the norm
        return x, {asked: kept[self.layer_index(asked)] for asked in hidden_layers}


def pad(rows: Iterable[list[int]], value: int) -> Tensor:
    """Token ids int64 [B, L] of rows of different lengths; `value` stands behind the shorter ones."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def read_model_config(folder: Path, kind: type[K], schema: type, model_type: str | None = None, **switches: Any) -> K:
    """The configuration of a checkpoint folder.

    Args:
        kind: class of the configuration.
        schema: dataclass of what config.json may say.
        model_type: that it has to say; None where another family may use the same classes.
        **switches: replace settings of the file, except where they are None.

    Raises:
        FileNotFoundError, ValueError: no config.json, a damaged one, or one of another model.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: no config.json")
    stored = read_json(path, JsonObject)
    if model_type not in (None, found := stored.get("model_type")):
        raise ValueError(f"{path} is of model_type {found!r}, expected {model_type!r}")
    check(stored, schema, str(path))
    try:
        return kind.from_dict(stored | {name: value for name, value in switches.items() if value is not None})
    except Exception as error:  # whatever transformers has against sizes that contradict each other
        model = kind.__name__.removesuffix("Config")
        raise ValueError(f"{path} describes no {model} ({first_line(error)}); fetch it again") from error
