"""Checkpoint folders after the usual accidents: cut off, mixed up, or made to reach out of the folder."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismo.models.folder import check_folder
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticProcessor
from prismo.models.weight_files import INDEX, stored_tensors, weight_files


@pytest.fixture
def folder(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors", "..", "", "..\\x"])
def test_the_index_stays_in_the_folder(folder, tmp_path, name):
    """`../` was followed to whatever lies there."""
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    rewrite(folder / INDEX, lambda index: index["weight_map"].update({"language_model.lm_head.weight": name}))
    with pytest.raises(ValueError, match="expected files beside it"):
        OpenVLAForActionPrediction.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", ["", '{"weight_map": {"a": "mod', "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_a_damaged_index(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json.*again"):
        weight_files(folder)


@pytest.mark.parametrize("content", ["", "[1]", '{"model_type": 3}', '{"no": "type"}', "\xff", "[" * 100_000])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json: .*fetch it again"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_config": {"hidden_size": "32"}}, "text_config.hidden_size should be a valid integer"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers should be less than"),
        ({"text_config": {"num_attention_heads": 5, "hidden_size": 32}}, "describes no OpenVLA"),
        ({"n_action_bins": 0}, "n_action_bins should be greater than"),
        ({"vision_towers": [{"width": 8}]}, "depth is missing"),
        ({"vision_towers": [{"width": 8, "depth": 1, "heads": 1, "mlp_width": 8, "size": 3}]}, "unknown key"),
        ({"attention": "both"}, "attention should be"),
        ({"vision_backbone_id": "dino"}, "describes no OpenVLA (unknown vision_backbone_id 'dino'."),
    ],
)
def test_a_config_of_no_openvla(folder, change, says):
    rewrite(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        OpenVLAForActionPrediction.from_pretrained(folder)
    assert says in str(error.value)


def test_a_tensor_of_another_shape(folder):
    """transformers ends with a table and a RuntimeError about an argument that nobody gave."""
    path = folder / "model-00002-of-00002.safetensors"
    name = "language_model.model.norm.weight"
    save_file(load_file(path) | {name: torch.zeros(31)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit OpenVLA \(mismatched: .*{name}"):
        OpenVLAForActionPrediction.from_pretrained(folder)


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        struct.pack("<Q", 1 << 60) + b"{}",
        header(a=1) + bytes(8),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}) + bytes(8),
        header(a={"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
        header(a={"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}) + bytes(8),
        header(a={"format": "pt"}),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + bytes(9),
        header(a={"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}) + bytes(2),
        header(
            a={"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
            b={"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
        )
        + bytes(2),
    ],
)
def test_a_damaged_weight_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        stored_tensors(tmp_path)


PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
OTHER_TYPES = '{"means": 1, "model": 1, "pad_token": 3.5}'


@pytest.mark.parametrize(
    ("file", "content"),
    [(file, content) for file in PROCESSOR for content in (None, "[]")]
    + [(file, OTHER_TYPES) for file in PROCESSOR if file != "tokenizer_config.json"],  # which has none of these keys
)
def test_a_damaged_processor(folder, file, content):
    """The usual remains of an interrupted download."""
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2] if content is None else content)
    with pytest.raises(ValueError, match=str(folder)):  # ours, not a library's
        PrismaticProcessor.from_pretrained(folder)
