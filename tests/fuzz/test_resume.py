"""Resuming from a damaged checkpoint: the very weights of an undamaged one, or a refusal before the first update."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.torch import load_file

from prismo.commands.train import train
from prismo.training.config import FinetuneConfig
from tests.fuzz.conftest import training_flags
from tests.fuzz.harness import CommandFailedError, Fuzzer
from tests.fuzz.mutate import Mutation, damage, data_starts, header_edit, json_of
from tests.fuzz.tensors import tensor_edit
from tests.fuzz.test_checkpoints import RUN, files_of

STATE = f"{RUN}/trainer_state"


def resume(folder: Path) -> Any:
    """Weights after one more update."""
    os.chdir(folder)
    if train(FinetuneConfig, training_flags(resume=True, max_steps=2)):
        raise CommandFailedError
    weights = load_file("runs/run--2_chkpt/trainer_state/weights.safetensors")
    finite = all(np.isfinite(value.numpy()).all() for value in weights.values())
    digests = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in sorted(weights.items())}
    return digests | {"finite": finite}


def other_numbers(folder: Path) -> Any:
    """Numbers of tensors have no checksum; where the run goes on in the data and how is written in files of ours."""

    def judge(mutation: Mutation, before: Any, after: Any) -> bool:
        if not after["finite"] or before.keys() != after.keys():
            return False
        if mutation.file.endswith(".safetensors"):
            return mutation.at >= data_starts(folder / mutation.file) or mutation.kind == "tensor float64"
        return mutation.kind in ("-1", "0", "huge") and mutation.place[-1] == "world_size"

    return judge


def test_damaged_trainer_state(fuzz: Fuzzer, trained: Path) -> None:
    files = files_of(trained, STATE)
    tensors = [name for name in files if name.endswith(".safetensors")]
    described = [f"{STATE}/state.json", f"{RUN}/training_config.json"]
    kinds = [damage(trained, [*files, *described]), json_of(trained, described), json_of(trained, described[:1])]
    kinds += [header_edit(trained, tensors), tensor_edit(trained, tensors), tensor_edit(trained, tensors)]
    fuzz(
        trained,
        st.one_of(kinds),
        resume,
        percent=5,
        legitimate=other_numbers(trained),
        also=("is not finite", "trained on other weights", "no complete checkpoint with trainer state"),
    )
