"""A backend is chosen because it has drawn something, and GPUs are found by their CUDA number."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from prismo.sim import gl


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    gl.choose_backend.cache_clear()
    yield
    gl.choose_backend.cache_clear()


def test_chosen_backend_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "prismo.sim.gl"):
        backend = gl.choose_backend()
        assert gl.choose_backend() is backend  # probed once
    assert [record.getMessage() for record in caplog.records] == [f"rendering with {backend}"]
    assert backend.environment()["MUJOCO_GL"] == backend.name
    assert backend.environment()["CUDA_VISIBLE_DEVICES"] is None


def test_osmesa_takes_over_where_egl_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # What a container without the driver's EGL looks like: the loader finds no vendor.
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", str(tmp_path / "none.json"))
    with caplog.at_level(logging.INFO, "prismo.sim.gl"):
        assert gl.choose_backend().name == "osmesa"
    assert "after egl" in caplog.text
    monkeypatch.setenv("MUJOCO_GL", "egl")
    gl.choose_backend.cache_clear()
    with pytest.raises(gl.GLUnavailableError, match="apt-get install"):
        gl.choose_backend()


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
