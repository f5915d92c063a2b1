"""Atomic writes: a reader (or a resumed run) sees the old file or the new one, never half of it, never none."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OLD = ".old."


@contextmanager
def atomic_write(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    On an exception the temporary file is removed and `path` keeps its former content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # Not mkstemp: its files are private, and a shared cluster folder needs the usual mode.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | Path, *, keep_existing: bool = False) -> Generator[Path]:
    """Yield a temporary folder beside `path`; on success flush it and put it in the place of `path`.

    An old folder is exchanged with the new one in one step and then deleted. File systems that cannot do this (NFS)
    move the old one aside first and back if that fails; after a kill in between the next call does it.

    Args:
        keep_existing: the first wins: a folder that somebody else put there in the meantime stays, ours is deleted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _restore(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        flush_folder(temporary)
        _put_in_place(temporary, path, keep_existing)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush_folder(folder: Path) -> None:
    """Have every file of a folder on the disk before anything calls it complete."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _flush(path)


def _put_in_place(temporary: Path, path: Path, keep_existing: bool) -> None:
    if keep_existing or not path.exists():
        try:
            temporary.replace(path)
        except OSError as error:  # the system never replaces a folder that holds something
            if not keep_existing or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
        return
    if _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)  # the old content
        return
    aside = path.with_name(f".{path.name}{_OLD}{secrets.token_hex(4)}")
    path.replace(aside)
    try:
        temporary.replace(path)
    except BaseException:
        aside.replace(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _restore(path: Path) -> None:
    """Give a folder its name back that a killed process had moved aside."""
    if not path.exists():
        for aside in sorted(path.parent.glob(f".{glob.escape(path.name)}{_OLD}*"))[:1]:
            aside.replace(path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point_link(link: Path, target: Path) -> None:
    """Make `link` a relative link to `target`, in the place of an older link, in one step.

    A convenience only: where links cannot be made, or something else has that name, nothing happens.
    """
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    if link.exists() and not link.is_symlink():
        return
    with contextlib.suppress(OSError):
        # Folders above may be links themselves, over which ".." would lead elsewhere.
        there = os.path.relpath(target.parent.resolve() / target.name, link.parent.resolve())
        temporary.symlink_to(there, target_is_directory=target.is_dir())
        temporary.replace(link)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON with an indent of 2, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
