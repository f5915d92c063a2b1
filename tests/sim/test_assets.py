"""Which assets are used, and the built-in stand-ins."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from prismo.sim import standins
from prismo.sim.assets import ASSETS_VARIABLE, CACHE_VARIABLE, STAND_INS, Assets, cache_folder, resolve_assets
from prismo.sim.interface import SimulatorError
from prismo.sim.libero_worker import LiberoWorker


def test_named_folder_wins_over_the_environment(
    tmp_path: Path, stand_ins: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    (other / "scenes").mkdir(parents=True)
    monkeypatch.setenv(ASSETS_VARIABLE, str(stand_ins.folder))
    assert resolve_assets().source == "folder"
    assert resolve_assets(other) == Assets(other, "folder")


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without LIBERO's assets."""
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no former download
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("nothing_installed")
def test_without_assets_the_error_says_what_to_type() -> None:
    with pytest.raises(FileNotFoundError, match=r"no LIBERO assets .*--libero_assets DIR.*--libero_assets stand-ins"):
        resolve_assets()


@pytest.mark.usefixtures("nothing_installed")
def test_stand_ins_are_used_where_that_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assets = resolve_assets(fallback=True)
    assert assets == resolve_assets(STAND_INS)
    assert assets.are_stand_ins
    assert "smoke runs only" in caplog.text


def test_a_download_that_fails_is_an_error(tmp_path: Path) -> None:
    program = "from prismo.sim.assets import resolve_assets; print(resolve_assets(download=True).source)"
    environment = os.environ | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop(ASSETS_VARIABLE, None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "the download of lerobot/libero-assets failed" in done.stderr
    assert "--libero_assets stand-ins" in done.stderr


@pytest.mark.parametrize("content", ["missing", "empty", "textures only"])
def test_wrong_folder_is_one_clear_error(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "assets"
    if content != "missing":
        folder.mkdir()
    if content == "textures only":
        (folder / "textures").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is not LIBERO's assets folder: expected .*scenes.*, found"):
        resolve_assets(folder)


def test_missing_asset_file_is_an_error_not_a_hang(tmp_path: Path, stand_ins: Assets) -> None:
    """LIBERO's own reset would try again for ever."""
    folder = tmp_path / "assets"
    shutil.copytree(stand_ins.folder, folder)
    (folder / "stable_hope_objects" / "milk" / "milk.xml").unlink()
    with LiberoWorker(resolve_assets(folder), cameras=False) as worker:
        worker.reset_timeout = 120.0
        with pytest.raises(SimulatorError, match=r"could not build libero_object task 7.*milk\.xml"):
            worker.reset("libero_object", 7, 0)
        worker.reset("libero_object", 8, 0)  # that scene has no milk; the process is still good
        assert worker.pid is not None


def test_stand_ins_say_what_they_do_not_cover(blind_worker: LiberoWorker) -> None:
    with pytest.raises(SimulatorError, match=r"stand-ins cover libero_object only.*PRISMO_LIBERO_ASSETS"):
        blind_worker.reset("libero_goal", 0, 0)


def test_stand_ins_are_the_same_bytes_every_time(tmp_path: Path, stand_ins: Assets) -> None:
    standins.write(tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(stand_ins.folder) for p in stand_ins.folder.rglob("*") if p.is_file())
    assert all((tmp_path / f).read_bytes() == (stand_ins.folder / f).read_bytes() for f in files)
    assert sum((tmp_path / f).stat().st_size for f in files) < 500_000


@pytest.mark.parametrize("path", standins.OBJECTS)
def test_stand_ins_have_the_size_of_the_originals(path: str, stand_ins: Assets, libero_assets: Assets) -> None:
    file = Path(path) / f"{Path(path).name}.xml"
    ours, original = _extent(stand_ins.folder / file), _extent(libero_assets.folder / file)
    assert np.abs(ours - original).max() < 0.008  # m; the basket's walls lean outwards in the original
    sites = [{s.get("name") for s in ET.parse(a.folder / file).iter("site")} for a in (stand_ins, libero_assets)]
    assert sites[0] == sites[1]


def _extent(xml: Path) -> np.ndarray:
    """Bounding box [2, 3] of the colliding geoms."""
    corners = []
    for geom in ET.parse(xml).iter("geom"):
        if geom.get("group") != "0":
            continue
        w, x, y, z = _normal(geom.get("quat", "1 0 0 0"))
        axes = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        size = np.array(geom.get("size").split(), dtype=float)
        if geom.get("type") == "cylinder":
            size = np.array([size[0], size[0], size[1]])
        center = np.array(geom.get("pos").split(), dtype=float)
        corners += [center - np.abs(axes) @ size, center + np.abs(axes) @ size]
    return np.array([np.min(corners, axis=0), np.max(corners, axis=0)])


def _normal(text: str) -> np.ndarray:
    quat = np.array(text.split(), dtype=float)
    return quat / np.linalg.norm(quat)


def test_cache_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    if os.getuid() == 0:
        os.chown(tmp_path / "cache", 12345, -1)
        with pytest.raises(PermissionError, match=CACHE_VARIABLE):
            cache_folder()
