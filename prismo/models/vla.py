"""What the models of all families have in common: a language model in the middle, and a config.json that is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prismo.models.folder import CONFIG
from prismo.util.schema import JsonObject, check, read_json
from prismo.util.text import first_line

K = TypeVar("K", bound=PreTrainedConfig)


class VLAModel(PreTrainedModel):
    """A model whose `language_model` is a causal one of transformers."""

    language_model: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

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


def read_model_config(folder: Path, kind: type[K], schema: type, model_type: str | None = None, **switches: Any) -> K:
    """The configuration of a checkpoint folder.

    Args:
        kind: class of the configuration.
        schema: dataclass of what config.json may say.
        model_type: that it has to say; None where another family may use the same classes.
        **switches: replace settings of the file.

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
        return kind.from_dict(stored | switches)
    except Exception as error:  # whatever transformers has against sizes that contradict each other
        model = kind.__name__.removesuffix("Config")
        raise ValueError(f"{path} describes no {model} ({first_line(error)}); fetch it again") from error
