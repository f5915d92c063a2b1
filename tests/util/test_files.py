"""The old content or the new one, whole, whatever happens in between."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prismo.util import files
from prismo.util.files import atomic_folder, atomic_write, write_json


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "b").mkdir()
        (temporary / "b" / "c").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


OLD, NEW = ({"a": text, "b/c": text} for text in ("old", "new"))


@pytest.fixture(params=["exchange", "two renames"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to replace a folder; file systems such as NFS have only the second."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"grüße": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"grüße": 1}

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert json.loads(path.read_text()) == {"grüße": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("_way")
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    fill(folder, "old")
    assert content(folder) == OLD

    def write_half() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert content(folder) == OLD
    fill(folder, "new")
    assert content(folder) == NEW
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exchange there are two renames: the old folder aside, the new one into its place."""
    folder = tmp_path / "data"
    fill(folder, "old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    replace, calls = Path.replace, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise OSError("the disk went away")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="the disk went away"):
            fill(folder, "new")
    assert content(folder) == OLD
    assert list(tmp_path.iterdir()) == [folder]


KILLED = """
import os, pathlib, sys
from prismo.util import files
files._exchange = lambda one, other: False
replace = pathlib.Path.replace
def die_at_the_second(self, target):
    if ".old." not in str(target):
        os._exit(9)
    return replace(self, target)
with files.atomic_folder(sys.argv[1]) as temporary:
    (temporary / "a").write_text("new")
    pathlib.Path.replace = die_at_the_second
"""


def test_the_old_folder_comes_back_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    fill(folder, "old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False).returncode == 9
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder):
        raise KeyboardInterrupt  # the next attempt comes to nothing, either
    assert content(folder) == OLD


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_files_have_the_modes_of_the_user_s_mask(tmp_path: Path) -> None:
    """As if made with open(): colleagues of a shared folder can read them, others only if the user wants it."""
    write_json(tmp_path / "x.json", 1)
    fill(tmp_path / "data", "new")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.json", "data", "data/a")]
    assert modes == [0o640, 0o750, 0o640]


@pytest.mark.usefixtures("_way")
def test_several_at_once(tmp_path: Path) -> None:
    """The last one wins; nobody sees a mixture, nothing is left over."""
    path, folder = tmp_path / "x.json", tmp_path / "data"
    errors: list[Exception] = []

    def work(name: int) -> None:
        try:
            for _ in range(5):
                write_json(path, [name] * 1000)
                if name == 0:  # folders have one writer at a time (`prismo.util.locks`), but any number of readers
                    fill(folder, "x" * 1000)
                elif folder.exists():
                    assert set(content(folder).values()) <= {"x" * 1000}
                assert len(set(json.loads(path.read_text()))) == 1
        except FileNotFoundError:  # a reader between two listings
            pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(tmp_path.iterdir()) == [folder, path]
