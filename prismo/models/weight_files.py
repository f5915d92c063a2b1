"""Safetensors checkpoints tensor by tensor: read, fingerprint and write them without ever holding a whole model.

The safetensors library maps whole files into memory, which counts as resident memory
as pages are touched; this module reads and writes the byte ranges it needs (the format is a JSON header with offsets,
followed by the data).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import google_crc32c
import torch
from annotated_types import Ge
from safetensors import safe_open
from torch import Tensor, nn

from prismo.util.schema import parse_json, read_json

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LISTED = 8  # names per kind of problem in an error
_SAMPLE = 4096  # bytes per tensor that enter a fingerprint


@dataclass(frozen=True)
class WeightIndex:
    """`model.safetensors.index.json`: which file holds a tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: safetensors file.
        dtype: its name in the format, e.g. "BF16".
        shape: as stored.
        start, size: bytes within the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        data = bytearray(self.size)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            view = memoryview(data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.file} ended early while it was read; copy it again")
                view = view[count:]
        if not data:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index.

    Raises:
        FileNotFoundError: no weights, or a shard of the index is missing.
        ValueError: the index is damaged, or names a file outside of the folder.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX, WeightIndex).weight_map.values()))
        outside = [name for name in names if Path(name).name != name or name in ("", "..") or "\\" in name]
        if outside or not names:
            found = repr(outside[0]) if outside else "nothing"
            raise ValueError(f"{folder / INDEX} names {found}, expected files beside it; download the checkpoint again")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder / INDEX} names {', '.join(missing)}, which is not there; download the checkpoint again"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    adapter = " It holds a LoRA adapter: merge it first (`prismo merge`)."
    raise FileNotFoundError(
        f"{folder} has neither {INDEX} nor {SINGLE}.{adapter if (folder / 'lora_adapter').is_dir() else ''}"
    )


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, in the order of its files.

    Raises:
        FileNotFoundError: no weights there, or a shard is missing.
        ValueError: a file is truncated, or has a dtype that is not known here.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(Path(folder)):
        tensors |= read_header(file)
    return tensors


def load_weights(
    model: nn.Module, folder: Path, stored_name: Callable[[str], str], device: torch.device, dtype: torch.dtype
) -> None:
    """Replace every parameter of `model` (which may be on the meta device) by the one stored in `folder`.

    `stored_name` gives the name in the files of one of ours.
    Names and shapes are compared before a single weight is read; a tensor goes straight from the file to `device`.

    Raises:
        FileNotFoundError: the folder holds no safetensors weights.
        ValueError: tensors miss, are unknown or do not fit; names them.
    """
    parameters = {stored_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    found = stored_tensors(folder)
    _check_fit({name: p.shape for name, (_, p) in parameters.items()}, found, folder)
    for file in sorted({tensor.file for tensor in found.values()}):
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for official in stored.keys():  # noqa: SIM118 (not a dict)
                name, parameter = parameters[official]
                set_parameter(model, name, stored.get_tensor(official).to(dtype), parameter.requires_grad)


def set_parameter(model: nn.Module, name: str, value: Tensor, requires_grad: bool) -> None:
    """Put `value` in the place of the parameter called `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=requires_grad))


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """Identity of a set of weights, cheap to compute: names, shapes, dtypes and the first bytes of every tensor.

    It does not depend on how the tensors are spread over files. Fine-tuned and merged weights differ from their base.
    A byte that flipped further behind goes unnoticed (`full_fingerprint`).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            digest.update(file.read(min(_SAMPLE, stored.size)))
    return digest.hexdigest()


def full_fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """Identity of a set of weights to the last byte; reads all of them."""
    with closing(in_parallel(tensors, lambda name: checksum(tensors[name].read()))) as checksums:
        return combine_checksums(dict(checksums))


def checksum(tensor: Tensor) -> int:
    """CRC-32C of a tensor's bytes."""
    return google_crc32c.value(tensor.reshape(-1).view(torch.uint8).numpy())


def combine_checksums(checksums: Mapping[str, int]) -> str:
    """The `full_fingerprint` of tensors with these checksums."""
    return hashlib.sha256("".join(f"{name} {checksums[name]}\n" for name in sorted(checksums)).encode()).hexdigest()


def in_parallel(names: Iterable[str], work: Callable[[str], T], workers: int = 4) -> Generator[tuple[str, T]]:
    """`work(name)` for every name, in order, computed by threads that run at most `workers` names ahead.

    Each thread computes on one processor: tensor by tensor that is faster than splitting every small operation over
    all of them, and does not collapse on a machine that is busy with something else. Close the iterator if it is not
    read to its end (`contextlib.closing`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that are started now inherit it
    pool = ThreadPoolExecutor(min(workers, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending: deque[tuple[str, Future[T]]] = deque()
        coming = iter(names)
        while True:
            for name in itertools.islice(coming, workers + 1 - len(pending)):
                pending.append((name, pool.submit(work, name)))
            if not pending:
                return
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def write_shards(
    folder: Path,
    layout: Mapping[str, StoredTensor],
    produce: Callable[[str], Tensor],
    *,
    shard_bytes: int,
    wrote: Callable[[int], object],
) -> dict[str, str]:
    """Write tensors one after the other as `model-0000i-of-0000n.safetensors`.

    Args:
        folder: existing folder.
        layout: names, dtypes and shapes, in the order of writing.
        produce: gives the tensor of a name; called once per tensor, by several threads.
        shard_bytes: upper limit per file (a larger tensor gets a file of its own).
        wrote: called with the bytes of each tensor.

    Returns:
        The index's `weight_map`; the files are flushed to disk.
    """
    shards = _split(layout, shard_bytes)
    weight_map: dict[str, str] = {}
    with closing(in_parallel([name for names in shards for name in names], produce)) as tensors:
        for i, names in enumerate(shards, start=1):
            path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            with path.open("wb") as file:
                file.write(_header({name: layout[name] for name in names}))
                for name, tensor in itertools.islice(tensors, len(names)):
                    if tuple(tensor.shape) != layout[name].shape or tensor.dtype != DTYPES[layout[name].dtype]:
                        raise ValueError(
                            f"{name}: produced {tensor.dtype} {list(tensor.shape)}, planned {layout[name]}"
                        )
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
                    wrote(layout[name].size)
                file.flush()
                os.fsync(file.fileno())
            weight_map |= dict.fromkeys(names, path.name)
    return weight_map


@dataclass(frozen=True)
class _Entry:
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[Annotated[int, Ge(0)]]
    data_offsets: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Entries of one safetensors file in the order of their data; raises as `stored_tensors` does."""
    total = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        text = handle.read(length) if 8 + length <= total else b""
    try:
        header = parse_json(text, dict[str, _Entry | dict[str, str]], str(file))
    except ValueError as error:
        raise ValueError(f"{file} is truncated or broken; copy or download it again") from error
    header.pop("__metadata__", None)
    tensors, covered = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: getattr(item[1], "data_offsets", (0, 0))):
        if not isinstance(entry, _Entry):
            raise ValueError(f"{file}: {name} is no tensor; copy or download it again")
        if entry.dtype not in DTYPES:
            raise ValueError(f"{file}: {name} has dtype {entry.dtype}; expected one of {', '.join(DTYPES)}")
        start, end = entry.data_offsets
        whole = end - start == math.prod(entry.shape) * DTYPES[entry.dtype].itemsize and 8 + length + end <= total
        if not whole or start != covered:
            raise ValueError(
                f"{file} is truncated or broken: {name} is not whole, or not where it should be; copy it again"
            )
        covered = end
        tensors[name] = StoredTensor(file, entry.dtype, tuple(entry.shape), 8 + length + start, end - start)
    if 8 + length + covered != total:
        raise ValueError(
            f"{file} is broken: {total - 8 - length - covered} of its bytes belong to no tensor; copy it again"
        )
    return tensors


def _header(entries: Mapping[str, StoredTensor]) -> bytes:
    """Length and JSON header of a file that holds `entries` one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in entries.items():
        end = offset + stored.size
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns the data
    return len(text).to_bytes(8, "little") + text


def _split(layout: Mapping[str, StoredTensor], limit: int) -> list[list[str]]:
    """Names per file, in order, so that no file exceeds `limit` bytes if it can be helped."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, stored in layout.items():
        if shards[-1] and used + stored.size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += stored.size
    return shards


def total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of data."""
    return sum(stored.size for stored in tensors.values())


def _check_fit(expected: Mapping[str, torch.Size], found: Mapping[str, StoredTensor], folder: Path) -> None:
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != tuple(shape)
        ],
    }
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(parts)}")
