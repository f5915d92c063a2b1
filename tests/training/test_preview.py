"""Sizes and expected memory of the published recipe, from configurations alone."""

import torch

from prismo.embodiment import LIBERO
from prismo.models.openvla import OpenVLAConfig
from prismo.training.config import FinetuneAlignConfig
from prismo.training.openvla import outline
from prismo.training.preview import count_parameters, expected_memory

RECIPE = FinetuneAlignConfig(
    teacher="random", num_images_in_input=2, use_proprio=True, vla_layers_align=24, use_vlm_norm=True, use_vggt_pe=True
)
MEASURED_GIB = 52.8  # peak of scripts/bench_train.py on an H200, torch 2.11


def test_published_recipe(tmp_path):
    OpenVLAConfig().save_pretrained(tmp_path)
    sizes = count_parameters(RECIPE, outline(RECIPE, tmp_path, LIBERO))
    assert sizes.base == 7_541_237_184
    assert sizes.teacher == 909_112_320
    assert sizes.trained["action_head"] == 151_117_831
    assert sizes.trained["proprio_projector"] == 16_818_176
    assert sizes.trained["align_projector"] == 12_595_200
    # Of the original's 110,828,288 LoRA weights, those of modules that no loss reaches are not trained.
    assert sizes.trained["LoRA"] == 107_969_280
    memory = expected_memory(RECIPE, sizes, outline(RECIPE, tmp_path, LIBERO), torch.device("cuda"), 1)
    assert abs(sum(memory.values()) / MEASURED_GIB - 1) < 0.2
