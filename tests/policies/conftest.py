"""Tiny checkpoints of every kind, and observations with prompts of different length; all read-only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prismo.data.normalize import dump_statistics
from prismo.embodiment import LIBERO
from prismo.models.lora import LoraSpec, add_lora, save_adapter
from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.policies.base import PolicyInput
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from prismo.policies.openvla import OpenVLAPolicy
from prismo.testing.tiny import make_tiny_openvla, make_tiny_policy, tiny_statistics
from prismo.util.files import write_json
from prismo.util.schema import JsonObject, read_json

SUITE = "libero_spatial"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind: "l1", "diffusion", "discrete" (OFT without a head) and "vanilla"."""
    root = tmp_path_factory.mktemp("policies")
    made = {
        "l1": make_tiny_policy(root / "l1"),
        "diffusion": make_tiny_policy(root / "diffusion", head="diffusion"),
        "discrete": make_tiny_policy(root / "discrete", head="discrete", proprio=False),
        "vanilla": make_tiny_openvla(root / "vanilla", dataset=SUITE),
    }
    for kind in ("discrete", "vanilla"):
        prefer_action_tokens(made[kind])
        # Published files do not state how they attend.
        config = read_json(made[kind] / "config.json", JsonObject)
        del config["attention"]
        write_json(made[kind] / "config.json", config)
    # What the original copies into its checkpoints; the only thing that tells these two apart.
    (made["discrete"] / "modeling_prismatic.py").write_text("from prismatic.vla.constants import NUM_ACTIONS_CHUNK\n")
    (made["vanilla"] / "modeling_prismatic.py").write_text("raise SystemExit('code of a checkpoint was executed')\n")
    return made


def prefer_action_tokens(folder: Path) -> None:
    """A random model never chooses one of its 256 action tokens; make their logits a hundred times larger."""
    model = OpenVLAForActionPrediction.from_pretrained(folder, self_test=False)
    tokens = model.action_tokenizer
    model.get_output_embeddings().weight.data[tokens.first_id + 1 : tokens.vocab_size] *= 100
    model.save_pretrained(folder, max_shard_size="3MB")


@pytest.fixture(scope="session")
def token_run(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on vanilla OpenVLA, whose folder holds the vanilla model code, without any side module."""
    folder = tmp_path_factory.mktemp("run") / "run--100_chkpt"
    model = OpenVLAForActionPrediction.from_pretrained(checkpoints["vanilla"], dtype=torch.float32, self_test=False)
    spec = LoraSpec(rank=4)
    add_lora(model, spec)
    save_adapter(model, folder, spec, base=str(checkpoints["vanilla"]))
    dump_statistics({"libero_spatial_no_noops": tiny_statistics(LIBERO)}, folder / "dataset_statistics.json")
    return folder


Load = Callable[..., OpenVLAPolicy]


@pytest.fixture(scope="session")
def load() -> Load:
    """`load(folder, **flags)`: a policy for LIBERO-Spatial."""

    def loaded(folder: Path, **flags: object) -> OpenVLAPolicy:
        return prepare_policy(PolicyFlags(pretrained_checkpoint=str(folder), **flags), LIBERO, SUITE).load()

    return loaded


@pytest.fixture(scope="session")
def policies(checkpoints: dict[str, Path], load: Load) -> dict[str, OpenVLAPolicy]:
    """A loaded policy of every kind."""
    flags = {"diffusion": {"num_diffusion_steps_inference": 5}}
    return {kind: load(folder, **flags.get(kind, {})) for kind, folder in checkpoints.items()}


def observe(seed: int, instruction: str, images: int = 2) -> PolicyInput:
    """A smooth random scene of 256 x 256 pixels and a plausible state."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)
    frames = coarse.repeat(16, axis=1).repeat(16, axis=2)
    return PolicyInput(tuple(frames), rng.normal(0, 0.5, 8), instruction)


@pytest.fixture
def observations() -> list[PolicyInput]:
    """Three, with two cameras and prompts of different length."""
    prompts = ["pick up the milk", "open the top drawer and put the bowl inside", "push the plate"]
    return [observe(seed, prompt) for seed, prompt in enumerate(prompts)]
