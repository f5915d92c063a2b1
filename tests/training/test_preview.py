"""Sizes and expected memory of the published recipe, from configurations alone."""

import torch
from torch import nn

from prismo.align import TEACHERS, TeacherKind, random_teacher, teacher_sizes
from prismo.align.vggt import read_config
from prismo.data.dataset import open_dataset
from prismo.embodiment import LIBERO
from prismo.models.openvla import OpenVLAConfig
from prismo.training.config import FinetuneAlignConfig, parse_config
from prismo.training.openvla import OPENVLA
from prismo.training.preview import describe_data, expected_memory, teacher_parameters
from tests.training.conftest import DATASET, metrics, train

RECIPE = FinetuneAlignConfig(
    teacher="random", num_images_in_input=2, use_proprio=True, vla_layers_align=24, use_vlm_norm=True, use_vggt_pe=True
)
MEASURED_GIB = 52.8  # peak of scripts/bench_train.py on an H200, torch 2.11


def test_published_recipe(tmp_path):
    OpenVLAConfig().save_pretrained(tmp_path)
    sizes, teacher = OPENVLA.sizes(RECIPE, tmp_path, LIBERO), teacher_parameters(RECIPE)
    assert sizes.base == 7_541_237_184
    assert teacher == 909_112_320
    assert sizes.trained["action_head"] == 151_117_831
    assert sizes.trained["proprio_projector"] == 16_818_176
    assert sizes.trained["align_projector"] == 12_595_200
    # Of the original's 110,828,288 LoRA weights, those of modules that no loss reaches are not trained.
    assert sizes.trained["LoRA"] == 107_969_280
    memory = expected_memory(RECIPE, sizes, teacher, torch.device("cuda"), 1)
    assert abs(sum(memory.values()) / MEASURED_GIB - 1) < 0.2


class Patches(nn.Module):
    """A teacher of 12 channels and two layers."""

    width, layers = 12, 2

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 12, bias=False)

    def features(self, images, layer, view_mask=None):
        return self.line(images.movedim(2, -1)[:, :, ::14, ::14])


def load_patches(path, *, dtype, device, compile):
    assert path in (None, "patches.pt")  # the default of --vggt_path is VGGT's
    return Patches().to(device, dtype)


def without_file(arguments: list[str]) -> list[str]:
    position = arguments.index("--vggt_path")
    return arguments[:position] + arguments[position + 2 :]


def test_an_own_teacher_is_shown_checked_and_trained(flags, tmp_path, capsys, caplog, monkeypatch, tiny_base):
    hidden = OpenVLAConfig.from_pretrained(tiny_base).text_config.hidden_size
    monkeypatch.setitem(TEACHERS, "patches", TeacherKind(load_patches, "patches", None))
    arguments = without_file(flags(tmp_path, teacher="patches", max_steps=1, batch_size=1))
    assert train([*arguments, "--dry_run", "True"]) == 0
    shown = capsys.readouterr().out
    assert f"teacher (frozen)  {36:>15,}" in shown
    assert f"align_projector   {(hidden + 1) * 12 + 13 * 12 + 2 * hidden:>15,}" in shown
    config = parse_config(FinetuneAlignConfig, [*arguments, "--teacher_weights", "patches.pt"])
    assert config.teacher_path == "patches.pt"
    assert teacher_sizes(config.teacher, config.teacher_path).width == 12
    assert train([*arguments, "--vggt_layers_align", "2"]) == 2
    assert "vggt_layers_align=2 is out of range: the teacher has 2 layers" in caplog.text
    assert train(arguments) == 0
    assert metrics(tmp_path / "run")[1]["align_loss"] > 0


def test_the_control_arm_needs_no_vggt_file(flags, tmp_path, capsys, small_vggt, monkeypatch):
    arguments = flags(tmp_path, teacher="random", dry_run=True)
    assert train(without_file(arguments)) == 0
    assert "909,112,320" in capsys.readouterr().out
    assert train([*arguments, "--vggt_path", str(tmp_path / "absent.pt")]) == 0
    assert "909,112,320" in capsys.readouterr().out
    monkeypatch.setattr(
        random_teacher, "VGGTConfig", lambda: read_config(small_vggt)
    )  # not to make 909 million weights
    arguments = flags(tmp_path, teacher="random", max_steps=1, batch_size=1)
    assert train(without_file(arguments)) == 0


def test_weights_of_a_mixture_are_shown(libero, tmp_path):
    (tmp_path / "half.yaml").write_text(f"datasets: {{{DATASET}: 0.5}}\n")
    assert describe_data(open_dataset(libero, tmp_path / "half.yaml", use_tail=True)).endswith("140  x 0.5 = 70")
