"""A backend is chosen because it has drawn something, and GPUs are found by their CUDA number."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from prismo.sim import gl

# Python runs a module of this name when it starts: here libraries load, but for OSMesa, wherever it is installed.
NO_OSMESA = """
import ctypes, ctypes.util
find, load = ctypes.util.find_library, ctypes.CDLL.__init__
ctypes.util.find_library = lambda name: None if "OSMesa" in name else find(name)
def forgetful(self, name, *args, **kwargs):
    if "OSMesa" in str(name):
        raise OSError(f"{name}: cannot open shared object file")
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = forgetful
"""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    gl.choose_backend.cache_clear()
    yield
    gl.choose_backend.cache_clear()


@pytest.fixture
def no_egl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a container without the driver's EGL looks like: the loader finds no vendor."""
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", str(tmp_path / "none.json"))


@pytest.fixture
def egl() -> None:
    if not gl.egl_devices():
        pytest.skip("needs EGL (Debian and Ubuntu: libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0)")


@pytest.mark.usefixtures("drawing")
def test_chosen_backend_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "prismo.sim.gl"):
        backend = gl.choose_backend()
        assert gl.choose_backend() is backend  # probed once
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"rendering with {backend}")
    assert ("after egl: " in line) == (backend.name == "osmesa")
    assert backend.environment()["MUJOCO_GL"] == backend.name
    assert backend.environment()["CUDA_VISIBLE_DEVICES"] is None


@pytest.mark.usefixtures("osmesa", "no_egl")
def test_osmesa_takes_over_where_egl_is_broken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "prismo.sim.gl"):
        assert gl.choose_backend().name == "osmesa"
    assert "after egl" in caplog.text


@pytest.mark.usefixtures("no_egl")
def test_what_to_type_where_nothing_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(gl.GLUnavailableError, match="apt-get install"):
        gl.choose_backend()


def test_a_library_that_is_not_installed_is_called_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyOpenGL says "'NoneType' object has no attribute 'glGetError'"."""
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    (tmp_path / "sitecustomize.py").write_text(NO_OSMESA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(gl.GLUnavailableError, match="osmesa: its library, or one that it needs, is not installed"):
        gl.choose_backend()


@pytest.mark.usefixtures("egl")
def test_impossible_egl_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    with pytest.raises(gl.GLUnavailableError, match="MUJOCO_EGL_DEVICE_ID=99: EGL has devices 0 to"):
        gl.choose_backend()


@pytest.mark.parametrize(
    ("visible", "local", "physical"),
    [(None, 1, 1), ("", 1, 1), ("3,1", 0, 3), ("3,1", 1, 1), ("3", 1, None), ("GPU-6c1d", 0, None)],
)
def test_cuda_visible_devices_is_undone(
    visible: str | None, local: int, physical: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gl.physical_cuda_index(local) == physical


def test_wanted_gpu_first_then_other_gpus_then_software() -> None:
    ordinals = [2, 0, None, 1]  # EGL's order is not CUDA's
    assert gl.candidate_order(ordinals, 0) == [1, 0, 3, 2]
    assert gl.candidate_order(ordinals, 2) == [0, 1, 3, 2]
    assert gl.candidate_order(ordinals, None) == [0, 1, 3, 2]
    assert gl.candidate_order([None], 0) == [0]
