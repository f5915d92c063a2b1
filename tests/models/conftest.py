"""Fixtures of the adapter and merge tests."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prismo.embodiment import LIBERO
from prismo.merging.merge import merge
from prismo.models.bin_tokenizer import BinTokenizer
from prismo.models.folder import TRAINING_CONFIG
from prismo.models.lora import add_lora, save_adapter
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticProcessor
from prismo.models.weight_files import fingerprint, full_fingerprint, stored_tensors
from prismo.testing.tiny import make_tiny_openvla, make_tiny_policy
from prismo.util.files import write_json
from tests.models.adapted import SPEC, load, randomize_lora


@pytest.fixture
def tiny_model(tiny_base) -> OpenVLAForActionPrediction:
    """A fresh fp32 model that a test may change."""
    return OpenVLAForActionPrediction.from_pretrained(tiny_base, dtype=torch.float32, self_test=False)


@pytest.fixture(scope="session")
def batch(tiny_base) -> SimpleNamespace:
    """Two samples of different prompt length: `text` (placeholders, padded), `pixel_values`, `mask`."""
    text = PrismaticProcessor.from_pretrained(tiny_base).query_text(
        ["pick up the black bowl", "open the top drawer of the cabinet"], LIBERO.action_tokens, BinTokenizer()
    )
    pixels = torch.rand(2, 6, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return SimpleNamespace(text=text, pixel_values=pixels, mask=BinTokenizer().mask(text.labels))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """An fp32 base, so that merged and unmerged predictions can be compared closely."""
    return make_tiny_openvla(tmp_path_factory.mktemp("merge") / "base", dtype=torch.float32)


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """A checkpoint folder as the trainer leaves it (adapter, statistics, side modules) and its unmerged model."""
    folder = tmp_path_factory.mktemp("merge") / "run--10_chkpt"
    policy = make_tiny_policy(tmp_path_factory.mktemp("merge") / "policy")
    folder.mkdir()
    for name in ("dataset_statistics.json", "action_head--latest_checkpoint.pt", "preprocessor_config.json"):
        shutil.copy(policy / name, folder)
    write_json(folder / TRAINING_CONFIG, {"attention": "bidirectional", "num_images_in_input": 2, "chunk": 8})
    model = load(base)
    add_lora(model, SPEC)
    randomize_lora(model)
    tensors = stored_tensors(base)
    known = {"base_fingerprint": fingerprint(tensors), "base_full_fingerprint": full_fingerprint(tensors)}
    save_adapter(model, folder, SPEC, base="openvla/openvla-7b", **known)
    return folder, model


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run--10_chkpt"))


@pytest.fixture(scope="session")
def merged(base, trained, tmp_path_factory) -> Path:
    return merge(base, trained[0], tmp_path_factory.mktemp("merge") / "merged", progress=False).folder
