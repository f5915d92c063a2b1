"""Flags of a command as a dataclass: `--flag value`, `--flag=value`, or `--flag` alone for what can be True.

`parse_flags` fills the dataclass; `--config_path file.yaml` gives values that flags override; `--help` prints the
comments above the fields, in the groups that lines such as `# --- data` in the class begin.
"""

from __future__ import annotations

import functools
import inspect
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from prismo.util.schema import JsonObject, read_yaml
from prismo.util.text import nearest

C = TypeVar("C")

CONFIG = "config_path"
_NONE = ("None", "none", "null", "")
_GROUP = "# --- "


def parse_flags(kind: type[C], arguments: Sequence[str] | None = None, about: str | None = None) -> C:
    """Read `--flag value` arguments, over those of `--config_path file.yaml` if given.

    Args:
        kind: dataclass of the flags.
        arguments: None takes those of the process.
        about: what --help says first.

    Raises:
        ValueError: an unknown flag or key (with the nearest one), a missing one, or a value of another type.
        SystemExit: after --help.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text(kind, about))
        raise SystemExit(0)
    options = {option.name: option for option in _options(kind)}
    given = _split(arguments, options)
    values = _file_values(given.pop(CONFIG, None), options)
    values |= {name: options[name].decode(_joined(parts), f"--{name}") for name, parts in given.items()}
    if missing := [f"--{name}" for name, option in options.items() if option.required and name not in values]:
        raise ValueError(f"missing {', '.join(missing)}; --help lists all flags")
    return kind(**values)


def flag_words(kind: Any, values: Mapping[str, Any]) -> list[str]:
    """A command line that gives the flags of `kind` these values; those that are the defaults are left out."""
    words = []
    for field in fields(kind):
        default = str(field.default) if isinstance(field.default, Path) else field.default
        if field.name in values and values[field.name] != default:
            words += [f"--{field.name}", str(values[field.name])]
    return words


def at_least(flags: object, **lowest: float) -> None:
    """Refuse the first of these flags that is below its bound, or no finite number. None passes: it was not given.

    Raises:
        ValueError: naming the flag, its value and the bound.
    """
    for name, low in lowest.items():
        value = getattr(flags, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"--{name} is {value}; expected at least {low}")


def at_most(flags: object, **highest: float) -> None:
    """Refuse the first of these flags that is above its bound. None passes: it was not given.

    Raises:
        ValueError: naming the flag, its value and the bound.
    """
    for name, high in highest.items():
        value = getattr(flags, name)
        if value is not None and value > high:
            raise ValueError(f"--{name} is {value}; expected at most {high}")


def ends_in(flags: object, name: str, *suffixes: str) -> None:
    """Refuse a file of the flag `name` whose name ends otherwise. None passes: it was not given.

    Raises:
        ValueError: naming the flag, its value and the suffixes.
    """
    path = getattr(flags, name)
    if path is not None and path.suffix not in suffixes:
        expected = " or ".join(", ".join(suffixes).rsplit(", ", 1))
        raise ValueError(f"--{name} is {path}; expected a name that ends in {expected}")


@dataclass(frozen=True)
class _Option:
    """A flag.

    Attributes:
        name: of the field.
        hint: its type.
        field: of the dataclass.
        help: the comment above it.
        group: heading in the help.
    """

    name: str
    hint: Any
    field: Field[Any]
    help: str
    group: str

    @property
    def required(self) -> bool:
        return self.field.default is self.field.default_factory is MISSING

    @functools.cached_property
    def kinds(self) -> tuple[Any, ...]:
        """The type, or the alternatives of a union."""
        return (self.hint,) if get_origin(self.hint) in (list, tuple, dict, None) else get_args(self.hint)

    @property
    def many(self) -> bool:
        """Whether it takes a list."""
        return any(get_origin(kind) in (list, tuple) for kind in self.kinds)

    def decode(self, value: Any, where: str) -> Any:
        """A value from a command line (text) or a YAML file, as the field's type."""
        if NoneType in self.kinds and (value is None or (isinstance(value, str) and value in _NONE)):
            return None
        adapter: TypeAdapter[Any] = TypeAdapter(self.hint)
        if "\0" in str(value):
            raise ValueError(f"{where} {value!r}: holds a zero byte, which no name can have")
        try:
            if self.many:
                several = yaml.safe_load(value) if isinstance(value, str) else value
                return adapter.validate_python(several if isinstance(several, list) else [several])
            if value is None or isinstance(value, (list, dict)):
                raise ValueError("one value was expected")
            return adapter.validate_strings(str(value))
        except (ValueError, yaml.YAMLError) as error:
            wrong = isinstance(error, ValidationError)
            reason = error.errors(include_url=False)[-1]["msg"].removeprefix("Input ") if wrong else error
            text = " ".join(f"{where} {value}: another type than {_shown(self.hint)} ({reason})".split())
            raise ValueError(text) from error


def _split(arguments: Sequence[str], options: dict[str, _Option]) -> dict[str, list[str]]:
    """Flag -> the texts that follow it; the last of a repeated flag counts."""
    given: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if name not in options and name != CONFIG:
                raise ValueError(f"unknown flag '--{name}'.{_suggestion(name, options, '--')} --help lists all flags")
            current = given[name] = [value] if equals else []
        elif current is None:
            raise ValueError(f"found {argument!r} where a flag was expected; flags look like --name value")
        else:
            current.append(argument)
    for name, parts in given.items():
        alone = name in options and bool in options[name].kinds
        if not parts and not alone:
            raise ValueError(f"--{name} needs a value")
        if len(parts) > 1 and not (name in options and options[name].many):
            raise ValueError(f"--{name} takes one value, found {' '.join(parts)!r}; put quotes around one with spaces")
    return given


def _joined(parts: list[str]) -> str:
    """`0 1` and `[0, 1]` without quotes are lists, no value is True."""
    if not parts:
        return "True"
    return parts[0] if len(parts) == 1 else " ".join(parts) if parts[0].startswith("[") else f"[{', '.join(parts)}]"


def _file_values(given: list[str] | None, options: dict[str, _Option]) -> dict[str, Any]:
    """Values of the file of --config_path."""
    if given is None:
        return {}
    path = Path(given[0])
    if not path.is_file():
        raise ValueError(f"--{CONFIG}: there is no file {path}")
    if path.stat().st_size == 0:
        return {}
    content = read_yaml(path, JsonObject, advice="it holds one `flag: value` per line")
    for key in content:
        if key not in options:
            raise ValueError(f"{path}: unknown key {key!r}.{_suggestion(key, options)} --help lists all flags")
    return {key: options[key].decode(value, f"{path}: {key}") for key, value in content.items()}


def _suggestion(name: str, options: dict[str, _Option], dashes: str = "") -> str:
    close = nearest(name, [*options, CONFIG], count=3)
    return f" Did you mean {' or '.join(repr(dashes + flag) for flag in close)}?" if close else ""


def _options(kind: Any) -> list[_Option]:
    hints, told = get_type_hints(kind), _comments(kind)
    return [_Option(field.name, hints[field.name], field, *told.get(field.name, ("", ""))) for field in fields(kind)]


def _comments(kind: type) -> dict[str, tuple[str, str]]:
    """Field -> (comment above it, group), from the source of the class and its bases."""
    found: dict[str, tuple[str, str]] = {}
    for owner in reversed(kind.__mro__[:-1]):
        group, lines = "", list[str]()
        try:
            source = inspect.getsource(owner)
        except OSError:  # typed into an interpreter, or stripped from an installation
            continue
        for line in map(str.strip, source.splitlines()):
            name = line.partition(":")[0]
            if line.startswith(_GROUP):
                group, lines = line.removeprefix(_GROUP).strip(), []
            elif line.startswith("#"):
                lines.append(line.removeprefix("#").strip())
            elif name in owner.__annotations__ and name not in found:
                found[name] = (" ".join(lines), group)
                lines = []
            elif line:
                lines = []
    return found


def help_text(kind: Any, about: str | None = None) -> str:
    """What --help prints."""
    about = inspect.cleandoc(about or kind.__doc__ or "")
    width = min(120, shutil.get_terminal_size().columns)
    groups: dict[str, list[_Option]] = {}
    for option in _options(kind):
        groups.setdefault(option.group, []).append(option)
    parts = [about, ""]
    for group, options in groups.items():
        parts.append(f"{group or 'flags'}:")
        for option in options:
            parts.append(f"  --{option.name} {_shown(option.hint)}")
            text = f"{option.help} {_default(option)}".strip()
            parts += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        parts.append("")
    parts += [
        f"  --{CONFIG} FILE",
        "      YAML file with `flag: value` lines; what the command line gives counts more",
        "",
    ]
    return "\n".join(parts)


def _default(option: _Option) -> str:
    """What holds if the flag is left out; nothing where that is nothing, which the flag's comment explains."""
    if option.required:
        return "(required)"
    field = option.field
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "" if value in (None, "") else f"(default: {value})"


def _shown(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (list, tuple):
        return f"[{_shown(get_args(hint)[0])}, ...]"
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if not kinds:
        return getattr(hint, "__name__", str(hint))
    return "|".join(str(kind) if isinstance(kind, str) else _shown(kind) for kind in kinds)
