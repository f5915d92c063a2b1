"""Mutations of files of tensors: safetensors by their header (`mutate.header_edit`) or tensor by tensor, and .pt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fuzz.mutate import Draw, Mutation

_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "three zeros": lambda value: torch.zeros(3),
    "a scalar": lambda value: torch.zeros(()),
    "no numbers": lambda value: torch.zeros(0),
    "flat": lambda value: value.reshape(-1),
    "one dimension more": lambda value: value[None],
    "a row more": lambda value: torch.cat([value, value[-1:]]) if value.dim() else value[None],
    "a row less": lambda value: value[:-1] if value.dim() else torch.zeros(0),
    "a row, expanded": lambda value: value[:1] if value.dim() else torch.zeros(1),
    "transposed": lambda value: value.t().contiguous() if value.dim() == 2 else value[None],
    "int64": lambda value: value.long(),
    "bool": lambda value: value.bool(),
    "float64": lambda value: value.double(),
    "NaN": lambda value: torch.full_like(value.float(), torch.nan),
    "Infinity": lambda value: torch.full_like(value.float(), torch.inf),
}
_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "empty": lambda state: {},
    "a list": lambda state: list(state.values()),
    "a tensor": lambda state: next(iter(state.values())),
    "nothing": lambda state: None,
    "nested": lambda state: {"state_dict": state},
    "numbers": lambda state: dict.fromkeys(state, 1.5),
    "by number": lambda state: dict(enumerate(state.values())),
    "with other prefixes": lambda state: {f"x.{name}": value for name, value in state.items()},
}


@st.composite
def tensor_edit(draw: Draw, folder: Path, files: Sequence[str]) -> Mutation:
    """One tensor of another shape or type, gone, twice or renamed; or a .pt file that holds something else."""
    file = draw(st.sampled_from(sorted(files)))
    is_pickle = file.endswith(".pt")
    names = _names(folder / file)
    name = draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["drop", "add", "rename", *_TENSORS, *(_STATES if is_pickle else ())]))
    if kind in _TENSORS:
        before = _load(folder / file)[name]
        after = _TENSORS[kind](before)
        assume(before.shape != after.shape or before.dtype != after.dtype or not torch.equal(before, after))
    what = f"it is {kind}" if kind in _STATES else f"{name}: {kind}"
    return Mutation(file, f"tensor {kind}", what, functools.partial(_edit, file, name, kind), place=(name,))


@functools.lru_cache(maxsize=64)
def _names(path: Path) -> list[str]:
    return sorted(_load(path))


def _load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)


def _edit(file: str, name: str, kind: str, folder: Path) -> None:
    path = folder / file
    state: Any = _load(path)
    if kind in _STATES:
        state = _STATES[kind](state)
    elif kind == "add":
        state["extra"] = torch.zeros(2)
    else:
        value = state.pop(name)
        if kind != "drop":
            state |= {f"{name}_x": value} if kind == "rename" else {name: _TENSORS[kind](value)}
    if path.suffix == ".pt":
        torch.save(state, path)
        return
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file(state, path, metadata)
