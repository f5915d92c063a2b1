"""A teacher is one file and one line: described before it is loaded, trained with, named with its licence."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from prismo.align import TEACHERS, TeacherKind, TeacherSizes, teacher_sizes
from prismo.merging.card import model_card
from tests.training.conftest import Flags, metrics, train

# The file: colours of patches, through a fixed linear layer.
MODULE = """
import torch
from torch import nn


class Colours(nn.Module):
    width, layers = 12, 1

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 12, bias=False)

    def features(self, images, layer, view_mask=None):
        return self.line(images.movedim(2, -1)[:, :, ::14, ::14])


def load_colours(path, *, dtype, device, compile):
    return Colours().to(device, dtype)
"""


def test_a_teacher_is_one_file_and_one_line(
    flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "colours.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    load = importlib.import_module("colours").load_colours
    sizes = TeacherSizes(width=12, layers=1, parameters=36)
    monkeypatch.setitem(TEACHERS, "colours", TeacherKind(load, "colours", "mit", sizes))  # the line
    assert teacher_sizes("colours") is sizes

    run = flags(tmp_path, teacher="colours", max_steps=2, batch_size=1, vggt_path="unused.pt")
    assert train([*run, "--vggt_layers_align", "1"]) == 2
    assert "the teacher has 1 layers" in caplog.text
    assert train([*run, "--dry_run"]) == 0
    assert f"teacher (frozen)  {36:>15,}" in capsys.readouterr().out
    assert train(run) == 0
    assert metrics(tmp_path / "run")[2]["align_loss"] > 0
    checkpoint = tmp_path / "run--2_chkpt"
    assert json.loads((checkpoint / "training_config.json").read_text())["teacher_license"] == "mit"
    assert "(`colours`). Its weights are not in here; look at its own licence (mit)" in model_card(
        "base", "openvla", checkpoint, 4, "somewhere"
    )
