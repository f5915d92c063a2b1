"""Tiny checkpoints: official layout, a tokenizer that behaves like Llama-2's where OpenVLA relies on it."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaTokenizerFast

from prismo.data.normalize import load_statistics
from prismo.embodiment import BRIDGE, LIBERO
from prismo.models.bin_tokenizer import BinTokenizer
from prismo.models.component_files import load_component
from prismo.models.heads import DiffusionActionHead, L1RegressionActionHead
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticProcessor
from prismo.models.projectors import NoisyActionProjector, ProprioProjector
from prismo.testing.tiny import make_tiny_openvla, make_tiny_policy
from tests.golden import sizes

INSTRUCTION = "Pick up the black bowl between the plate and the ramekin and place it on the plate"
# The ids of Llama-2's own tokenizer for this prompt.
PROMPT_IDS = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 5839, 701, 278, 4628, 12580, 29880, 1546, 278]
PROMPT_IDS += [15284, 322, 278, 364, 420, 9089, 322, 2058, 372, 373, 278, 15284, 29973, 13, 3744, 29901]


def file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_base_has_the_official_files_and_is_small(tiny_base):
    names = {p.name for p in tiny_base.iterdir()}
    assert {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    } <= names
    assert sum(p.stat().st_size for p in tiny_base.iterdir()) < 8_000_000
    config = json.loads((tiny_base / "config.json").read_text())
    assert config["model_type"] == "openvla"
    assert config["architectures"] == ["OpenVLAForActionPrediction"]
    assert config["text_config"]["vocab_size"] == 32064
    preprocessor = json.loads((tiny_base / "preprocessor_config.json").read_text())
    assert preprocessor["processor_class"] == "PrismaticProcessor"
    assert preprocessor["image_processor_type"] == "PrismaticImageProcessor"


def test_base_tensors_have_the_published_names_and_dtype(tiny_base):
    index = json.loads((tiny_base / "model.safetensors.index.json").read_text())["weight_map"]
    for name in (
        "vision_backbone.featurizer.reg_token",
        "vision_backbone.featurizer.blocks.2.ls2.scale_factor",
        "vision_backbone.fused_featurizer.attn_pool.kv.weight",
        "projector.fc3.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    ):
        with safe_open(tiny_base / index[name], framework="pt") as file:
            assert file.get_tensor(name).dtype == torch.bfloat16


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_base, tmp_path):
    assert file_hashes(make_tiny_openvla(tmp_path / "again")) == file_hashes(tiny_base)
    other = file_hashes(make_tiny_openvla(tmp_path / "other", seed=1))
    differing = {name for name, value in file_hashes(tiny_base).items() if other[name] != value}
    assert differing == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_base_loads_and_sees_the_image(tiny_base):
    model = OpenVLAForActionPrediction.from_pretrained(tiny_base)  # runs the self-test
    assert model.dtype == torch.bfloat16
    assert len(model.language_model.model.layers) == 4
    assert set(load_statistics(tiny_base / "config.json")) == {"bridge_orig"}


def test_processor_normalises_with_the_rounded_statistics(tiny_base):
    processor = PrismaticProcessor.from_pretrained(tiny_base)
    assert processor.image_processor.statistics[0][0] == [0.484375, 0.455078125, 0.40625]
    white = np.full((224, 224, 3), 255, dtype=np.uint8)
    pixels = processor.image_processor(white)["pixel_values"]
    assert pixels.shape == (1, 6, 224, 224)
    assert pixels[0, 0, 0, 0].item() == pytest.approx((1 - 0.484375) / 0.228515625)
    assert pixels[0, 3, 0, 0].item() == 1.0


@pytest.mark.parametrize("loader", [AutoTokenizer, LlamaTokenizerFast])
def test_tokenizer_gives_the_published_prompt_ids(tiny_base, loader):
    tokenizer = loader.from_pretrained(tiny_base)
    prompt = f"In: What action should the robot take to {INSTRUCTION.lower()}?\nOut:"
    assert tokenizer(prompt)["input_ids"] == PROMPT_IDS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size, len(tokenizer)) == (32000, 32000, 32001)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 2048)
    assert tokenizer.convert_ids_to_tokens([3, 13, 258, 29871]) == ["<0x00>", "<0x0A>", "<0xFF>", "▁"]


def test_processor_appends_the_space_token(tiny_base):
    assert PrismaticProcessor.from_pretrained(tiny_base).prompt_ids(INSTRUCTION) == [*PROMPT_IDS, 29871]


def test_action_ids_survive_the_way_through_text(tiny_base):
    # Training code of the originals writes action tokens as text and tokenises the whole conversation again.
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    prompt = f"In: What action should the robot take to {INSTRUCTION.lower()}?\nOut: "
    rng = random.Random(0)
    every = list(range(31744, 32000))
    for ids in [every, *(rng.choices(every, k=56) for _ in range(100))]:
        text = tokenizer.decode(ids)
        assert len(text) == len(ids)
        assert text.strip() == text
        assert tokenizer(prompt + text + "</s>")["input_ids"] == [*PROMPT_IDS, 29871, *ids, 2]
    assert BinTokenizer().encode(np.array([-1.0, 1.0])).tolist() == [31999, 31744]


@pytest.mark.parametrize(
    "text", ["open the 3rd drawer of the WOODEN cabinet, then close it!", "Müll in den Eimer 🗑 legen", "  two  spaces "]
)
def test_any_instruction_round_trips_without_unknown_tokens(tiny_base, text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 0 not in ids
    assert max(ids) < 31744
    assert tokenizer.decode(ids) == text


def test_policy_has_statistics_and_side_modules(tiny_policy):
    assert set(load_statistics(tiny_policy / "dataset_statistics.json")) == {"libero_spatial_no_noops"}
    assert set(load_statistics(tiny_policy / "config.json")) == {"libero_spatial_no_noops"}
    load_component(L1RegressionActionHead(32, None, LIBERO.action_dim, LIBERO.chunk), tiny_policy, "action_head")
    load_component(ProprioProjector(32, LIBERO.proprio_dim), tiny_policy, "proprio_projector")


def test_policy_of_another_robot_and_head(tmp_path):
    folder = make_tiny_policy(tmp_path, dataset="bridge_orig", head="diffusion", proprio=False)
    load_component(DiffusionActionHead(32, None, BRIDGE.action_dim, BRIDGE.chunk), folder, "action_head")
    load_component(NoisyActionProjector(32), folder, "noisy_action_projector")
    assert not list(folder.glob("proprio_projector*"))


def test_vggt_file_has_the_published_names(tiny_vggt):
    state = torch.load(tiny_vggt, weights_only=True)
    aggregator = {name.removeprefix("aggregator.") for name in state if name.startswith("aggregator.")}

    def shallow(names):  # depths differ, the names within a block do not
        return {".".join("0" if part.isdigit() else part for part in name.split(".")) for name in names}

    assert shallow(aggregator) == shallow(sizes("aggregator_shapes.json"))
    heads = {name.split(".")[0] for name in state} - {"aggregator"}
    assert heads == {"camera_head", "point_head", "depth_head", "track_head"}


@pytest.mark.processes
def test_one_command_writes_them_all(tmp_path):
    script = Path(__file__).resolve().parents[2] / "scripts" / "make_tiny_checkpoint.py"
    subprocess.run([sys.executable, script, "--output", tmp_path], check=True, capture_output=True, timeout=300)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "policy", "spatialvla", "vggt"}
    assert (tmp_path / "vggt" / "model.pt").is_file()
