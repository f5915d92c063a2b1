"""The blocks of docs/align.md, run as they stand: on VLAs of other families, and the example teacher."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0ForConditionalGeneration,
)

from prismo.align import TEACHERS, SpatialForcing, TeacherKind, load_teacher

PAGE = Path(__file__).resolve().parents[2] / "docs" / "align.md"
BATCH, VIEWS, PATCHES, IMAGE_TOKEN, HIDDEN = 2, 2, 16, 299, 64


def snippet(heading: str) -> str:
    """The first python block below a heading of the page."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}$.*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} has no python block under {heading!r}"
    return found[1]


def vlm_config() -> PaliGemmaConfig:
    text = {
        "model_type": "gemma",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 300,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "patch_size": 14,
        "image_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vision_use_head": False,
    }
    return PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=HIDDEN, image_token_id=IMAGE_TOKEN)


def inputs() -> SimpleNamespace:
    image_ids = torch.full((BATCH, VIEWS * PATCHES), IMAGE_TOKEN)
    images = torch.rand(BATCH, VIEWS, 3, 56, 56)
    return SimpleNamespace(
        images=images,
        pixels=images * 2 - 1,
        ids=torch.cat([image_ids, torch.randint(0, 290, (BATCH, 6))], dim=1),
    )


def paligemma() -> SimpleNamespace:
    vla, x = PaliGemmaForConditionalGeneration(vlm_config()), inputs()
    batch = {
        "input_ids": x.ids,
        "pixel_values": x.pixels.flatten(0, 1),
        "attention_mask": torch.ones_like(x.ids),
        "token_type_ids": torch.zeros_like(x.ids),
        "labels": x.ids.masked_fill(x.ids == IMAGE_TOKEN, -100),
    }
    return SimpleNamespace(vla=vla, images=x.images, batch=batch, language_model=vla.model.language_model)


def pi0() -> SimpleNamespace:
    expert = dict(vlm_config().text_config.to_dict(), hidden_size=32, intermediate_size=64)
    config = PI0Config(
        vlm_config=vlm_config().to_dict(), dit_config=expert, chunk_size=4, max_action_dim=7, max_state_dim=8
    )
    vla, x = PI0ForConditionalGeneration(config), inputs()
    batch = {
        "input_ids": x.ids,
        "pixel_values": x.pixels,
        "pixel_attention_mask": torch.ones(BATCH, VIEWS, dtype=torch.bool),
        "attention_mask": torch.ones_like(x.ids),
        "state": torch.randn(BATCH, 8),
        "actions": torch.randn(BATCH, 4, 7),
    }
    return SimpleNamespace(vla=vla, images=x.images, batch=batch, language_model=vla.model.vlm.language_model)


@pytest.mark.parametrize("family", [paligemma, pi0])
def test_the_page_trains_another_vla(family, vggt_file: Path) -> None:
    torch.manual_seed(0)
    case = family()
    layer = case.language_model.layers[1]
    names = {
        "vla": case.vla,
        "batch": case.batch,
        "images": case.images,
        "layer": layer,
        "device": "cpu",
        "hidden_size": HIDDEN,
        "image_token_id": IMAGE_TOKEN,
        "vggt_path": vggt_file,
        "optimizer": torch.optim.AdamW(case.vla.parameters(), lr=1e-3),
    }
    exec(compile(snippet("Align your own VLA"), str(PAGE), "exec"), names)
    aligned = {name: p.grad.clone() for name, p in case.vla.named_parameters() if p.grad is not None}
    assert names["metrics"]["align_cosine"].isfinite()
    assert all(p.grad is not None for p in names["spatial_forcing"].parameters())
    assert len(names["optimizer"].param_groups) == 2

    # The alignment itself reaches the VLA, up to the tapped layer and not behind it.
    case.vla.zero_grad()
    case.vla(**case.batch)
    hidden = names["tap"].take()[case.batch["input_ids"] == IMAGE_TOKEN].unflatten(0, (BATCH, -1))
    assert hidden.shape == (BATCH, VIEWS * PATCHES, HIDDEN)
    names["spatial_forcing"](case.images, hidden)[0].backward()
    alone = {name: p.grad for name, p in case.vla.named_parameters() if p.grad is not None}
    assert next(p for p in layer.parameters()).grad.abs().sum() > 0
    assert any("vision_tower" in name and grad.abs().sum() > 0 for name, grad in alone.items())
    assert not any("layers.2." in name and "language_model" in name for name in alone)
    assert len(aligned) > len(alone)


def test_the_teacher_of_the_page_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(sizes).save_pretrained(tmp_path)
    file: dict = {}
    exec(compile(snippet("Add a teacher"), str(PAGE), "exec"), file)
    monkeypatch.setitem(TEACHERS, "dinov2", TeacherKind(file["load_dinov2"], "DINOv2", "apache-2.0"))
    teacher = load_teacher("dinov2", tmp_path)
    spatial_forcing = SpatialForcing(teacher, hidden_size=HIDDEN)
    hidden = torch.randn(BATCH, VIEWS * PATCHES, HIDDEN, requires_grad=True)
    loss, _ = spatial_forcing(torch.rand(BATCH, VIEWS, 3, 56, 56), hidden)
    loss.backward()
    assert hidden.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
