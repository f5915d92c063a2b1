"""SpatialVLA through the trainer: adapters and full weights, alignment, resuming, sharding, merging, evaluation."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from prismo.data.normalize import load_statistics
from prismo.embodiment import LIBERO
from prismo.models.component_files import read_component
from prismo.models.lora import load_adapter
from prismo.models.spatialvla import LIBERO_AGENTVIEW, SpatialVLAForConditionalGeneration, SpatialVLAProcessor
from prismo.models.spatialvla.action_tokenizer import ActionTokenizer, Gaussian, load_gaussians, save_gaussians
from prismo.models.spatialvla.rediscretize import interpolate_rows
from prismo.policies.base import PolicyInput
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from prismo.testing.tiny_spatialvla import make_tiny_spatialvla
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig, parse_config
from prismo.training.optim import Schedule
from prismo.training.run_folder import RunFolder
from prismo.training.run_name import run_id
from tests.training.conftest import DATASET, REPOSITORY, assert_same_state, environment, figures, metrics, state, train

KEY = f"{DATASET}/1.0.0"
FULL = {"use_lora": False, "learning_rate": 2e-5}
ALIGN = {"vla_layers_align": 1, "align_loss_coeff": 0.5}


@pytest.fixture(scope="session")
def svla_base(tmp_path_factory) -> Path:
    return make_tiny_spatialvla(tmp_path_factory.mktemp("svla") / "base")


@pytest.fixture(scope="session")
def gaussians(tmp_path_factory) -> Path:
    """Another distribution of actions than the published one."""
    values = {"theta": (1.5, 0.5), "phi": (0.4, 1.2), "r": (0.3, 0.3), "roll": (0, 0.2), "pitch": (0.1, 0.3)}
    path = tmp_path_factory.mktemp("gaussians") / "gaussians.json"
    save_gaussians({name: Gaussian(*value) for name, value in (values | {"yaw": (0, 0.4)}).items()}, path)
    return path


@pytest.fixture(scope="session")
def svla(flags, svla_base):
    """`svla(run_root, max_steps=2)` -> arguments of finetune_align.py for SpatialVLA, without alignment."""

    def build(run_root: Path, **changes: object) -> list[str]:
        own = {"vla_path": svla_base, "num_images_in_input": 1, "use_proprio": False, "align_loss_coeff": 0}
        return flags(run_root, **(own | changes))

    return build


def last(root: Path, step: int, name: str = "run") -> Path:
    return RunFolder(root / name).step_folder(step)


def act(folder: Path) -> np.ndarray:
    """A chunk of the policy in a folder, whose settings come from its files alone."""
    flags = PolicyFlags(pretrained_checkpoint=str(folder), adaptive_ensemble=False)
    policy = prepare_policy(flags, LIBERO, DATASET).load()
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    policy.start_episode(0, 0)
    return policy.predict([PolicyInput((frame,), None, "pick up the bowl")], [0])


@pytest.fixture(scope="module")
def lora_run(svla, tmp_path_factory) -> Path:
    """Four updates with alignment and dropout; returns the root with the merged checkpoint."""
    root = tmp_path_factory.mktemp("lora")
    options = ALIGN | {"lora_dropout": 0.1, "align_map_freq": 3, "merge_lora_during_training": True}
    assert train(svla(root, max_steps=4, **options)) == 0
    return root


def test_checkpoint_has_the_official_layout_and_the_dataset(lora_run, svla_base):
    folder = last(lora_run, 4)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in svla_base.iterdir() if path.suffix == ".json"} - {"model.safetensors"} <= names
    assert {"lora_adapter", "align_projector--4_checkpoint.pt", "dataset_statistics.json", "merge.json"} <= names
    adapter = json.loads((folder / "lora_adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 4)  # the authors' alpha is the rank
    stored = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
    assert not [name for name in stored if "vision_zoe_model" in name]
    processor = SpatialVLAProcessor.from_pretrained(folder)
    assert len(processor.statistics) == 29
    statistics = load_statistics(folder / "dataset_statistics.json")[DATASET]
    np.testing.assert_allclose(processor.statistics[KEY].action.q99, statistics.action.q99)
    config = json.loads((folder / "training_config.json").read_text())
    assert (config["chunk"], config["gain_feat_1move"], config["use_l1_regression"]) == (4, False, False)
    assert "vlm_norm.weight" in read_component(folder / "align_projector--4_checkpoint.pt")
    assert (lora_run / "run" / "align_maps" / "step-000003.png").is_file()


def test_batches_of_the_published_runs(svla, tmp_path, caplog):
    """Another number than OpenVLA's."""
    caplog.set_level(logging.WARNING)
    assert train(svla(tmp_path, dry_run=True)) == 0
    assert "2 samples per update; the published runs use 256, and runs below 128" in caplog.text


def test_logged_figures(lora_run):
    entry = metrics(lora_run / "run")[1]
    assert {"loss", "translation_accuracy", "rotation_accuracy", "gripper_accuracy", "align_loss", "align_cosine_view0",
            "curr_action_l1_loss", "next_actions_l1_loss", "position_error_mm"} <= entry.keys()  # fmt: skip
    assert entry["loss"] > 5  # cross entropy over 8795 tokens
    assert 0 < entry["curr_action_l1_loss"] < 2


def test_merged_equals_base_and_adapter(lora_run, svla_base, tmp_path):
    merged = last(lora_run, 4)
    processor = SpatialVLAProcessor.from_pretrained(merged)
    text = processor.training_text(["pick up the bowl"], np.zeros((1, 4, 7)))
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    matrices = processor.intrinsics(processor.camera(KEY), 1)

    def logits(model: SpatialVLAForConditionalGeneration) -> torch.Tensor:
        with torch.no_grad():
            arguments = (text.attention_mask, text.token_type_ids, text.labels)
            return model.eval()(text.input_ids, pixels, matrices, *arguments).logits

    adapted = SpatialVLAForConditionalGeneration.from_pretrained(svla_base)
    before = logits(adapted)
    load_adapter(adapted, merged)
    after = logits(SpatialVLAForConditionalGeneration.from_pretrained(merged))
    torch.testing.assert_close(after, logits(adapted), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 1e-2
    unmerged = shutil.copytree(merged, tmp_path / "unmerged", ignore=shutil.ignore_patterns("model*", "config.json"))
    actions = act(merged)
    assert actions.shape == (1, 4, 7)
    np.testing.assert_array_equal(act(unmerged), actions)


@pytest.mark.processes
def test_merging_by_the_script(lora_run, svla_base, tmp_path):
    merged = last(lora_run, 4)
    unmerged = shutil.copytree(merged, tmp_path / "unmerged", ignore=shutil.ignore_patterns("model*", "config.json"))
    script = REPOSITORY / "vla-scripts" / "merge_lora_weights_and_save.py"
    arguments = ["--base_checkpoint", svla_base, "--lora_finetuned_checkpoint_dir", unmerged]
    command = [sys.executable, str(script), *map(str, arguments), "--output", str(tmp_path / "merged")]
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    for name in ("config.json", "processor_config.json", "tokenizer.json", "dataset_statistics.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (merged / name).read_bytes(), name
    theirs, ours = (load_file(next(f.glob("model*.safetensors"))) for f in (merged, tmp_path / "merged"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


KINDS = {
    "lora-align": ALIGN | {"lora_dropout": 0.1, "align_map_freq": 3},
    "lora-adapted-bins": {"adpt_feature": True},
    "full-accumulation": FULL | {"grad_accumulation_steps": 2, "batch_size": 1},
    "full-align-checkpointing": FULL | ALIGN | {"gradient_checkpointing": True, "freeze_vision_tower": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_plus_two_equals_four(svla, gaussians, tmp_path, kind, request):
    """Weights, moments and logged figures, bit for bit."""
    options = KINDS[kind] | ({"adapt_emb": gaussians} if "adapted" in kind else {})
    if kind == "lora-align":
        whole = request.getfixturevalue("lora_run")
    else:
        whole = tmp_path / "whole"
        assert train(svla(whole, max_steps=4, **options)) == 0
    assert train(svla(tmp_path, max_steps=2, **options)) == 0
    assert train(svla(tmp_path, max_steps=4, resume=True, **options)) == 0
    assert_same_state(last(tmp_path, 4), last(whole, 4))
    assert figures(tmp_path / "run") == figures(whole / "run")


def test_adapted_bins_reach_the_merged_model(svla, svla_base, gaussians, tmp_path):
    """The run's bins, and the trained action embeddings that belong to them, at both places where files have them."""
    options = {"adapt_emb": gaussians, "adpt_feature": True, "min_sigma": 0.3, "merge_lora_during_training": True}
    assert train(svla(tmp_path, max_steps=1, learning_rate=1e-6, **options)) == 0
    merged = last(tmp_path, 1)
    old = SpatialVLAProcessor.from_pretrained(svla_base).action_tokenizer
    new = ActionTokenizer.from_gaussians(load_gaussians(gaussians), 0.3)
    found = SpatialVLAProcessor.from_pretrained(merged).action_tokenizer
    np.testing.assert_allclose(found.edges["phi"], new.edges["phi"])
    before, after = (load_file(next(folder.glob("model*.safetensors"))) for folder in (svla_base, merged))
    table = after["spatial_embed_tokens.weight"]
    moved = interpolate_rows(before["spatial_embed_tokens.weight"], old, new)
    torch.testing.assert_close(table, moved, atol=1e-5, rtol=0)  # one update at a tiny rate
    assert (moved - before["spatial_embed_tokens.weight"]).abs().max() > 0.01
    assert not torch.equal(table, moved)
    text = "language_model.model.embed_tokens.weight"
    assert torch.equal(after[text][-len(table) :], table)
    assert torch.equal(after[text][: -len(table)], before[text][: -len(table)])
    assert act(merged).shape == (1, 4, 7)


def test_full_checkpoint_is_a_complete_model(svla, svla_base, tmp_path):
    assert train(svla(tmp_path, max_steps=1, **FULL)) == 0
    folder = last(tmp_path, 1)
    before, after = (load_file(path / "model.safetensors") for path in (svla_base, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith("vision_zoe_model")]
    assert "language_model.lm_head.weight" in changed
    rows = 8194  # the text embeddings are frozen, but for the copy of the action embeddings behind them
    text = "language_model.model.embed_tokens.weight"
    assert torch.equal(before[text][:-rows], after[text][:-rows])
    untouched = {name for name in before.keys() - changed if not name.startswith("vision_zoe_model")}
    assert not untouched, sorted(untouched)[:5]
    assert np.isfinite(act(folder)).all()
    assert not (folder / "lora_adapter").exists()
    # and a run can start from it
    assert train(svla(tmp_path / "next", max_steps=1, vla_path=folder, run_id_override="next")) == 0


@pytest.mark.parametrize("options", [{"learning_rate": 5e-3}, FULL | {"learning_rate": 1e-3}], ids=["lora", "full"])
def test_losses_fall(svla, tmp_path, options):
    assert train(svla(tmp_path, max_steps=12, batch_size=4, image_aug=False, **(ALIGN | options))) == 0
    entries = metrics(tmp_path / "run")
    first, later = ([entries[step] for step in steps] for steps in ((1, 2), (11, 12)))
    assert sum(e["loss"] for e in later) < 0.8 * sum(e["loss"] for e in first)
    assert sum(e["align_loss"] for e in later) < 0.97 * sum(e["align_loss"] for e in first)


OLD_TORCH = "ignored_params" not in inspect.signature(fully_shard).parameters


@pytest.mark.skipif(not OLD_TORCH, reason="this torch can shard")
def test_sharding_with_an_old_torch_is_refused_before_any_work(svla, tmp_path):
    done = run_two_processes(svla(tmp_path, max_steps=1, **FULL))
    assert done.returncode != 0
    assert "needs torch 2.7 or newer" in done.stderr
    assert not (tmp_path / "run").exists()


def two_processes(arguments: list[str]) -> None:
    done = run_two_processes(arguments)
    assert done.returncode == 0, done.stderr[-4000:]


def run_two_processes(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(REPOSITORY / "vla-scripts" / "finetune_align.py"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.skipif(OLD_TORCH, reason="sharding needs torch 2.7")
@pytest.mark.processes
def test_sharded_training_equals_one_process_and_resumes_exactly(svla, tmp_path):
    """FSDP2 over two processes. Each sees one sample of two, so their mean gradient is that of one process."""
    options = FULL | ALIGN | {"learning_rate": 1e-3, "grad_accumulation_steps": 2}
    assert train(svla(tmp_path, max_steps=3, run_id_override="alone", batch_size=2, **options)) == 0
    two_processes(svla(tmp_path, max_steps=3, run_id_override="whole", batch_size=1, **options))
    two_processes(svla(tmp_path, max_steps=2, batch_size=1, **options))
    shutil.copytree(tmp_path, tmp_path / "copy")
    two_processes(svla(tmp_path, max_steps=3, batch_size=1, resume=True, **options))
    whole = last(tmp_path, 3, "whole")
    assert_same_state(last(tmp_path, 3), whole)
    assert_nearly_the_same(tmp_path, "whole", tmp_path, "alone")
    assert np.isfinite(act(whole)).all()
    # Another number of processes: what two left, one continues, and what one left, two do.
    assert train(svla(tmp_path / "copy", max_steps=3, batch_size=2, resume=True, **options)) == 0
    assert_nearly_the_same(tmp_path / "copy", "run", tmp_path, "alone")
    assert train(svla(tmp_path / "copy", max_steps=2, run_id_override="back", batch_size=2, **options)) == 0
    two_processes(svla(tmp_path / "copy", max_steps=3, run_id_override="back", batch_size=1, resume=True, **options))
    assert_nearly_the_same(tmp_path / "copy", "back", tmp_path, "alone")


def assert_nearly_the_same(root: Path, name: str, other_root: Path, other_name: str) -> None:
    """Three steps of two runs: losses, Adam's first moments and the names in the checkpoint."""
    found, expected = last(root, 3, name), last(other_root, 3, other_name)
    losses = [[entry["loss"] for entry in metrics(path).values()] for path in (root / name, other_root / other_name)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert value.shape == ours[key].shape, key
        if key.startswith("optimizer:exp_avg."):  # Adam amplifies rounding in weights
            # Some gradients are zero but for rounding: a shift of all keys changes no softmax.
            tolerance = max(0.02 * value.abs().max().item(), 1e-8)
            torch.testing.assert_close(ours[key], value, rtol=0.02, atol=tolerance, msg=key)
    names = [load_file(folder / "model.safetensors").keys() for folder in (found, expected)]
    assert names[0] == names[1]


def test_true_camera_is_trained_with_and_stored(svla, svla_base, tmp_path):
    assert train(svla(tmp_path, max_steps=1, intrinsics="libero")) == 0
    config = SpatialVLAProcessor.from_pretrained(svla_base).config
    camera = SpatialVLAProcessor.from_pretrained(last(tmp_path, 1), config).camera(KEY)
    assert camera.matrix(224)[0, 0] == pytest.approx(285.0, abs=0.1)  # of the crop that training and evaluation see
    assert camera == LIBERO_AGENTVIEW.center_cropped(0.9)


def test_validation_decodes(svla, tmp_path):
    options = {
        "use_val_set": True,
        "val_fraction": 0.4,
        "val_freq": 1,
        "max_steps": 1,
        "use_tail": True,
        "val_time_limit": 1,
    }
    assert train(svla(tmp_path, **options)) == 0
    values = metrics(tmp_path / "run", "val")[1]
    assert {"loss", "l1_loss", "l1_dim6", "position_error_mm"} <= values.keys()
    assert 0 < values["l1_loss"] < 2


def test_bf16(svla, tmp_path):
    """The computation of a GPU: bf16 base under autocast, adapters in fp32, validation by decoding in bf16."""
    options = ALIGN | {
        "dtype": "bfloat16",
        "use_val_set": True,
        "val_fraction": 0.4,
        "val_freq": 1,
        "val_time_limit": 1,
    }
    assert train(svla(tmp_path, max_steps=1, **options)) == 0
    assert train(svla(tmp_path, max_steps=1, run_id_override="full", **(options | FULL))) == 0
    losses = [metrics(tmp_path / name)[1]["loss"] for name in ("run", "full")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)
    assert {value.dtype for value in state(last(tmp_path, 1)).values()} == {torch.float32}


def test_dry_run(svla, tmp_path, capsys):
    assert train(svla(tmp_path, dry_run=True, **FULL)) == 0
    text = capsys.readouterr().out
    assert "base (frozen)           1,060,407" in text
    assert "model                   1,215,584" in text
    assert (tmp_path / "run" / "first_batch.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_proprio": True}, "is of SpatialVLA; leave out --use_proprio True (only for OpenVLA)"),
        ({"num_images_in_input": 2}, "takes one image; leave out --num_images_in_input 2"),
        ({"action_head": "l1"}, "is of SpatialVLA; leave out --action_head l1 (only for OpenVLA)"),
        ({"intrinsics": "libreo"}, "Did you mean 'libero'"),
        ({"adpt_feature": True}, "needs --adapt_emb"),
        ({"adapt_emb": "nowhere.json"}, "nowhere.json"),
        ({"vla_layers_align": 7, "align_loss_coeff": 0.5}, "has 3 hidden states"),
    ],
)
def test_wrong_flags(svla, tmp_path, caplog, changes, message):
    with caplog.at_level(logging.ERROR):
        assert train(svla(tmp_path, **changes)) == 2
    assert message in caplog.text
    assert not list(tmp_path.glob("*_chkpt"))


def test_openvla_has_none_of_these_flags(flags, tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        assert train(flags(tmp_path, use_lora=False)) == 2
        assert train(flags(tmp_path, intrinsics="libero")) == 2
    assert "--use_lora False: OpenVLA is trained through adapters" in caplog.text
    assert "(only for SpatialVLA)" in caplog.text


def test_linear_schedule():
    schedule = Schedule(peak=1.0, kind="LinearLR", warmup_steps=2, max_steps=10)
    assert [schedule.rate(done) for done in (0, 1, 5, 9, 10)] == pytest.approx([0.55, 0.9, 0.5, 0.1, 0])


def test_finetune_is_the_same_without_the_alignment_flags(svla, tmp_path):
    align_flags = {"vggt_path", "vla_layers_align", "use_vlm_norm", "use_vggt_pe", "align_map_freq", "align_loss_coeff"}
    arguments = svla(tmp_path, max_steps=1)
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    plain = [part for pair in pairs if pair[0][2:] not in align_flags for part in pair]
    assert train(plain, FinetuneConfig) == 0
    assert (last(tmp_path, 1) / "lora_adapter").is_dir()


def shown(script: str, arguments: list[str], folder: Path, **environ: str) -> list[str]:
    """What a training script would launch: with commands in front of the true ones that only show their arguments."""
    for name, text in (
        ("torchrun", 'printf "%s\\n" "$@"'),
        ("python", 'echo "$@" >&2'),
        ("scontrol", "echo node0"),
        ("srun", '"$@"'),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "RUNS": str(folder), "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    command = ["bash", str(REPOSITORY / "scripts" / script), *arguments]
    done = subprocess.run(command, env=os.environ | own | environ, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("suite", ["spatial", "10", "joint"])
def test_the_training_script_is_accepted(mode, suite, tmp_path):
    align = {"ALIGN": "1"} if suite == "joint" else {"ADAPT": "0"}
    words = shown("train_libero_spatialvla.sh", [suite, "--resume", "True"], tmp_path, MODE=mode, NPROC="3", **align)
    assert words[:5] == ["--standalone", "--nnodes", "1", "--nproc-per-node", "3"]
    kind = FinetuneAlignConfig if suite == "joint" else FinetuneConfig
    assert words[5] == f"vla-scripts/finetune{'_align' if suite == 'joint' else ''}.py"
    config = parse_config(kind, words[6:])
    assert (config.batch_size, config.scheduler, config.weight_decay, config.resume) == (32, "LinearLR", 0, True)
    assert (config.use_lora, config.learning_rate) == ((True, 5e-4) if mode == "lora" else (False, 2e-5))
    assert (config.adapt_emb is None) == (suite != "joint")
    assert config.dataset_name in (f"libero_{suite}_no_noops", "libero_4_task_suites_no_noops")


def test_the_recipe_is_the_training_script(tmp_path):
    config = parse_config(FinetuneConfig, shown("train_libero_spatialvla.sh", ["spatial"], tmp_path)[6:])
    recipe = parse_config(
        FinetuneConfig, ["--config_path", str(REPOSITORY / "recipes" / "libero_spatial_spatialvla.yaml")]
    )
    gaussians = tmp_path / "gaussians-libero_spatial_no_noops.json"
    assert config == replace(recipe, run_root_dir=tmp_path, adapt_emb=gaussians)
    assert gaussians.name == recipe.adapt_emb.name
    assert run_id(recipe).endswith("--image_aug")  # its settings add no word


def test_the_slurm_twin_runs_the_same_command(tmp_path):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    words = shown("train_libero_spatialvla.slurm", ["goal"], tmp_path, ADAPT="0", SLURM_RESTART_COUNT="1", **slurm)
    assert words[:4] == ["--nnodes", "2", "--nproc-per-node", "4"]
    assert words[words.index("--rdzv-endpoint") + 1] == "node0:20007"
    plain = shown("train_libero_spatialvla.sh", ["goal", "--resume", "auto"], tmp_path, ADAPT="0")
    entry = "vla-scripts/finetune.py"
    assert words[words.index(entry) :] == plain[plain.index(entry) :]
