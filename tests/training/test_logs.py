"""Where a run's figures go: metrics.jsonl, Weights & Biases, TensorBoard."""

from __future__ import annotations

import os
import sys

import pytest

from prismo.training.logs import JsonLines, chart_name
from tests.training.conftest import train


def test_weights_and_biases_respects_the_users_mode(flags, tmp_path, monkeypatch):
    """The original forces offline mode after the user chose (defect 24)."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(flags(tmp_path, max_steps=1, wandb_project="mine")) == 0
    assert os.environ["WANDB_MODE"] == "offline"
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_weights_and_biases_that_refuses_stops_before_the_weights_are_read(flags, tmp_path, monkeypatch, errors):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the settings of a run before
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert train(flags(tmp_path, max_steps=1, wandb_project="mine")) == 2
    (record,) = errors.records
    assert record.exc_info is None
    assert "Weights & Biases: No API key configured" in record.message
    assert "WANDB_MODE=offline" in record.message
    assert not (tmp_path / "run" / "dataset_statistics.json").exists()
    wandb.teardown()


def test_a_damaged_log_does_not_stop_a_resumed_run(tmp_path):
    """Cut off, not UTF-8, or no entries at all: what is left of earlier steps is kept."""
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "split": "train", "loss": 0.5}'
    path.write_bytes(
        b"\n".join([good, b"\xff\xfe", b"[]", b"{}", b'{"step": "2"}', b'{"step": 5}', b'{"step": 2, "lo'])
    )
    JsonLines(path, 2).close()
    assert path.read_bytes() == good + b"\n"


def test_tensorboard(flags, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (the extra `tensorboard`)")
    before = "tensorflow" in sys.modules
    assert train(flags(tmp_path, max_steps=2, use_tensorboard=True, align_map_freq=1)) == 0
    assert ("tensorflow" in sys.modules) == before
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = file.read_bytes()
    assert content.count(b"VLA Train/Align Loss") == 2
    assert content.count(b"Align Cosine Map") == 2


def test_chart_names_are_the_originals():
    names = ("loss", "curr_action_l1_loss", "next_actions_l1_loss", "align_loss", "learning_rate")
    charts = ["Loss", "Curr Action L1 Loss", "Next Actions L1 Loss", "Align Loss", "Learning Rate"]
    assert [chart_name("train", name) for name in names] == [f"VLA Train/{chart}" for chart in charts]
    assert chart_name("val", "val_batches_count") == "VLA Val/Val Batches Count"
