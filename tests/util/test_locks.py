"""One process at a time, and the others hear who it is."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prismo.util.locks import LockedError, exclusive, take_lock

_FORK = multiprocessing.get_context("fork")


def hold(path: Path, ready: int) -> None:
    lock = take_lock(path)
    os.write(ready, b"x")
    signal.pause()
    lock.close()


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Another process has the lock until the end of the block, where it is killed; gives its id."""
    read, write = os.pipe()
    process = _FORK.Process(target=hold, args=(path, write), daemon=True)
    process.start()
    os.read(read, 1)
    yield process.pid
    process.kill()
    process.join()


def test_the_holder_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    with held(tmp_path / ".lock") as holder:
        with pytest.raises(LockedError, match=rf"process {holder} on .* is at work on {tmp_path}"):
            take_lock(tmp_path / ".lock")
        with pytest.raises(LockedError, match=f"process {holder} "):  # the failed attempt left the name in the file
            take_lock(tmp_path / ".lock")
    take_lock(tmp_path / ".lock").close()


def test_a_lock_is_taken_once_in_a_process_too(tmp_path: Path) -> None:
    with take_lock(tmp_path / ".lock"), pytest.raises(LockedError, match=f"process {os.getpid()} "):
        take_lock(tmp_path / ".lock")
    take_lock(tmp_path / ".lock").close()


def append(path: Path, name: str) -> None:
    with exclusive(path.with_name(".lock")):
        for _ in range(50):
            with path.open("a") as file:
                file.write(name)


def test_exclusive_work_does_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "text"
    workers = [_FORK.Process(target=append, args=(path, name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    text = path.read_text()
    assert len(text) == 150
    assert [name * 50 in text for name in "abc"] == [True] * 3


def test_a_file_system_without_locks_is_only_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING):
        take_lock(tmp_path / ".lock").close()
        with exclusive(tmp_path / ".other"):
            pass
    assert caplog.text.count(f"{tmp_path} has no file locks") == 2
