"""What a check is, and how a list of them is run: each says what it found, and a failed one stops no other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from prismo.models.self_test import SelfTestError
from prismo.util.text import first_line

T = TypeVar("T")

Status = Literal["ok", "differs", "not known", "skipped"]

_LOG = logging.getLogger(__name__)
_LISTED = 4


@dataclass(frozen=True)
class Finding:
    """Outcome of a check.

    Attributes:
        status: "not known" means that nothing is known to compare with; the text then says what was found.
        text: one line.
        details: what was expected and what was found, one line per difference.
    """

    status: Status
    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """A question about a checkpoint.

    Attributes:
        name: what is looked at, e.g. "tensor names".
        run: gives the answer; raises `SkippedError` where it cannot be asked, another error where something is wrong.
        needs: checks whose "differs" or "skipped" leaves nothing to ask here.
    """

    name: str
    run: Callable[[], Finding]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A check that was run."""

    name: str
    finding: Finding
    seconds: float


class SkippedError(Exception):
    """A check cannot be made; the message says why."""


def judge(found: str, differences: Iterable[str]) -> Finding:
    """ "ok" with what was found, or "differs" with the differences."""
    listed = tuple(differences)
    return Finding("differs", listed[0], listed) if listed else Finding("ok", found)


def difference(what: str, expected: object, found: object) -> str:
    """The line of one difference."""
    return f"{what}: expected {expected}, found {found}"


def some(names: Sequence[str] | set[str]) -> str:
    """The first names of a long list and the number of the others."""
    listed = sorted(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(f"`{name}`" for name in listed[:_LISTED]) + more


def needed(get: Callable[[], T], check: str) -> T:
    """What another check has judged already; whatever is wrong with it is that check's business.

    Raises:
        SkippedError: it could not be had.
    """
    try:
        return get()
    except SkippedError:
        raise
    except Exception as error:
        raise SkippedError(f"see '{check}'") from error


def run_checks(checks: Sequence[Check]) -> Iterator[Answer]:
    """Run checks in order; yields each row as soon as it is known."""
    done: dict[str, Status] = {}
    for check in checks:
        start = time.perf_counter()
        open_question = next((name for name in check.needs if done.get(name) in ("differs", "skipped")), None)
        finding = _run(check) if open_question is None else Finding("skipped", f"see '{open_question}'")
        done[check.name] = finding.status
        yield Answer(check.name, finding, time.perf_counter() - start)


def _run(check: Check) -> Finding:
    try:
        return check.run()
    except SkippedError as error:
        return Finding("skipped", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Finding("skipped", f"the memory is too small ({first_line(error)})")
    except (ValueError, OSError, SelfTestError) as error:  # what our readers say of broken files
        return Finding("differs", first_line(error), (" ".join(str(error).split()),))
    except Exception as error:  # damaged files break other people's code anywhere, and the page must be written
        _LOG.warning("the check '%s' failed", check.name, exc_info=error)
        text = f"could not be judged: {type(error).__name__}: {first_line(error)}"
        return Finding("differs", text, (text,))
