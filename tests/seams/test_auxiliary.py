"""An auxiliary loss is one file and one line: a run that names it trains, logs, saves and restores it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prismo.align.auxiliary import AUXILIARIES
from prismo.commands import main
from prismo.models.component_files import read_component
from tests.training.conftest import Flags, assert_same_state, metrics, state

# The file: the mean brightness of each picture, read off its vision tokens.
MODULE = """
import torch
from torch import nn

from prismo.align.auxiliary import Auxiliary


class Brightness(Auxiliary):
    layers = (1, -1)

    def __init__(self, hidden_size):
        super().__init__()
        self.reader = nn.Linear(2 * hidden_size, 1)

    @classmethod
    def from_flags(cls, flags, hidden_size, device):
        return cls(hidden_size).to(device)

    def loss(self, seen, *, with_map):
        assert seen.hidden.keys() >= set(self.layers)
        vision = slice(seen.start, seen.start + seen.count)
        states = [nn.functional.normalize(seen.hidden[layer][:, vision], dim=-1) for layer in self.layers]
        guess = self.reader(torch.cat(states, -1)).unflatten(1, (seen.images.shape[1], -1))
        error = (guess.mean(dim=(2, 3)) - seen.images.mean(dim=(2, 3, 4))).square().mean()
        return 0.1 * error, {"brightness_error": error.detach()}, None

    def components(self):
        return {"brightness_reader": self.reader}
"""


@pytest.fixture(autouse=True)
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, and its line in `AUXILIARIES`."""
    (tmp_path / "brightness_loss.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(AUXILIARIES, "brightness", "brightness_loss:Brightness")


@pytest.mark.parametrize("command", ["finetune", "train"])
def test_an_auxiliary_loss_is_one_file_and_one_line(
    command: str, flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `finetune` it is the only one, with `train` it stands beside the alignment."""
    run = flags(tmp_path, max_steps=2, batch_size=1, save_freq=1, keep_states=2, auxiliaries="brightness")
    if command == "finetune":
        pairs, foreign = zip(run[::2], run[1::2], strict=True), ("--vggt", "--vla_layers", "--use_v", "--align")
        run = [word for pair in pairs for word in pair if not pair[0].startswith(foreign)]
    assert main([command, *run, "--dry_run"]) == 0
    assert "  brightness_reader" in capsys.readouterr().out
    assert main([command, *run]) == 0
    logged = metrics(tmp_path / "run")[2]
    assert logged["brightness_error"] > 0
    assert ("align_loss" in logged) == (command == "train")

    folder = tmp_path / "run--2_chkpt"
    files = [read_component(tmp_path / f"run--{n}_chkpt" / f"brightness_reader--{n}_checkpoint.pt") for n in (1, 2)]
    assert (files[0]["weight"] != files[1]["weight"]).any()
    weights = state(folder)
    assert (weights["weights:brightness.reader.weight"] == files[1]["weight"]).all()
    uninterrupted = folder.rename(tmp_path / "uninterrupted")
    assert main([command, *run, "--resume"]) == 0
    assert_same_state(folder, uninterrupted)


def test_wrong_names_are_one_sentence(flags: Flags, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["train", *flags(tmp_path, auxiliaries="brightness,darkness")]) == 2
    assert "unknown value of --auxiliaries 'darkness'" in caplog.text
    assert "Available: brightness" in caplog.text
    assert main(["train", *flags(tmp_path, max_steps=1, batch_size=1, save_freq=1, auxiliaries="brightness")]) == 0
    assert main(["train", *flags(tmp_path, max_steps=2, resume=True)]) == 2
    assert "--auxiliaries brightness -> None" in caplog.text
