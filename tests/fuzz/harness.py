"""What a reader makes of a damaged file: the same value, another one, one clear error, or something that may not be.

Every case runs in a child process, so that a crash, a hang, exhausted memory and files written elsewhere are results
like any other and the next case starts from the same state.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from prismo.models.self_test import SelfTestError
from prismo.util.cli import log_error
from tests.fuzz.mutate import Mutation

Kind = Literal["works", "refused", "traceback", "crash", "hang", "escape"]
Read = Callable[[Path], Any]
Judge = Callable[[Mutation, Any, Any], bool]
_SECONDS = 120
_MEMORY = 6 << 30  # bytes beyond those that the process has already
_LONGEST = 1000  # characters of an error that somebody reads
_WRONG_INPUT = (ValueError, OSError, SelfTestError)  # what the commands take for wrong input; anything else is a bug
_CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate"}


class CommandFailedError(Exception):
    """Raised by a reader whose command ended with a code other than 0 and has logged why."""


@dataclass(frozen=True)
class Outcome:
    """Of one case: `value` of a reader that works, else `text` that says what happened."""

    kind: Kind
    value: Any = None
    text: str = ""


def attempt(read: Read, folder: Path) -> Outcome:
    """`read(folder)` in a child process. It may write in `folder` and `folder`/../cache, and not look beside it."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(read, folder, send))
    process.start()
    send.close()
    try:
        if not receive.poll(_SECONDS):
            return Outcome("hang", text=f"nothing for {_SECONDS} s")
        return receive.recv()
    except EOFError:
        process.join()
        return Outcome("crash", text=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receive.close()


def _child(read: Read, folder: Path, send: Connection) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = os.fdopen(null, "w")
    cache = folder.parent / "cache"
    cache.mkdir()
    os.environ |= {"XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    tempfile.tempdir = str(cache)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    os.fsync = lambda handle: None  # nothing here outlives the test
    torch.set_num_threads(1)  # makes the pool that fork left behind anew: two threads doing so at once is a crash
    escapes = _watch(folder)
    outcome = _run(read, folder)
    send.send(Outcome("escape", text=f"it touched {escapes[0]}") if escapes else outcome)
    send.close()
    os._exit(0)


def _watch(folder: Path) -> list[str]:
    """Note every file that is opened beside `folder`, or changed outside of it; refuse connections."""
    root, inside = folder.parent.resolve(), (folder.resolve(), folder.parent.resolve() / "cache")
    escapes: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError("there is no network in this test")
        if event != "open" and event not in _CHANGES:
            return
        made = arguments[event == "os.symlink"]  # of a link its place, not what it leads to
        path = made if isinstance(made, (str, Path)) else ""
        below = event in _CHANGES and arguments[-1] not in (-1, None)  # of an opened folder, as shutil.rmtree works
        if not path or below or str(path).startswith(("/dev/", "/proc/")) or "__pycache__" in str(path):
            return
        place = Path(os.path.abspath(path))
        if any(place == allowed or allowed in place.parents for allowed in inside):
            return
        changes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if changes or root in place.parents:
            escapes.append(f"{place} ({event})")

    sys.addaudithook(note)
    return escapes


def _run(read: Read, folder: Path) -> Outcome:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = logged.append
    logging.getLogger().addHandler(handler)
    try:
        return Outcome("works", value=read(folder))
    except _WRONG_INPUT as error:
        log_error(error)
    except SystemExit as stopped:
        return Outcome("refused", text=str(stopped.code))
    except CommandFailedError:
        pass
    except BaseException as error:
        return Outcome("traceback", text=_last_frame(error))
    if logged[-1].exc_info:
        return Outcome("traceback", text=_last_frame(logged[-1].exc_info[1]))
    return Outcome("refused", text=logged[-1].getMessage())


def _last_frame(error: BaseException) -> str:
    """The error, the last line of prismo that it passed, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/prismo/" in frame.filename] or frames
    places = [f"{frame.filename.rpartition('/prismo/')[2]}:{frame.lineno}" for frame in (ours[-1], frames[-1])]
    said = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {said} [{' < '.join(dict.fromkeys(places))}]"


@dataclass(frozen=True)
class Fuzzer:
    """Mutates copies of a folder and judges what a reader makes of them.

    Attributes:
        cases: of the whole suite; a property takes its share.
        folder: for the copies.
        tell: takes the counts of each property.
    """

    cases: int
    folder: Path
    tell: Callable[[Counter[str]], None]

    def __call__(
        self,
        source: Path,
        mutations: st.SearchStrategy[Mutation],
        read: Read,
        *,
        percent: float,
        legitimate: Judge = lambda mutation, before, after: False,
        also: tuple[str, ...] = (),
    ) -> None:
        """Assert that every mutation of `source` is refused with one clear error, or changes nothing.

        Args:
            read: reads a copy; what it returns can be compared.
            percent: share of all cases.
            legitimate: (mutation, value before, value after): the difference is what the changed file says, and the
                changed file is as valid as the one before.
            also: words of errors that say enough without the name of the file.
        """
        before = self._attempt(source, read, None)
        assert before.kind == "works", f"the intact folder: {before.text}"
        counts: Counter[str] = Counter()
        failures: dict[str, list[str]] = {}

        @settings(
            max_examples=max(2, round(self.cases * percent / 100)), derandomize=True, database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(mutations)
        def examples(mutation: Mutation) -> None:
            verdict, problem = self._judge(mutation, before, self._attempt(source, read, mutation), legitimate, also)
            counts[verdict] += 1
            if problem:
                alike = f"{mutation.file}{verdict}{re.sub(r'[0-9]+|0x[0-9a-f]+', '', problem)}"
                failures.setdefault(alike, []).append(f"{mutation}: {verdict}: {problem}")

        examples()
        self.tell(counts)
        shown = [f"{lines[0]}{f' (and {len(lines) - 1} alike)' if lines[1:] else ''}" for lines in failures.values()]
        listed = "\n".join(sorted(shown))
        assert not failures, f"{sum(map(len, failures.values()))} of {sum(counts.values())} cases:\n{listed}"

    def _attempt(self, source: Path, read: Read, mutation: Mutation | None) -> Outcome:
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        try:
            shutil.copytree(source, case / "data", symlinks=True)
            shutil.copytree(source, case / "outside")
            if mutation is not None:
                mutation.apply(case / "data")
            return attempt(read, case / "data")
        finally:
            shutil.rmtree(case, ignore_errors=True)

    def _judge(  # noqa: PLR0911 (one return for each outcome)
        self, mutation: Mutation, before: Outcome, after: Outcome, legitimate: Judge, also: tuple[str, ...]
    ) -> tuple[str, str]:
        """(column of the table, what is wrong with it)."""
        if after.kind == "refused":
            parent, name = os.path.split(mutation.file)
            names = (name, *([parent] if parent else []), str(self.folder), *also)
            if not any(name in after.text for name in names):
                return "unclear", f"the error does not name the file: {after.text[:300]}"
            return ("clear", "") if len(after.text) <= _LONGEST else ("unclear", f"{len(after.text)} characters")
        if after.kind != "works":
            return after.kind, after.text
        if mutation.must_fail:
            return "accepted", "accepted silently"
        if after.value == before.value:
            return "harmless", ""
        if legitimate(mutation, before.value, after.value):
            return "other", ""
        return "accepted", f"other data, silently: {_difference(before.value, after.value)}"


def _difference(before: Any, after: Any) -> str:
    """The first place where two values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys(), key=str):
            if before.get(key) != after.get(key):
                return f"{key}: {_difference(before.get(key), after.get(key))}"
    return f"{before!r:.60} -> {after!r:.60}"
