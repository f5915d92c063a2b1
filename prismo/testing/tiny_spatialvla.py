"""A tiny SpatialVLA checkpoint in the official layout: complete, random, about 9 MB, written in seconds, offline.

Tests, examples and dry runs use it in place of spatialvla-4b. Only sizes and numbers differ from the published folder:
tensor names, files, the 28 statistics keys and their `Infinity` are there, and so is a tokenizer with Gemma's special
ids (the true one may not be redistributed).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from prismo.models.spatialvla.action_tokenizer import BINS, OFFICIAL_GAUSSIANS, ActionTokenizer
from prismo.models.spatialvla.configuration import SpatialVLAConfig, zoedepth_sizes
from prismo.models.spatialvla.modeling import SpatialVLAForConditionalGeneration
from prismo.util.files import atomic_write, write_json

IMAGE_TOKEN = 600
_OXE = "_dataset_converted_externally_to_rlds/0.1.0"
DATASET_KEYS = (
    *("fractal20220817_data/0.1.0", "kuka/0.1.0", "bridge_orig/1.0.0", "taco_play/0.1.0", "jaco_play/0.1.0"),
    *("berkeley_cable_routing/0.1.0", "roboturk/0.1.0", "viola/0.1.0", "berkeley_autolab_ur5/0.1.0", "toto/0.1.0"),
    *("language_table/0.1.0", f"stanford_hydra{_OXE}", f"austin_buds{_OXE}", f"nyu_franka_play{_OXE}"),
    *(f"furniture_bench{_OXE}", f"ucsd_kitchen{_OXE}", f"austin_sailor{_OXE}", f"austin_sirius{_OXE}"),
    *("dlr_edan_shared_control_converted_externally_to_rlds/0.1.0",),
    *("iamlab_cmu_pickup_insert_converted_externally_to_rlds/0.1.0", "utaustin_mutex/0.1.0"),
    *("berkeley_fanuc_manipulation/0.1.0", "cmu_stretch/0.1.0", "bc_z/0.1.0", "fmb_dataset/1.0.0", "dobbe/0.0.1"),
    *("droid/1.0.0", "rh20t_rlds/1.0.0"),
)
_WORDS = (
    *("pick", "up", "the", "black", "bowl", "and", "place", "it", "on", "plate", "between", "next", "to", "ramekin"),
    *("put", "open", "drawer", "of", "cabinet", "in", "basket", "stove", "turn", "wine", "bottle", "cream", "cheese"),
)


def tiny_config() -> SpatialVLAConfig:
    """Sizes of the tiny model. ZoeDepth sees 96 pixels instead of 384, or it would take nearly all of the time."""
    vocabulary = IMAGE_TOKEN + 1 + 8194
    return SpatialVLAConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        vision_zoe_config=_tiny_zoe(),
        image_token_index=IMAGE_TOKEN,
        action_token_begin_idx=IMAGE_TOKEN + 1,
        architectures=["SpatialVLAForConditionalGeneration"],
    )


def _tiny_zoe() -> dict[str, Any]:
    sizes = zoedepth_sizes(hidden=32, layers=4, heads=2, fusion=16)
    sizes["backbone_config"]["image_size"] = 96
    bins = [{**entry, "n_bins": 8} for entry in sizes["bin_configurations"]]
    return {**sizes, "bin_configurations": bins, "num_attractors": [4, 2, 1, 1], "neck_hidden_sizes": [16] * 4}


def make_tiny_spatialvla(folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint folder and return its path."""
    folder = Path(folder)
    SpatialVLAForConditionalGeneration.random(tiny_config(), dtype=dtype, seed=seed).save_pretrained(folder)
    write_tiny_processor(folder, seed)
    return folder


def write_tiny_processor(folder: Path, seed: int = 0) -> None:
    """Write tokenizer, `preprocessor_config.json` and `processor_config.json` (not strict JSON, like the original)."""
    with atomic_write(folder / "tokenizer.json") as temporary:
        tiny_tokenizer().save(str(temporary))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "model_max_length": 2048}
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)
    image = {"do_normalize": False, "image_processor_type": "SiglipImageProcessor", "resample": 3}
    write_json(folder / "preprocessor_config.json", image | {"size": {"height": 224, "width": 224}})
    camera = {"intrinsic": [[623.588, 0, 319.501], [0, 623.588, 239.545], [0, 0, 1]], "width": 640, "height": 480}
    translation = {f"{name}_bins": BINS[name] for name in ("theta", "phi", "r")}
    rotation = {f"{name}_bins": BINS[name] for name in ("roll", "pitch", "yaw")}
    processor = {
        "processor_class": "SpatialVLAProcessor",
        "action_chunk_size": 4,
        "action_config": {
            "distribution": "gaussian",
            "num_bins": {"translation": translation, "rotation": rotation, "gripper": 2, "total": 8194},
            "use_spherical": True,
        },
        "bin_policy": ActionTokenizer.from_gaussians(OFFICIAL_GAUSSIANS, min_sigma=0.5).bin_policy(),
        "intrinsic_config": {"bridge_orig/1.0.0": camera, "default": camera},
        "min_sigma": 0.0,
        "num_obs_steps": 1,
        "obs_delta": 1,
        "statistics": _tiny_statistics(seed),
    }
    with atomic_write(folder / "processor_config.json") as temporary:
        temporary.write_text(json.dumps(processor, indent=2))  # writes `Infinity`, as the published file has it


def _tiny_statistics(seed: int) -> dict[str, Any]:
    """Made-up delta actions of a few centimetres under each of the published keys."""
    generator = np.random.default_rng(seed)
    statistics: dict[str, Any] = {}
    for key in DATASET_KEYS:
        reach = np.append(generator.uniform(0.02, 0.8, 6), 1.0).round(6)
        low = np.append(-reach[:6], 0.0)
        action = {
            "mean": [0.0] * 6 + [0.5],
            "std": (reach / 2).tolist(),
            "max": reach.tolist(),
            "min": low.tolist(),
            "q01": (0.9 * low).tolist(),
            "q99": [*(0.9 * reach[:6]).tolist(), 1.0],
            "mask": [True] * 6 + [False],
        }
        proprio = {name: [0.0] * 7 for name in ("mean", "std", "max", "min", "q01", "q99")}
        statistics[key] = {"action": action, "proprio": proprio, "num_transitions": 1000, "num_trajectories": 10}
    statistics["rh20t_rlds/1.0.0"]["action"]["std"][:3] = [float("inf")] * 3
    return statistics


def tiny_tokenizer() -> Tokenizer:
    """Byte-pair encoding with byte fallback, Gemma's special ids (newline 108) and merges for words of LIBERO tasks."""
    ids = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<2mass>": 5, "[@BOS@]": 6}
    ids |= {f"<unused{i}>": 7 + i for i in range(99)} | {"<start_of_turn>": 106, "<end_of_turn>": 107, "\n": 108}
    ids |= {f"<0x{byte:02X}>": 109 + byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,?!'-_":
        ids.setdefault(letter, len(ids))
    for word in _WORDS:
        piece = f"▁{word}"
        for end in range(2, len(piece) + 1):
            if piece[:end] not in ids:
                ids[piece[:end]] = len(ids)
                merges.append((piece[: end - 1], piece[end - 1]))
    ids |= {f"<seg{i:03d}>": i for i in range(len(ids), IMAGE_TOKEN)}
    ids["<image>"] = IMAGE_TOKEN
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<image>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return tokenizer
