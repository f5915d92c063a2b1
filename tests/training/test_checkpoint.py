"""Damaged trainer states and training_config.json: one error each, before weights are read or anything changes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prismo.training.checkpoint import DataPosition, TrainerState, gather_state, load_state, save_state
from prismo.training.distributed import World
from prismo.training.objective import Losses
from prismo.training.run_folder import RunFolder
from prismo.training.step import TrainStep
from tests.training.conftest import train

WEIGHTS, OPTIMIZER, STATE = (
    f"trainer_state/{name}" for name in ("weights.safetensors", "optimizer.safetensors", "state.json")
)
CONFIG = "training_config.json"
MATRIX = "vla.language_model.model.layers.0.mlp.down_proj.lora_A.default.weight"


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory) -> Path:
    """The root of a run after one update; do not change it."""
    root = tmp_path_factory.mktemp("stopped")
    assert train(flags(root, max_steps=1, batch_size=1)) == 0
    return root


def tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        values = {key: value.clone() for key, value in load_file(checkpoint / name).items()}
        change(values)
        save_file(values, checkpoint / name)

    return damage


def put(name: str, key: str, value: Tensor) -> Callable[[Path], None]:
    return tensors(name, lambda values: values.update({key: value}))


def written(name: str, **values: object) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:size])


DAMAGES = {
    "another shape": (put(OPTIMIZER, f"exp_avg.{MATRIX}", torch.zeros(3)), "exp_avg."),  # segfault in the fused kernel
    "no shape": (put(OPTIMIZER, f"exp_avg.{MATRIX}", torch.zeros(())), "exp_avg."),
    "another type": (put(OPTIMIZER, f"exp_avg_sq.{MATRIX}", torch.zeros(3, dtype=torch.int64)), "exp_avg_sq."),
    "half precision": (tensors(WEIGHTS, lambda t: t.update({MATRIX: t[MATRIX].bfloat16()})), "is BF16"),
    "update count": (put(OPTIMIZER, f"step.{MATRIX}", torch.zeros(3)), "step."),
    "updates": (put(OPTIMIZER, f"step.{MATRIX}", torch.tensor(float("nan"))), "was updated nan times in 1 updates"),
    "infinite moment": (tensors(OPTIMIZER, lambda t: t[f"exp_avg_sq.{MATRIX}"].fill_(torch.inf)), "is not finite"),
    "missing moment": (tensors(OPTIMIZER, lambda t: t.pop(f"exp_avg.{MATRIX}")), f"exp_avg.{MATRIX} is missing"),
    "no moments": (tensors(OPTIMIZER, dict.clear), "is missing"),
    "unknown tensor": (put(WEIGHTS, "zzz", torch.zeros(3)), "zzz"),
    "cut weights": (cut(WEIGHTS, 5000), "missing or broken"),
    "empty moments": (cut(OPTIMIZER, 0), "missing or broken"),
    "no weights": (lambda checkpoint: (checkpoint / WEIGHTS).unlink(), "missing or broken"),
    "position": (written(STATE, data=None), "data"),
    "no position": (written(STATE, data={"epoch": 0}), "data.sample is missing"),
    "position behind the epoch": (written(STATE, data={"epoch": 0, "sample": 10**6}), "sample 1000000 of an epoch"),
    "endless epoch": (written(STATE, data={"epoch": 10**30, "sample": 0}), "data.epoch"),
    "version": (written(STATE, format=2), "of another version"),
    "processes": (written(STATE, world_size="2"), "world_size"),
    "fingerprint": (written(STATE, base_fingerprint=None), "base_fingerprint"),
    "base": (written(CONFIG, vla_path=None), "vla_path"),
    "recipe": (written(CONFIG, align_recipe="paper"), "align_recipe"),
    "cut config": (cut(CONFIG, 40), "not valid JSON"),
    "no config": (lambda checkpoint: (checkpoint / CONFIG).unlink(), "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(flags, stopped, tmp_path, caplog, damage):
    shutil.copytree(stopped, tmp_path / "root")
    checkpoint = RunFolder(tmp_path / "root" / "run").step_folder(1)
    change, message = DAMAGES[damage]
    change(checkpoint)
    caplog.set_level(logging.ERROR)
    assert train(flags(tmp_path / "root", max_steps=2, batch_size=1, resume=True)) == 2
    (record,) = caplog.records
    assert record.exc_info is None
    assert message in caplog.text
    assert str(checkpoint) in caplog.text
    # The epoch's length is known when the data are open, moments are read behind the model.
    weights_were_read = "position behind" in damage or "infinite" in damage
    assert weights_were_read or not list((tmp_path / "root" / "run").glob("dataset_statistics.json.*"))


def test_other_alignment_is_named_by_its_flags(flags, stopped, caplog):
    """The recipe is no flag; its fields are."""
    caplog.set_level(logging.ERROR)
    assert train(flags(stopped, max_steps=2, resume=True, vla_layers_align=1, use_vlm_norm=False)) == 2
    assert "--vla_layers_align 2 -> 1; --use_vlm_norm True -> False. Resume with the old values" in caplog.text
    assert "align_recipe" not in caplog.text
    caplog.clear()
    assert train(flags(stopped, max_steps=2, resume=True, align_loss_coeff=0)) == 2
    assert "--align_loss_coeff 0.5 -> 0. Resume" in caplog.text


def test_the_robot_is_recorded(stopped):
    stored = json.loads((RunFolder(stopped / "run").step_folder(1) / CONFIG).read_text())
    assert stored["embodiment"] == {
        "name": "libero", "action_dim": 7, "proprio_dim": 8, "chunk": 8, "normalization": "bounds_q99",
        "control_hz": 20.0, "gripper_dims": [-1], "gripper_env_sign": -1,
        "cameras": ["agentview", "robot0_eye_in_hand"], "states": ["eef_pos", "eef_axis_angle", "gripper_qpos"],
    }  # fmt: skip


class Line(nn.Module):
    """Two weights to train."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.line = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Losses:
        return Losses(self.line(x).square().mean(), {})


@pytest.mark.parametrize("file", ["weights", "optimizer"])
def test_nothing_is_touched_by_a_state_that_does_not_fit(tmp_path, file):
    world = World(0, 1, torch.device("cpu"))
    before, other = TrainStep(Line(), world), TrainStep(Line(4), world)
    for step, width in ((before, 3), (other, 4)):
        step([torch.ones(1, width)], 0, 0.1)
    save_state(tmp_path, gather_state(before), TrainerState(1, DataPosition(0, 1), 1, ""))
    if file == "optimizer":  # only the moments are of another model
        save_file(gather_state(other).optimizer, tmp_path / "trainer_state" / "optimizer.safetensors")
    fresh = TrainStep(Line(4 if file == "weights" else 3), world)
    untouched = {name: value.clone() for name, value in fresh.objective.state_dict().items()}
    with pytest.raises(ValueError, match=r"line\.weight is F32 \[1, [34]\], expected F32 \[1, [34]\]"):
        load_state(tmp_path, fresh)
    assert all(torch.equal(value, untouched[name]) for name, value in fresh.objective.state_dict().items())
