"""Flags: the original's names and defaults, and errors that name the flag."""

import os
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from prismo.align import AlignRecipe
from prismo.training.bounds import BOUNDS
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig, parse_config
from prismo.training.run_folder import run_folder, run_id

ORIGINAL = {
    "vla_path": "openvla/openvla-7b",
    "data_root_dir": Path("datasets/rlds"),
    "dataset_name": "aloha_scoop_x_into_bowl",
    "run_root_dir": Path("runs"),
    "shuffle_buffer_size": 100_000,
    "use_l1_regression": True,
    "use_diffusion": False,
    "num_diffusion_steps_train": 50,
    "use_film": False,
    "num_images_in_input": 1,
    "use_proprio": False,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "lr_warmup_steps": 0,
    "num_steps_before_decay": 100_000,
    "grad_accumulation_steps": 1,
    "max_steps": 200_000,
    "use_val_set": False,
    "val_freq": 10_000,
    "val_time_limit": 180,
    "save_freq": 10_000,
    "save_latest_checkpoint_only": False,
    "scheduler": "MultiStepLR",
    "resume": False,
    "resume_step": None,
    "image_aug": True,
    "diffusion_sample_freq": 50,
    "use_lora": True,
    "lora_rank": 32,
    "lora_dropout": 0.0,
    "merge_lora_during_training": True,
    "wandb_entity": "your-wandb-entity",
    "wandb_project": "your-wandb-project",
    "run_id_note": None,
    "run_id_override": None,
    "wandb_log_freq": 10,
}
ORIGINAL_ALIGN = {
    "vggt_path": "official_ckpts/vggt_model.pt",
    "align_loss_type": "cosine",
    "align_loss_coeff": 0.5,
    "pooling_func": "bilinear",
    "vla_layers_align": -1,
    "vggt_layers_align": -1,
    "use_vlm_norm": False,
    "use_vggt_pe": False,
    "gain_feat_1move": True,
}


@pytest.mark.parametrize(
    ("kind", "original"), [(FinetuneConfig, ORIGINAL), (FinetuneAlignConfig, ORIGINAL | ORIGINAL_ALIGN)]
)
def test_names_and_defaults_of_the_original(kind, original):
    config = kind()
    assert {name: getattr(config, name) for name in original} == original
    assert {f.name for f in fields(FinetuneConfig)}.isdisjoint(ORIGINAL_ALIGN)


def test_published_command_parses():
    words = "--vla_layers_align 24 --vggt_layers_align -1 --align_loss_coeff 0.5 --use_vlm_norm True --use_vggt_pe True"
    words += " --use_proprio True --num_images_in_input 2 --batch_size 8 --learning_rate 5e-4 --lora_rank 32"
    config = parse_config(FinetuneAlignConfig, words.split())
    assert config.align_recipe.vla_layers_align == 24
    assert config.head == "l1"
    assert not config.wandb_wanted
    assert parse_config(FinetuneAlignConfig, [*words.split(), "--wandb_entity", "me"]).wandb_wanted


def test_coefficient_zero_switches_the_teacher_off():
    assert parse_config(FinetuneAlignConfig, ["--align_loss_coeff", "0"]).align_recipe is None
    assert FinetuneConfig().align_recipe is None


def test_yaml_under_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 3\nuse_proprio: true\n")
    config = parse_config(FinetuneConfig, ["--config_path", str(file), "--batch_size", "4"])
    assert (config.batch_size, config.use_proprio) == (4, True)


@pytest.mark.parametrize(("written", "value"), [("True", True), ("False", False), ("auto", "auto")])
def test_resume_is_a_truth_value_or_auto(written, value, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"resume: {written}\n")
    assert parse_config(FinetuneConfig, ["--resume", written]).resume == value
    assert parse_config(FinetuneConfig, ["--config_path", str(file)]).resume == value
    with pytest.raises(ValueError, match=r"--resume atuo: another type than bool\|auto"):
        parse_config(FinetuneConfig, ["--resume", "atuo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batchsize 8", r"unknown flag '--batchsize'. Did you mean '--batch_size'"),
        ("--align_loss_coef 1", r"Did you mean '--align_loss_coeff'"),
        ("--batch_size eight", "batch_size"),
        ("--batch_size 0", "--batch_size is 0; expected at least 1"),
        ("--scheduler Cosine", "Did you mean 'CosineAnnealingLR'"),
        ("--use_diffusion True", "exclude each other"),
        ("--resume_step 5", "--resume True"),
        ("--resume True --resume_step 9 --max_steps 9", "is not below --max_steps"),
        ("--lora_dropout 1.5", "lora_dropout"),
        ("--learning_rate -1", "--learning_rate"),
        ("--pooling_func bilinaer", "Did you mean 'bilinear'"),
        ("--align_loss_type l2", "align_loss_type"),
        ("--teacher vgt", "Did you mean 'vggt'"),
        ("--dtype bf16", "Did you mean 'bfloat16'"),
        ("--config_path nowhere.yaml", "there is no file nowhere.yaml"),
        ("--keep_last 2 --save_latest_checkpoint_only True", "--keep_last"),
        ("--keep_states 2 --save_latest_checkpoint_only True", "--keep_states"),
        ("--keep_states 0", "--keep_states is 0; expected at least 1"),
        ("--resume auto --resume_step 5", "--resume True"),
        ("--lora_rank 100000000", "--lora_rank is 100000000; expected at most"),
        ("--lora_rank 0", "--lora_rank is 0; expected at least 1"),
        ("--batch_size 1000000000", "--batch_size is 1000000000; expected at most"),
        ("--seed 99999999999999999999999", "--seed is 9+; expected at most"),
        ("--seed -1", "--seed is -1; expected at least 0"),
        ("--weight_decay nan", "--weight_decay is nan; expected"),
        ("--max_grad_norm inf", "--max_grad_norm is inf; expected at most"),
        ("--learning_rate nan", "--learning_rate is nan; expected"),
        ("--align_loss_coeff nan", "--align_loss_coeff is nan; expected"),
        ("--align_loss_coeff -1", "--align_loss_coeff is -1.0; expected at least 0"),
        ("--align_map_freq -1", "--align_map_freq is -1; expected at least 0"),
        ("--shuffle_buffer_size -1", "--shuffle_buffer_size is -1; expected at least 0"),
        ("--num_workers 100000", "--num_workers is 100000; expected at most"),
        ("--run_id_note ../x", "--run_id_note is '../x'; a name of a folder"),
        ("--run_id_note a/b", "--run_id_note is 'a/b'; a name of a folder"),
        ("--run_id_override ../../escape", r"--run_id_override is '\.\./\.\./escape'; a name of a folder"),
        ("--run_id_override a\tb", r"--run_id_override is 'a\\tb'; a name of a folder"),
        ("--run_id_override .hidden", "--run_id_override is '.hidden'; a name of a folder"),
        ("--run_id_override run--5_chkpt", "--run_id_override is 'run--5_chkpt'; a name of a folder"),
        (f"--run_id_override {'x' * 201}", "--run_id_override is 'x+'; a name of a folder"),
    ],
)
def test_wrong_flags_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_config(FinetuneAlignConfig, arguments.split(" "))


def test_every_number_has_bounds():
    numbers = {
        name
        for name, hint in get_type_hints(FinetuneAlignConfig).items()
        if {int, float} & {hint, *get_args(hint)} and name in {field.name for field in fields(FinetuneAlignConfig)}
    }
    assert len(numbers) > 25
    assert numbers == BOUNDS.keys()


@pytest.mark.parametrize("name", ["openvla-7b+libero--note", "a b", "läuft", "v1.2"])
def test_names_that_runs_may_have(name):
    assert run_id(parse_config(FinetuneConfig, ["--run_id_override", name])) == name


def test_a_generated_name_is_checked_as_well(tmp_path):
    config = FinetuneConfig(vla_path="x" * 230, dataset_name="libero", run_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"without --run_id_override the name of this run is 'x+"):
        run_folder(config)


def test_unknown_yaml_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match=r"run\.yaml: unknown key 'batchsize'. Did you mean 'batch_size'"):
        parse_config(FinetuneConfig, ["--config_path", str(file)])


def test_run_id_is_the_originals():
    config = FinetuneAlignConfig(
        vla_path="openvla/openvla-7b", dataset_name="libero_spatial_no_noops", run_id_note="note", batch_size=4,
        grad_accumulation_steps=2,
    )  # fmt: skip
    expected = "openvla-7b+libero_spatial_no_noops+b8+lr-0.0005+lora-r32+dropout-0.0--image_aug--note"
    assert run_id(config) == expected


@pytest.mark.parametrize("suite", ["spatial", "object", "goal", "10", "joint"])
def test_the_papers_command_is_accepted(suite, tmp_path):
    """`scripts/train_libero_align.sh` with a torchrun that only shows its arguments; the recipe says the same."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    root = Path(__file__).resolve().parents[2]
    script = root / "scripts" / "train_libero_align.sh"
    done = subprocess.run(
        [script, suite, "--resume", "True"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    launcher, entry = words[: words.index("vla-scripts/finetune_align.py")], "vla-scripts/finetune_align.py"
    assert launcher == ["--standalone", "--nnodes", "1", "--nproc-per-node", "3"]
    config = parse_config(FinetuneAlignConfig, words[words.index(entry) + 1 :])
    assert config.align_recipe == AlignRecipe.spatial_forcing()
    assert (config.batch_size, config.max_steps, config.lora_rank, config.resume) == (8, 150_005, 32, True)
    names = {f"libero_{suite}_no_noops", "libero_4_task_suites_no_noops"}
    assert config.dataset_name in names
    recipe = ["--config_path", str(root / "recipes" / f"libero_{suite}_align.yaml")]
    assert parse_config(FinetuneAlignConfig, [*recipe, "--resume", "True"]) == config
    assert parse_config(FinetuneAlignConfig, [*recipe, "--batch_size", "2"]).batch_size == 2
    assert run_id(parse_config(FinetuneAlignConfig, recipe)) == (
        f"openvla-7b+{config.dataset_name}+b8+lr-0.0005+lora-r32+dropout-0.0--image_aug"
    )
