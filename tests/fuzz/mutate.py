"""Mutations of one file of a folder, as hypothesis strategies: the bytes of any file, and the structure of JSON.

Every strategy looks at the intact folder and draws a `Mutation`; `Mutation.apply` makes the change in a copy of it.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import assume
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Place = tuple[str | int, ...]

_DEEP, _NOT_UTF8 = "@deep@", "@bytes@"
_SPECIAL = {_DEEP: b"[" * 20_000 + b"]" * 20_000, _NOT_UTF8: b'"\xff\xfe\xc3"'}
OUTSIDE = "../outside"  # beside the copy lies a folder with this name that nobody may look into
# What a value of a JSON or YAML file is replaced with, by the name that failures are reported under.
WRONG: dict[str, Any] = {
    "null": None, "NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf, "-1": -1, "0": 0, "huge": 10**30,
    "1.5": 1.5, "true": True, '"False"': "False", "empty text": "", "[]": [], "{}": {}, "[[1]]": [[1]], '"7"': "7",
    "deep": _DEEP, "not UTF-8": _NOT_UTF8, "../": OUTSIDE, "absolute path": "/nonexistent/x",
}  # fmt: skip
_LIST = ("shorter", "longer", "reversed")
_DAMAGE = ("truncate", "flip", "insert", "zeros", "ones", "empty", "random", "replace", "swap", "delete")
_HUGE_HEADER = (2**31, 2**40, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Mutation:
    """One change of one file.

    Attributes:
        file: path in the folder; an error must name it (or the folder).
        kind: short name of the change.
        what: the change in words.
        apply: makes it in the folder given.
        place: keys of the JSON value that is changed.
        at: the first byte that is changed, -1 where that is no single place.
        must_fail: no reader may accept the result, not even with an unchanged value.
    """

    file: str
    kind: str
    what: str
    apply: Callable[[Path], object] = field(repr=False)
    place: Place = ()
    at: int = -1
    must_fail: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def writes(file: str, kind: str, what: str, data: bytes, **more: Any) -> Mutation:
    """The mutation that gives `file` the content `data`."""
    return Mutation(file, kind, what, lambda folder: (folder / file).write_bytes(data), **more)


@functools.lru_cache(maxsize=64)
def _content(path: Path) -> bytes:
    return path.read_bytes()


# --- bytes ------------------------------------------------------------------------------------------------------------


@st.composite
def damage(draw: Draw, folder: Path, files: Sequence[str]) -> Mutation:
    """Any file cut off, flipped, overwritten, exchanged or gone."""
    file = draw(st.sampled_from(sorted(files)))
    data = _content(folder / file)
    kind = draw(st.sampled_from(_DAMAGE))
    if kind == "delete":
        return Mutation(file, kind, "deleted", lambda folder: (folder / file).unlink())
    if kind in ("swap", "replace"):
        assume(len(files) > 1)
        other = draw(st.sampled_from(sorted(set(files) - {file})))
        assume(_content(folder / other) != data)
        if kind == "replace":
            return writes(file, kind, f"replaced by {other}", _content(folder / other))
        return Mutation(file, kind, f"swapped with {other}", functools.partial(_swap, file, other))
    changed, what = draw(damaged(data, kind))
    same = next((at for at, (a, b) in enumerate(zip(data, changed, strict=False)) if a != b), -1)
    return writes(file, kind, what, changed, at=same)


@st.composite
def damaged(draw: Draw, data: bytes, kind: str) -> tuple[bytes, str]:
    """`data` after a change of bytes, and the change in words."""
    at = draw(st.one_of(st.integers(0, min(len(data), 300) - 1), st.integers(0, len(data) - 1)))
    if kind == "truncate":
        return data[:at], f"cut off at byte {at} of {len(data)}"
    if kind == "flip":
        bit = draw(st.integers(0, 7))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], f"bit {bit} of byte {at} flipped"
    if kind == "insert":
        extra = draw(st.binary(min_size=1, max_size=9))
        return data[:at] + extra + data[at:], f"{extra!r} inserted at byte {at}"
    if kind in ("zeros", "ones"):
        count, fill = draw(st.integers(1, 64)), b"\0" if kind == "zeros" else b"\xff"
        changed = data[:at] + fill * min(count, len(data) - at) + data[at + count :]
        assume(changed != data)
        return changed, f"{count} bytes from byte {at} are {kind}"
    if kind == "empty":
        return b"", "empty"
    return draw(st.binary(min_size=1, max_size=200)), "random bytes"


def _swap(file: str, other: str, folder: Path) -> None:
    (folder / file).rename(folder / "swapped")
    (folder / other).rename(folder / file)
    (folder / "swapped").rename(folder / other)


# --- JSON -------------------------------------------------------------------------------------------------------------


@st.composite
def edited(draw: Draw, value: Any) -> tuple[Any, Place, str]:
    """`value` with one place in it changed: (the new value, the place, the kind of change)."""
    value, place = copy.deepcopy(value), []
    parent, key, node = None, None, value
    while isinstance(node, (dict, list)) and node and (parent is None or draw(st.integers(0, 3))):
        parent = node
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        place.append(key)
        node = node[key]
    kinds = ["drop", *WRONG, *(_LIST if isinstance(node, list) and len(node) > 1 else ()), *(("rename",) * 2)]
    kind = draw(st.sampled_from(kinds))
    if kind == "drop":
        del parent[key]
    elif kind == "rename":
        assume(isinstance(parent, dict))
        parent[f"{key}_x"] = parent.pop(key)
    elif kind == "../":
        parent[key] = f"{OUTSIDE}/{node if isinstance(node, str) else 'x'}"
    elif kind in _LIST:
        parent[key] = {"shorter": node[:-1], "longer": [*node, node[-1]], "reversed": node[::-1]}[kind]
    else:
        parent[key] = WRONG[kind]
    assume(repr(parent.get(key) if isinstance(parent, dict) else parent) != repr(node))
    return value, tuple(place), kind


@st.composite
def json_edit(draw: Draw, folder: Path, files: Sequence[str]) -> Mutation:
    """A JSON file with a value dropped, renamed or replaced by something else."""
    file = draw(st.sampled_from(sorted(files)))
    value, place, kind = draw(edited(_parsed(folder / file)))
    return writes(file, kind, describe(place, kind), dump_json(value), place=place)


@st.composite
def json_root(draw: Draw, files: Sequence[str]) -> Mutation:
    """A JSON file that holds another kind of value altogether."""
    file, kind = draw(st.sampled_from(sorted(files))), draw(st.sampled_from([*WRONG]))
    return writes(file, kind, f"its content is {kind}", dump_json(WRONG[kind]), place=())


def json_of(folder: Path, files: Sequence[str]) -> st.SearchStrategy[Mutation]:
    """Edits, mostly, or another top level."""
    edits = json_edit(folder, files)
    return st.one_of(edits, edits, edits, edits, json_root(files))


@functools.lru_cache(maxsize=64)
def _parsed(path: Path) -> Any:
    return json.loads(path.read_bytes())


def dump_json(value: Any) -> bytes:
    """JSON with the tokens NaN and Infinity, and with text that is no JSON where an edit asks for it."""
    data = json.dumps(value).encode()
    for token, raw in _SPECIAL.items():
        data = data.replace(f'"{token}"'.encode(), raw)
    return data


def yaml_bytes(value: Any) -> bytes:
    """YAML, with what `dump_json` also has."""
    data = yaml.safe_dump(value, sort_keys=False).encode()
    for token, raw in _SPECIAL.items():
        data = data.replace(f"'{token}'".encode(), raw)
    return data


def describe(place: Place, kind: str) -> str:
    return f"{'.'.join(map(str, place))} {kind if kind in ('drop', 'rename', *_LIST) else f'= {kind}'}"


# --- safetensors ------------------------------------------------------------------------------------------------------


@st.composite
def header_edit(draw: Draw, folder: Path, files: Sequence[str]) -> Mutation:
    """A safetensors file whose header is another one, in a file that is otherwise whole."""
    file = draw(st.sampled_from(sorted(files)))
    data = _content(folder / file)
    end = 8 + int.from_bytes(data[:8], "little")
    if draw(st.integers(0, 9)) == 0:
        length = draw(st.sampled_from(_HUGE_HEADER))
        return writes(file, "header length", f"header of {length} bytes", length.to_bytes(8, "little") + data[8:])
    value, place, kind = draw(edited(json.loads(data[8:end])))
    header = dump_json(value)
    content = len(header).to_bytes(8, "little") + header + data[end:]
    return writes(file, f"header {kind}", f"header {describe(place, kind)}", content, place=place)


def data_starts(path: Path) -> int:
    """Where the numbers of a safetensors file begin."""
    return 8 + int.from_bytes(_content(path)[:8], "little")
