"""Simulators for these tests: real ones. Scenes are the built-in stand-ins unless a test needs LIBERO's own assets."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prismo.sim.assets import ASSETS_VARIABLE, STAND_INS, Assets, cache_folder, resolve_assets
from prismo.sim.gl import GLBackend, GLUnavailableError, choose_backend
from prismo.sim.libero_worker import LiberoWorker
from prismo.util.files import atomic_folder

BESIDE = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="session")
def stand_ins() -> Assets:
    return resolve_assets(STAND_INS)


@pytest.fixture(scope="session")
def libero_assets() -> Assets:
    """LIBERO's own assets: the folder of PRISMO_LIBERO_ASSETS, or what lies beside the repository."""
    folder = os.environ.get(ASSETS_VARIABLE)
    if folder and folder != STAND_INS:
        return resolve_assets(folder)
    archive = BESIDE / "libero_assets.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs LIBERO's assets: set {ASSETS_VARIABLE} to their folder")
    unpacked = cache_folder() / f"test-assets-{archive.stat().st_size}"
    if not unpacked.is_dir():
        with atomic_folder(unpacked) as temporary, tarfile.open(archive) as file:
            file.extractall(temporary, filter="data")
    return resolve_assets(unpacked)


@pytest.fixture
def osmesa(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where OSMesa can draw; the choice of what draws is open again."""
    choose_backend.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("MUJOCO_GL", "osmesa")
        try:
            choose_backend()
        except GLUnavailableError:
            pytest.skip("needs OSMesa, the fallback of EGL (Debian and Ubuntu: libosmesa6)")
        finally:
            choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


@pytest.fixture(scope="session")
def worker(stand_ins: Assets, drawing: GLBackend) -> Iterator[LiberoWorker]:
    """A simulator with cameras; tests leave it usable."""
    with LiberoWorker(stand_ins, image_size=64) as shared:
        yield shared


@pytest.fixture(scope="session")
def blind_worker(stand_ins: Assets) -> Iterator[LiberoWorker]:
    """A simulator without cameras."""
    with LiberoWorker(stand_ins, cameras=False) as shared:
        yield shared
