"""Wording of errors: one clear sentence with the nearest valid name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def nearest(name: str, options: Iterable[str], count: int = 1) -> list[str]:
    """The options that look most like `name`, if any does."""
    return difflib.get_close_matches(name, sorted(options), n=count, cutoff=0.5)


def did_you_mean(kind: str, name: str, options: Iterable[str]) -> str:
    """Error text for an unknown `name`: the closest option first, then all of them."""
    known = sorted(options)
    close = nearest(name, known)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Available: {', '.join(known) or '(none)'}"


def instruction_of(task: str) -> str:
    """The instruction in a LIBERO task's name, without the scene that LIBERO-90 and LIBERO-10 put in front.

    "KITCHEN_SCENE3_turn_on_the_stove" gives "turn on the stove".
    """
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", task).replace("_", " ")


def size_text(count: float) -> str:
    """A number of bytes as people say it: "15.1 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
