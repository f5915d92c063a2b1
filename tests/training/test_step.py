"""One update: accumulation, precision of the trained weights, refusal of non-finite gradients, noise."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prismo.embodiment import LIBERO
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticImageProcessor
from prismo.models.openvla.processing import SPACE_ID, STOP_ID, TextBatch, pad_rows
from prismo.models.random_weights import fill_random
from prismo.testing.tiny import tiny_openvla_config
from prismo.training.build import recompute_activations
from prismo.training.config import FinetuneConfig
from prismo.training.distributed import World
from prismo.training.objective import Losses
from prismo.training.openvla_objective import OpenVLAInputs, OpenVLAObjective, build_openvla_objective, openvla_inputs
from prismo.training.optim import GuardedAdamW
from prismo.training.step import TrainStep, trainable_parameters

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny_objective() -> OpenVLAObjective:
    """Read-only; copy it before training."""
    torch.manual_seed(0)
    vla = OpenVLAForActionPrediction(tiny_openvla_config())
    fill_random(vla, 0)
    return build_openvla_objective(vla, LIBERO, FinetuneConfig(use_proprio=True, lora_rank=4))


def batch(samples: slice, dtype: torch.dtype = torch.float32) -> OpenVLAInputs:
    """Some of four fixed samples, whose prompts all have the same length."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 3, 224, 224), dtype=torch.uint8, generator=random)
    actions = torch.rand(4, 8, 7, generator=random) * 2 - 1
    rows = [([1, 500 + i, 600, SPACE_ID], [*range(31800, 31856), STOP_ID]) for i in range(4)]
    text = pad_rows(rows, 32000)
    return openvla_inputs(
        images[samples],
        TextBatch(text.input_ids[samples], None, text.labels[samples]),
        actions[samples],
        processor=PrismaticImageProcessor(),
        size=224,
        device=ALONE.device,
        dtype=dtype,
        proprio=torch.linspace(-1, 1, 32).view(4, 8)[samples],
    )


def test_two_micro_batches_equal_one_double_batch(tiny_objective):
    whole = TrainStep(copy.deepcopy(tiny_objective), ALONE)
    parts = TrainStep(copy.deepcopy(tiny_objective), ALONE, accumulation=2)
    for done in range(3):
        one = whole([batch(slice(0, 4))], done, 1e-3)
        two = parts([batch(slice(0, 2)), batch(slice(2, 4))], done, 1e-3)
        assert two.metrics["loss"].item() == pytest.approx(one.metrics["loss"].item(), rel=1e-5)
        assert two.grad_norm.item() == pytest.approx(one.grad_norm.item(), rel=1e-4)


def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny_objective):
    results = []
    for recompute in (False, True):
        objective = copy.deepcopy(tiny_objective)
        if recompute:
            recompute_activations(objective.vla)
        calls: list[nn.Module] = []
        towers = objective.vla.vision_backbone.towers
        for block in (objective.vla.language_model.model.layers[1].mlp, towers[0].blocks[1].mlp):
            block.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module))
        result = TrainStep(objective, ALONE)([batch(slice(0, 2))], 0, 1e-3)
        results.append((len(calls), result.grad_norm.item()))
    assert results[0][0] == 2
    assert results[1][0] == 4
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_too_few_micro_batches(tiny_objective):
    step = TrainStep(copy.deepcopy(tiny_objective), ALONE, accumulation=2)
    with pytest.raises(ValueError, match="expected 2 micro-batches, got 1"):
        step([batch(slice(0, 1))], 0, 1e-3)


def test_trained_weights_and_moments_are_fp32_on_a_bf16_base():
    """The original keeps adapters, head and AdamW's moments in bf16, where small updates vanish (defect 3)."""
    torch.manual_seed(0)
    vla = OpenVLAForActionPrediction(tiny_openvla_config()).to(torch.bfloat16)
    fill_random(vla, 0)
    objective = build_openvla_objective(vla, LIBERO, FinetuneConfig(use_proprio=True, lora_rank=4), autocast=True)
    step = TrainStep(objective, ALONE, precision=torch.bfloat16)
    frozen = {p.dtype for name, p in objective.named_parameters() if not p.requires_grad and "lora" not in name}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in step.optimizer.parameters} == {torch.float32}
    head = objective.action_head.model.fc2.weight
    before = head.detach().clone()
    step([batch(slice(0, 2), torch.bfloat16)], 0, 1e-6)  # 1e-6 is far below half a bf16 step of these weights
    assert {value.dtype for value in step.optimizer.state().values()} == {torch.float32}
    assert (head != before).float().mean() > 0.9


def test_moments_decay_and_weight_decay_acts():
    """In bf16 the second moment can only grow and weight decay rounds away (defect 3)."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = GuardedAdamW({"w": weight}, weight_decay=0.01)
    weight.grad = torch.full((4,), 0.5)
    optimizer.step(1e-4)
    grown = optimizer.state()["exp_avg_sq.w"].clone()
    after = weight.detach().clone()
    for _ in range(2000):
        weight.grad = torch.zeros(4)
        optimizer.step(0.0)
    assert (optimizer.state()["exp_avg_sq.w"] < 0.2 * grown).all()
    weight.grad = torch.zeros(4)
    optimizer.adamw.state[weight]["exp_avg"].zero_()
    optimizer.step(5e-4)
    assert torch.allclose(weight, after * (1 - 5e-4 * 0.01), rtol=0, atol=1e-7)
    assert (weight != after).all()


class Scalar(nn.Module):
    """loss = mean of weight * x; x may be anything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> Losses:
        total = (self.weight * x).mean()
        return Losses(total, {"loss": total.detach()})


def test_non_finite_gradient_is_never_applied():
    step = TrainStep(Scalar(), ALONE)
    good, bad = torch.arange(3.0), torch.tensor([1.0, float("nan"), 1.0])
    assert not step([good], 0, 0.1).refused
    weight = step.objective.weight.detach().clone()
    moments = {name: value.clone() for name, value in step.optimizer.state().items()}
    assert step([bad], 1, 0.1).refused
    assert step([good], 2, 0.1).refused  # the weights stay those of the last good update
    assert torch.equal(step.objective.weight, weight)
    assert all(torch.equal(value, moments[name]) for name, value in step.optimizer.state().items())


class Absolute(Scalar):
    """A loss that can be NaN while its gradient is 0."""

    def forward(self, x: torch.Tensor) -> Losses:
        total = (self.weight - x).abs().mean()
        return Losses(total, {"loss": total.detach()})


def test_non_finite_loss_with_a_finite_gradient_is_refused():
    step = TrainStep(Absolute(), ALONE)
    assert not step([torch.zeros(3)], 0, 0.1).refused
    weight = step.objective.weight.detach().clone()
    assert step([torch.full((3,), float("nan"))], 1, 0.1).refused
    assert torch.equal(step.objective.weight, weight)


def test_gradients_are_clipped():
    step = TrainStep(Scalar(), ALONE, max_grad_norm=1.0)
    result = step([torch.full((3,), 1e4)], 0, 0.1)
    assert result.grad_norm.item() == pytest.approx(1e4 / 3**0.5)
    first = step.optimizer.state()["exp_avg.weight"]
    assert first.norm().item() == pytest.approx(0.1, rel=1e-3)  # (1 - beta1) * clipped gradient of norm 1


def test_low_precision_or_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="fp32"):
        trainable_parameters(nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="nothing to train"):
        trainable_parameters(nn.Linear(2, 2).requires_grad_(False))


class Noisy(nn.Module):
    """A loss that shows what the generator drew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Losses:
        return Losses((self.weight * x).sum(), {"noise": torch.rand(())})


def test_noise_depends_on_seed_update_and_process_only():
    def draw(rank: int, done: int, seed: int = 7) -> float:
        torch.rand(5)  # whatever happened before
        step = TrainStep(Noisy(), ALONE, seed=seed)
        step.world = World(rank, 2, ALONE.device)
        return step([torch.ones(1)], done, 0.1).metrics["noise"].item()

    assert draw(0, 5) == draw(0, 5)
    assert len({draw(0, 5), draw(1, 5), draw(0, 6), draw(0, 5, seed=8)}) == 4


@pytest.mark.processes
def test_benchmark_script_measures_our_step(tmp_path, monkeypatch, capsys):
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench_train.py"
    results = tmp_path / "bench.jsonl"
    arguments = ["--tiny", "--steps", "2", "--warmup", "1", "--batch_size", "1", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    row = json.loads(results.read_text())
    assert row["samples_per_s"] == pytest.approx(1 / row["step_s"])
    assert row["vggt_s"] > 0
    assert "| CPU, batch 1, 2 images, VGGT float32, tiny | 1 |" in capsys.readouterr().out
