"""Teachers by name, and what they are before their weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prismo.align import TEACHERS, TeacherKind, TeacherSizes, load_teacher, teacher_sizes
from prismo.align.vggt import VGGTAggregator, read_config

VGGT_1B = TeacherSizes(width=2048, layers=24, parameters=909_112_320)


def size(teacher: nn.Module) -> int:
    return sum(parameter.numel() for parameter in teacher.parameters())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ["vggt", "random"])
def test_outline_is_that_of_the_loaded_teacher(name, suffix, vggt_file, vggt_state, teacher, tmp_path):
    path = vggt_file
    if suffix == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(vggt_state, path)
    loaded = load_teacher(name, path)
    expected = TeacherSizes(loaded.width, loaded.layers, size(loaded))
    assert teacher_sizes(name, path) == expected == TeacherSizes(128, 3, size(teacher))


def test_the_control_arm_needs_no_file(tmp_path, caplog):
    """VGGT's five gigabytes would be read for four numbers that are known."""
    caplog.set_level("INFO")
    assert teacher_sizes("random") == VGGT_1B
    assert not caplog.records
    assert teacher_sizes("random", tmp_path / "model.pt") == VGGT_1B
    assert "sizes of VGGT-1B" in caplog.text


class Patches(nn.Module):
    """A teacher that nobody described."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.layers = 12, 2
        self.line = nn.Linear(3, 12, bias=False)

    def features(self, images: Tensor, layer: int, view_mask: Tensor | None = None) -> Tensor:
        return self.line(images.movedim(2, -1)[:, :, ::14, ::14])


def load_patches(path: str | Path | None, *, dtype: torch.dtype, device: str | torch.device, compile: bool) -> Patches:
    return Patches().to(device, dtype)


def test_a_plain_loader_is_described_as_well(monkeypatch):
    monkeypatch.setitem(TEACHERS, "patches", TeacherKind(load_patches, "patches", None))
    assert teacher_sizes("patches") == TeacherSizes(12, 2, 36)


@pytest.mark.parametrize(
    "content", [b"", b"just text\n", b"PK\x03\x04 no zip", b"\x80\x02}q\x00.", bytes(100), b"hello" * 9999]
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "txt"])
def test_a_file_that_is_no_vggt(tmp_path, content, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}.*(fetch the file again|is not a VGGT checkpoint)"):
        read_config(path)


def test_sizes_are_read_without_weights(vggt_file):
    outlined = load_teacher("vggt", vggt_file, device="meta")
    assert isinstance(outlined, VGGTAggregator)
    assert {parameter.device.type for parameter in outlined.parameters()} == {"meta"}
