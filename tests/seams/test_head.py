"""A new action head is one file and one line: it trains, is saved, recognised and run by the real commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from prismo.embodiment import LIBERO
from prismo.models.component_files import read_component
from prismo.models.heads import HEADS
from prismo.policies.base import PolicyInput
from prismo.policies.checkpoint import open_checkpoint
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from tests.training.conftest import DATASET, Flags, assert_same_state, metrics, train

# The file: a flow from noise to actions (arXiv 2210.02747), with a module of its own beside the head.
FLOW = """
from dataclasses import dataclass

import torch
from torch import nn

from prismo.models.heads import ActionHead, HeadLoss, masked_mean


@dataclass(frozen=True)
class FlowHead(ActionHead):
    action_head: nn.Linear
    flow_projector: nn.Linear

    title = "a flow head"
    mark = "weight"
    from_noise = True

    @classmethod
    def build(cls, sizes, shapes=None):
        return cls(nn.Linear(sizes.width, 1, bias=False), nn.Linear(1, sizes.width))

    def velocity(self, run, actions, time):
        states = run(self.flow_projector(actions.flatten(1)[..., None]), time[:, None, None].expand(-1, 1, 32))
        return self.action_head(states.float()).view_as(actions)

    def loss(self, run, actions, action_mask):
        noise, time = torch.randn_like(actions), torch.rand(len(actions), device=actions.device)
        mixed = torch.lerp(noise, actions, time[:, None, None])
        return HeadLoss(masked_mean((self.velocity(run, mixed, time) - (actions - noise)) ** 2, action_mask))

    def predict(self, run):
        actions = run.noise
        for step in range(run.steps):
            time = torch.full((len(actions),), step / run.steps)
            actions = actions + self.velocity(run, actions, time) / run.steps
        return actions
"""


@pytest.fixture
def flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, and its line in `HEADS`."""
    path = tmp_path / "flow.py"
    path.write_text(FLOW)
    spec = importlib.util.spec_from_file_location("flow", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(HEADS, "flow", module.FlowHead)


@pytest.mark.usefixtures("flow")
def test_a_head_is_one_file_and_one_line(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"action_head": "flow", "align_loss_coeff": 0, "batch_size": 1, "save_freq": 1, "keep_states": 2}
    arguments |= {"max_steps": 2, "diffusion_sample_freq": 2, "num_diffusion_steps_train": 3}
    assert train(flags(tmp_path, **arguments)) == 0
    assert "curr_action_l1_loss" in metrics(tmp_path / "run")[2], "measured by sampling"
    folder = tmp_path / "run--2_chkpt"
    first = read_component(tmp_path / "run--1_chkpt" / "flow_projector--1_checkpoint.pt")
    assert (read_component(folder / "flow_projector--2_checkpoint.pt")["weight"] != first["weight"]).any()
    uninterrupted = folder.rename(tmp_path / "uninterrupted")
    assert train(flags(tmp_path, resume=True, **arguments)) == 0
    assert_same_state(folder, uninterrupted)

    assert open_checkpoint(folder).head == "flow"
    policy = prepare_policy(PolicyFlags(pretrained_checkpoint=str(folder)), LIBERO, DATASET).load()
    picture = np.zeros((64, 64, 3), np.uint8)
    policy.start_episode(0, 0)
    actions = policy.predict([PolicyInput((picture, picture), np.zeros(8), "pick up the bowl")], [0])
    assert actions.shape == (1, 8, 7)
    assert np.isfinite(actions).all()

    (folder / "flow_projector--2_checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match="has no flow_projector"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match="--use_diffusion True, but its action_head file is a flow head"):
        prepare_policy(PolicyFlags(pretrained_checkpoint=str(uninterrupted), use_diffusion=True), LIBERO, DATASET)
    # Without the file and the line nothing knows it.
    monkeypatch.delitem(HEADS, "flow")
    with pytest.raises(ValueError, match="action_head"):
        open_checkpoint(uninterrupted)


def test_bad_heads_are_one_sentence(flags: Flags, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train(flags(tmp_path, action_head="l2")) == 2
    assert "Did you mean 'l1'" in caplog.text
    assert train(flags(tmp_path, action_head="discrete", use_l1_regression=False, use_diffusion=True)) == 2
    assert "exclude each other" in caplog.text
