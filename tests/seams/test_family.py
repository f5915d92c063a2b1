"""A model family is one file and one line: described, merged and loaded by code that knows nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prismo import families
from prismo.commands import main
from prismo.data.synthetic import write_synthetic_libero
from prismo.embodiment import LIBERO
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from prismo.testing.tiny import make_tiny_openvla

DATASET = "libero_spatial_no_noops"
FILE = """
import dataclasses

import numpy as np

from prismo.families.openvla import FAMILY as OPENVLA
from prismo.policies.base import PolicyFamily
from prismo.policies.settings import resolve_settings


class Still:
    def __init__(self, robot):
        self.robot = robot

    def predict(self, inputs, slots):
        return np.zeros((len(inputs), self.robot.chunk, self.robot.action_dim))


POLICY = PolicyFamily(resolve_settings, lambda checkpoint, settings, robot, *, device, dtype: Still(robot))
FAMILY = dataclasses.replace(
    OPENVLA,
    model_type="dummy",
    alias="dum",
    title="Dummy",
    marker="dummy.json",
    flags=OPENVLA.flags | {"use_tail"},
    policy="dummy_family:POLICY",
)
"""


def renamed(base: Path, model_type: str) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": model_type}))


def test_a_family_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_tiny_openvla(tmp_path / "base")
    write_synthetic_libero(tmp_path / "data", DATASET, episodes=3, steps=10, image_size=64)
    run = ["--vla_path", str(base), "--data_root_dir", str(tmp_path / "data"), "--dataset_name", DATASET]
    run += ["--run_root_dir", str(tmp_path / "runs"), "--run_id_override", "run", "--max_steps", "1"]
    run += ["--batch_size", "1", "--num_workers", "0", "--lora_rank", "2", "--merge_lora_during_training", "False"]
    assert main(["finetune", *run]) == 0
    checkpoint = tmp_path / "runs" / "run--1_chkpt"

    (tmp_path / "dummy_family.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(families.FAMILIES, "dummy", "dummy_family")  # the line
    run[run.index("run")] = "another"
    assert main(["finetune", *run, "--use_tail"]) == 2
    assert "is of OpenVLA; leave out --use_tail True (only for Dummy)" in caplog.text
    renamed(base, "dummy")
    assert main(["finetune", *run, "--min_sigma", "0.1"]) == 2
    assert "is of Dummy; leave out --min_sigma 0.1 (only for SpatialVLA)" in caplog.text

    assert main(["merge", "--base_checkpoint", str(base), "--lora_finetuned_checkpoint_dir", str(checkpoint)]) == 0
    assert "(Dummy)" in (checkpoint / "README.md").read_text()
    flags = PolicyFlags(pretrained_checkpoint=str(checkpoint), model_family="dum", use_proprio=False)
    spec = prepare_policy(flags, LIBERO, "libero_spatial")
    assert spec.checkpoint.family == "dum"
    assert not np.any(spec.load().predict([None], [0]))
