"""Locks between processes, also of machines that share a file system; the system frees those of a dead process."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LOG = logging.getLogger(__name__)


class LockedError(OSError):
    """Another process holds the lock; the message names it."""


def take_lock(path: Path) -> IO[bytes]:
    """Open `path` and lock it until the returned file is closed. A file system without locks is only warned about.

    Raises:
        LockedError: another process has it.
    """
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        raise LockedError(f"{holder} is at work on {path.parent}") from error
    except OSError:
        _warn(path)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file


@contextmanager
def exclusive(path: Path) -> Generator[None]:
    """Hold a lock on the file `path`, waiting for it. Where the file system has no locks, go on: writing is atomic."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for the process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            _warn(path)
        yield


def _warn(path: Path) -> None:
    _LOG.warning("%s has no file locks; several processes may do the same work", path.parent)
