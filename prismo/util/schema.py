"""JSON and YAML files with types and bounds: who reads one says what it must hold, and a wrong one is one sentence.

A kind is anything that pydantic understands: a dataclass, a TypedDict, `dict[str, Any]`, `list[float]`, with bounds as
`Annotated[int, Ge(1)]`, numbers that are neither NaN nor infinite as pydantic's `FiniteFloat`. Types are strict: "5" is
no number, "False" is no truth value, 1.5 is no integer. Keys that a dataclass does not know are ignored, because other
people's files have more; `own_keys` refuses them in files of ours.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails

from prismo.util.text import did_you_mean

T = TypeVar("T")
JsonObject = dict[str, Any]  # a file of other people's, of which the reader looks at a few keys

_BROKEN = "restore it or fetch it again"
_MISTYPED = "correct it"
_LONGEST_YAML = 1 << 20  # bytes; descriptions are written by hand, and YAML's aliases let a small file grow without end
_SHOWN = 60  # characters of a wrong value in an error


def own_keys(kind: type[T]) -> type[T]:
    """Class decorator: a file of this kind with a key that is no field is refused, with the nearest one."""
    return with_config(ConfigDict(extra="forbid"))(kind)


def read_json(path: str | Path, kind: type[T], *, advice: str = _BROKEN) -> T:
    """Read a JSON file as `kind`.

    Args:
        advice: end of the error: what to do with a wrong file.

    Raises:
        ValueError: not UTF-8, not JSON, nested without end, or not of this kind; names the file and the first place.
        OSError: the file cannot be read.
    """
    return parse_json(Path(path).read_bytes(), kind, str(path), advice=advice)


def read_yaml(path: str | Path, kind: type[T], *, advice: str = _MISTYPED) -> T:
    """Read a YAML file as `kind`, without ever making an object of another class. Raises as `read_json` does."""
    path = Path(path)
    if path.stat().st_size > _LONGEST_YAML:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a description has at most {_LONGEST_YAML:,}")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        if _size(value, {}) > 16 * _LONGEST_YAML:
            raise ValueError("its aliases make it too long")
        text = json.dumps(value, default=str)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not valid YAML ({reason}); {advice}") from error
    return parse_json(text.encode(), kind, str(path), advice=advice)


def _size(value: Any, known: dict[int, int]) -> int:
    """Values and letters in what YAML's aliases stand for, each of them counted again, but looked at once."""
    if not isinstance(value, (dict, list)):
        return 1 + len(str(value))
    if id(value) not in known:
        known[id(value)] = 0  # one that holds itself is no JSON and refused as such
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def check(value: Any, kind: type[T], where: str, *, advice: str = _BROKEN) -> T:
    """A value of JSON types (dictionaries, lists, strings, numbers) as `kind`; `where` names it in the error."""
    return parse_json(json.dumps(value).encode(), kind, where, advice=advice)


def read_json_lines(path: str | Path, kind: type[T], *, advice: str = _BROKEN, growing: bool = False) -> list[T]:
    """Every line of a file as `kind`; raises as `read_json` does and names the line.

    Args:
        growing: somebody may be writing it: what comes behind the last end of a line is left out.
    """
    content = Path(path).read_bytes()
    lines = content[: content.rfind(b"\n") + 1 if growing else None].splitlines()
    return [
        parse_json(line, kind, f"{path} line {number}", advice=advice) for number, line in enumerate(lines, 1) if line
    ]


def parse_json(text: bytes, kind: type[T], where: str, *, advice: str = _BROKEN) -> T:
    """JSON text as `kind`; `where` names it in the error. Raises as `read_json` does."""
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {_sentence(problems[0], kind)}{more}; {advice}") from error


def _adapter(kind: Any) -> TypeAdapter[Any]:
    try:
        return _cached_adapter(kind)
    except TypeError:  # a kind with an unhashable bound
        return TypeAdapter(kind)


@functools.cache
def _cached_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _sentence(problem: ErrorDetails, kind: Any) -> str:
    """One problem in words: where, what was expected, what was found."""
    place, what = problem["loc"], problem["type"]
    if what == "json_invalid":
        return f"not valid JSON ({problem.get('ctx', {}).get('error', problem['msg'])})"
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or "its content"
    if what in ("unexpected_keyword_argument", "extra_forbidden"):
        return did_you_mean("key", name, _fields(kind) if len(place) == 1 else ())
    if what in ("missing", "missing_argument"):
        return f"{name} is missing"
    expected = re.sub("^(Input|String|List|Dictionary|Value error,) ", "", problem["msg"])
    found = repr(problem["input"])
    return f"{name} {expected}, found {found if len(found) <= _SHOWN else found[:_SHOWN] + '...'}"


def _fields(kind: Any) -> tuple[str, ...]:
    try:
        return tuple(get_type_hints(kind))
    except TypeError:
        return ()
