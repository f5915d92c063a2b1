"""Names, shapes and types of the tensors in weight files, from their headers, against what a network needs.

No weight is read: 15 GB take a second.
"""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.initialization import no_init_weights

from prismo.models.component_files import plain_keys
from prismo.models.weight_files import DTYPES, INDEX, WeightIndex, read_header, stored_tensors
from prismo.util.schema import read_json
from prismo.verify.checks import Finding, difference, judge, some
from prismo.verify.facts import Architecture, SideModule

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `dtype` as safetensors calls it ("BF16")."""

    shape: tuple[int, ...]
    dtype: str


def read_model(folder: Path) -> dict[str, Stored]:
    """Tensors of `model*.safetensors`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or truncated, or the index and the files disagree.
    """
    tensors = stored_tensors(folder)
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX, WeightIndex).weight_map
        found = {name: tensor.file.name for name, tensor in tensors.items()}
        wrong = {name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)}
        if wrong:
            raise ValueError(f"{INDEX} and the files disagree about {len(wrong)} tensors: {some(wrong)}")
    return {name: Stored(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def read_file(path: Path) -> dict[str, Stored]:
    """Tensors of one `.pt` or `.safetensors` file, without the prefixes of training wrappers.

    Raises:
        ValueError: truncated, or something else.
    """
    try:
        if path.suffix == ".safetensors":
            return {name: Stored(tensor.shape, tensor.dtype) for name, tensor in read_header(path).items()}
        # Mapped into memory, or torch reads every weight before it drops it; only zip files can be.
        state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # over what is no such file torch's unpickler stumbles with anything
        raise ValueError(f"{path.name} is truncated or no file of tensors; copy or download it again") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path.name} does not hold a mapping from names to tensors")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {
        name: Stored(tuple(value.shape), _NAMES.get(value.dtype, str(value.dtype)))
        for name, value in plain_keys(tensors).items()
    }


@contextmanager
def on_meta() -> Generator[None]:
    """Modules built in here have shapes but no memory."""
    with torch.device("meta"), no_init_weights():
        yield


def shapes_of(module: nn.Module) -> Shapes:
    """What a file must hold for `module`."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def parameters(tensors: Iterable[Stored]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def check_names(found: Mapping[str, Stored], expected: Shapes) -> Finding:
    """Whether exactly the tensors of the architecture are there."""
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    lines = [difference("missing", some(missing), "nothing")] if missing else []
    lines += [difference("unknown", "nothing", some(unknown))] if unknown else []
    return judge(f"all {len(expected):,} of the architecture", lines)


def check_shapes(found: Mapping[str, Stored], expected: Shapes) -> Finding:
    """Whether the tensors that are there have the architecture's shapes."""
    common = found.keys() & expected.keys()
    wrong = sorted(name for name in common if found[name].shape != expected[name])
    lines = [difference(f"`{name}`", list(expected[name]), list(found[name].shape)) for name in wrong]
    return judge("those of the architecture", lines)


def check_dtypes(found: Mapping[str, Stored], wanted: str | None) -> Finding:
    """Whether all tensors have the type `wanted`, or the most frequent one."""
    counts = Counter(tensor.dtype for tensor in found.values())
    usual = wanted or counts.most_common(1)[0][0]
    wrong = sorted(name for name, tensor in found.items() if tensor.dtype != usual)
    lines = [difference(f"`{name}`", usual, found[name].dtype) for name in wrong]
    return judge(f"all {usual}", lines)


def check_counts(found: Mapping[str, Stored], known: Architecture | None) -> Finding:
    """Numbers of tensors and parameters against those of the published id."""
    count, total = len(found), parameters(found.values())
    text = f"{total:,} parameters in {count:,} tensors"
    if known is None:
        return Finding("not known", text)
    pairs = (("parameters", known.parameters, total), ("tensors", known.tensors, count))
    return judge(text, [difference(what, f"{a:,}", f"{b:,}") for what, a, b in pairs if a != b])


def check_part(found: Mapping[str, Stored], expected: Shapes, known: SideModule | None) -> Finding:
    """A module beside the model: names, shapes, and what is known of its id."""
    total, dtypes = parameters(found.values()), sorted({tensor.dtype for tensor in found.values()})
    lines = [*check_names(found, expected).details, *check_shapes(found, expected).details]
    if known is not None and not lines:
        pairs = (("parameters", f"{known.parameters:,}", f"{total:,}"), ("type", known.dtype, " and ".join(dtypes)))
        lines = [difference(what, a, b) for what, a, b in pairs if a != b]
    return judge(f"{total:,} parameters, {' and '.join(dtypes)}", lines)
