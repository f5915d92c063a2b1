"""Names of runs: the published ones for the published settings, and a word for each setting of an ablation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.training.run_name import naming_flags, run_id

NAME = "openvla-7b+libero_spatial_no_noops+b8+lr-0.0005+lora-r32+dropout-0.0--image_aug"
GIVEN = {"dataset_name": "libero_spatial_no_noops", "num_images_in_input": 2, "use_proprio": True}
PAPER = FinetuneAlignConfig(**GIVEN, vla_layers_align=24, use_vlm_norm=True, use_vggt_pe=True)
OFT = FinetuneConfig(**GIVEN)
SVLA = FinetuneAlignConfig(
    vla_path="IPEC-COMMUNITY/spatialvla-4b-224-pt",
    dataset_name="libero_spatial_no_noops",
    scheduler="LinearLR",
    lr_warmup_steps=50,
    weight_decay=0.0,
    adapt_emb=Path("runs/gaussians.json"),
    adpt_feature=True,
    lora_alpha=32,
    vla_layers_align=20,
    use_vlm_norm=True,
    use_vggt_pe=True,
)


def test_published_settings_have_the_published_name():
    assert run_id(PAPER) == run_id(OFT) == NAME
    assert run_id(FinetuneConfig(dataset_name="libero_spatial_no_noops")) == NAME  # the original's defaults
    note = "parallel_dec--8_acts_chunk--continuous_acts--L1_regression--3rd_person_img--wrist_img--proprio_state"
    assert run_id(replace(OFT, run_id_note=note)) == f"{NAME}--{note}"
    assert run_id(replace(PAPER, max_steps=9, num_steps_before_decay=5, save_freq=1, device="cpu")) == NAME
    assert run_id(replace(PAPER, vla_path="ckpts/openvla-7b/")) == NAME
    expected = NAME.replace("openvla-7b", "spatialvla-4b-224-pt")
    assert run_id(SVLA) == run_id(replace(SVLA, lora_alpha=None, use_l1_regression=False)) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vla_layers_align": 16}, "layer-16"),
        ({"align_loss_coeff": 0.1, "seed": 8}, "seed-8--align-0.1"),
        ({"align_loss_coeff": 0.0}, "no_align"),
        ({"align_loss_coeff": 0.0, "vla_layers_align": 3}, "no_align"),
        ({"teacher": "random"}, "teacher-random"),
        ({"vggt_layers_align": 11}, "teacher_layer-11"),
        ({"use_proprio": False, "num_images_in_input": 1}, "images-1--no_proprio"),
        ({"use_vlm_norm": False, "use_vggt_pe": False, "gain_feat_1move": False}, "no_vlm_norm--no_vggt_pe--no_1move"),
        ({"use_l1_regression": False}, "discrete"),
        ({"use_l1_regression": False, "use_diffusion": True}, "diffusion"),
        ({"use_film": True, "run_id_note": "mine"}, "film--mine"),
        ({"lora_alpha": 64}, "alpha-64"),
        ({"lora_alpha": 16}, ""),
        ({"weight_decay": 0.0, "scheduler": "LinearLR"}, "scheduler-LinearLR--decay-0"),
    ],
)
def test_what_an_ablation_varies_is_in_the_name(changes, words):
    assert run_id(replace(PAPER, **changes)) == (f"{NAME}--{words}" if words else NAME)


def test_arms_of_a_spatialvla_run():
    name = run_id(SVLA)
    assert run_id(replace(SVLA, vla_layers_align=16)) == f"{name}--layer-16"
    assert run_id(replace(SVLA, adapt_emb=None, adpt_feature=False)) == f"{name}--no_adapted_bins--no_adapted_embed"
    assert run_id(replace(SVLA, use_lora=False)) == name.replace("lora-r32+dropout-0.0", "full")


def test_all_that_changes_a_name_is_known_to_the_near_miss():
    """`prismo.training.run_folder` names the run that was meant by these flags."""
    assert {"vla_layers_align", "seed", "use_proprio", "use_diffusion", "run_id_note"} <= set(naming_flags(PAPER))
    assert all(hasattr(OFT, flag) for flag in naming_flags(OFT))
