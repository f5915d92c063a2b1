"""Whole runs in this process: what they write and when, resuming, validation, and errors before any work."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shutil
from importlib.util import find_spec

import pytest
import torch
import yaml
from PIL import Image

import prismo.training.logs
import prismo.training.trainer
from prismo.data.dataset import open_dataset
from prismo.data.synthetic import write_synthetic_libero
from prismo.embodiment import LIBERO
from prismo.models.component_files import read_component
from prismo.models.lora import open_adapter
from prismo.testing.tiny import make_tiny_openvla
from prismo.training.config import FinetuneConfig
from prismo.training.run_folder import RunFolder
from tests.training.conftest import DATASET, assert_same_state, contents, figures, metrics, state, train


def test_checkpoint_has_the_published_layout(long_run):
    folder = RunFolder(long_run).step_folder(4)
    assert {path.name for path in folder.iterdir()} == {
        "action_head--4_checkpoint.pt",
        "proprio_projector--4_checkpoint.pt",
        "align_projector--4_checkpoint.pt",
        "lora_adapter",
        "dataset_statistics.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "training_config.json",
    }
    assert "vlm_norm.weight" in read_component(folder / "align_projector--4_checkpoint.pt")
    with open_adapter(folder / "lora_adapter") as file:
        names = list(file.keys())
    assert all(".lora_" in name for name in names)  # no copy of lm_head: adapters stay small
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    assert set(statistics) == {DATASET}
    config = json.loads((folder / "training_config.json").read_text())
    assert config["align_recipe"]["vla_layers_align"] == 2
    assert (config["chunk"], config["num_images_in_input"], config["image_aug"]) == (8, 2, True)
    assert config["versions"]["torch"] == importlib.metadata.version("torch")


def test_only_the_newest_checkpoint_carries_trainer_state(long_run):
    """And the last update always gives one, also where 6 is no multiple of `save_freq` (defect 10)."""
    found = [(c.step, c.resumable) for c in RunFolder(long_run).checkpoints()]
    assert found == [(6, True), (4, False)]


def test_checkpoint_n_has_seen_exactly_n_updates(long_run):
    """The original's checkpoint N has N + 1 (defect 11)."""
    optimizer = state(RunFolder(long_run).step_folder(6))
    assert {value.item() for name, value in optimizer.items() if name.startswith("optimizer:step.")} == {6.0}


def test_logs(long_run):
    entries = metrics(long_run)
    assert sorted(entries) == [1, 2, 3, 4, 5, 6]
    assert {
        "loss", "curr_action_l1_loss", "next_actions_l1_loss", "align_loss", "align_cosine_view0",
        "align_cosine_view1", "learning_rate", "gradient_norm", "position_error_mm", "rotation_error_deg",
        "samples_per_second", "data_wait_share", "epoch",
    } <= entries[1].keys()  # fmt: skip
    assert entries[6]["align_cosine"] == pytest.approx(1 - entries[6]["align_loss"], abs=1e-5)


def test_cosine_map_is_drawn(long_run):
    with Image.open(long_run / "align_maps" / "step-000005.png") as picture:
        width, height = picture.size
        colors = len(set(picture.convert("RGB").get_flattened_data()))
    assert width > 4 * 224
    assert height > 2 * 224
    assert colors > 50


def test_three_plus_three_equals_six(long_run, flags, tmp_path):
    """Weights, moments, logged figures, dropout and sample order: bit for bit."""
    arguments = flags(tmp_path, save_freq=3, align_map_freq=5, lora_dropout=0.1)
    assert train([*arguments, "--max_steps", "3"]) == 0
    assert train([*arguments, "--max_steps", "6", "--resume", "True"]) == 0
    assert_same_state(RunFolder(tmp_path / "run").step_folder(6), RunFolder(long_run).step_folder(6))
    assert figures(tmp_path / "run") == figures(long_run)


def test_the_seed_matters(long_run, flags, tmp_path):
    """The original seeds nothing (defect 9). That the same seed gives the same run, the test above shows."""
    assert train(flags(tmp_path, max_steps=1, seed=2, lora_dropout=0.1)) == 0
    assert figures(tmp_path / "run")[1] != figures(long_run)[1]


def test_accumulation_saves_once_and_counts_updates(flags, tmp_path):
    """The original writes a checkpoint once per micro-batch and stops in the middle of an update (defect 11)."""
    assert train(flags(tmp_path, max_steps=4, save_freq=2, grad_accumulation_steps=2, batch_size=1)) == 0
    run = RunFolder(tmp_path / "run")
    assert [c.step for c in run.checkpoints()] == [4, 2]
    assert sorted(metrics(run.path)) == [1, 2, 3, 4]
    stored = json.loads((run.step_folder(4) / "trainer_state" / "state.json").read_text())
    assert stored["data"] == {"epoch": 0, "sample": 8}
    assert train(flags(tmp_path, run_id_override="double", max_steps=2, batch_size=2)) == 0
    micro, double = metrics(run.path), metrics(tmp_path / "double")
    for step in (1, 2):  # the same samples, here padded to a common length and there not
        for name in ("loss", "align_loss", "gradient_norm", "epoch"):
            assert micro[step][name] == pytest.approx(double[step][name], rel=2e-4), (step, name)


def test_latest_only_can_be_resumed(flags, tmp_path, long_run):
    """The original cannot read the file names that it writes (defect 5)."""
    options = {"save_latest_checkpoint_only": True, "save_freq": 2, "lora_dropout": 0.1, "align_map_freq": 5}
    assert train(flags(tmp_path, max_steps=3, resume="auto", **options)) == 0  # nothing there yet: it starts
    run = tmp_path / "run"
    assert (run / "action_head--latest_checkpoint.pt").is_file()
    assert not list(tmp_path.glob("*_chkpt"))
    assert train(flags(tmp_path, max_steps=6, resume="auto", **options)) == 0
    assert_same_state(run, RunFolder(long_run).step_folder(6))
    assert not (run / ".checkpoint").exists()


def test_interrupted_move_of_a_latest_checkpoint_is_finished(tmp_path):
    run = RunFolder(tmp_path / "run")
    for value in ("old", "new"):
        with run.new_checkpoint(1, latest=True) as (folder, name):
            assert name == "latest"
            (folder / "lora_adapter").mkdir()
            for file in ("lora_adapter/a", "head"):
                (folder / file).write_text(value)
            if value == "new":
                break_after_staging(run, monkey := pytest.MonkeyPatch())
    monkey.undo()
    (run.path / "config.json").write_text("merged model of the old adapter")
    assert (run.path / "head").read_text() == "old"
    (run.path / ".checkpoint" / "head").replace(run.path / "head")  # killed after the first file
    run.finish_pending()
    assert (run.path / "lora_adapter" / "a").read_text() == "new"
    assert (run.path / "head").read_text() == "new"
    assert not (run.path / "config.json").exists()
    assert not (run.path / ".checkpoint").exists()


def break_after_staging(run: RunFolder, monkey: pytest.MonkeyPatch) -> None:
    """The process dies when the folder is complete and nothing has been moved yet."""
    monkey.setattr(RunFolder, "finish_pending", lambda self: None)


def test_keep_last(flags, tmp_path):
    assert train(flags(tmp_path, max_steps=4, save_freq=1, keep_last=2)) == 0
    assert [c.step for c in RunFolder(tmp_path / "run").checkpoints()] == [4, 3]
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run--4_chkpt", "run--3_chkpt", "latest"}


def test_going_back_to_a_kept_state(flags, tmp_path):
    """After a spike: an earlier step goes on under another name, and the run as it was is untouched."""
    options = {"max_steps": 3, "save_freq": 1, "batch_size": 1}
    assert train(flags(tmp_path, keep_states=2, **options)) == 0
    run = RunFolder(tmp_path / "run")
    assert [(c.step, c.resumable) for c in run.checkpoints()] == [(3, True), (2, True), (1, False)]
    before = contents(tmp_path)
    given = {"vla_path": run.step_folder(2), "resume": True, "run_id_override": "again"}
    assert train(flags(tmp_path, **given, **options)) == 0
    assert_same_state(RunFolder(tmp_path / "again").step_folder(3), run.step_folder(3))
    assert before.items() <= contents(tmp_path).items()


def test_losses_fall(flags, tmp_path):
    """All windows in every update, so that nothing but learning moves the losses.

    Over eight seeds the action loss came down to 0.50 to 0.74 of where it began, the alignment's to 0.04 to 0.12.
    """
    write_synthetic_libero(tmp_path / "data", DATASET, episodes=1, steps=LIBERO.chunk + 3, image_size=64)
    windows = len(open_dataset(tmp_path / "data", DATASET))
    options = {"data_root_dir": tmp_path / "data", "batch_size": windows, "learning_rate": 2e-3, "image_aug": False}
    assert train(flags(tmp_path, max_steps=10, **options)) == 0
    entries = metrics(tmp_path / "run")
    assert entries[10]["epoch"] == 10
    assert entries[10]["loss"] < 0.85 * entries[1]["loss"]
    assert entries[10]["align_loss"] < 0.3 * entries[1]["align_loss"]


def test_counting_operations_changes_nothing(long_run, flags, tmp_path, monkeypatch):
    """MFU is shown for known GPUs; its one extra pass must not disturb the run."""
    for module in (prismo.training.trainer, prismo.training.logs):
        monkeypatch.setattr(module, "gpu_peak_flops", lambda: 1e12)
    assert train(flags(tmp_path, max_steps=2, lora_dropout=0.1)) == 0
    counted, plain = figures(tmp_path / "run"), figures(long_run)
    assert 0 < counted[2].pop("mfu") < 1
    assert counted[2] == plain[2]


def test_no_alignment_is_finetune_and_needs_no_teacher(flags, tmp_path):
    """The original loads and runs VGGT even at coefficient 0 (defect 15)."""
    without = {"align_loss_coeff": 0, "vggt_path": tmp_path / "missing.pt", "run_id_override": "other"}
    assert train(flags(tmp_path, max_steps=1, **without)) == 0
    assert "align_loss" not in metrics(tmp_path / "other")[1]
    assert not list(RunFolder(tmp_path / "other").step_folder(1).glob("align_projector*"))
    align_flags = {"vggt_path", "vla_layers_align", "use_vlm_norm", "use_vggt_pe", "align_map_freq"}
    arguments = flags(tmp_path, max_steps=1)
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    plain = [part for pair in pairs if pair[0][2:] not in align_flags for part in pair]
    assert train(plain, FinetuneConfig) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "other")


def test_validation_on_held_out_episodes(flags, tmp_path):
    """The original's validation raises a TypeError, and LIBERO has no val split (defect 6)."""
    options = {"use_val_set": True, "val_fraction": 0.4, "val_freq": 2, "max_steps": 3}
    assert train(flags(tmp_path, **options)) == 0
    entries = metrics(tmp_path / "run", "val")
    assert sorted(entries) == [2]
    values = entries[2]
    assert {"loss", "l1_loss", "align_loss", "position_error_mm", "val_batches_count"} <= values.keys()
    per_dim = [values[f"l1_dim{i}"] for i in range(7)]
    assert sum(per_dim) / 7 == pytest.approx(values["l1_loss"], rel=1e-5)
    assert values["l1_loss"] == pytest.approx(values["loss"], rel=1e-4)
    assert train(flags(tmp_path, run_id_override="other", **(options | {"val_freq": 100}))) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "other")  # validating changes nothing


def test_dry_run_reads_no_weights(flags, tmp_path, tiny_base, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_base.iterdir():
        (base / path.name).symlink_to(path)
    assert train(flags(tmp_path, dry_run=True, vla_path=base)) == 0
    text = capsys.readouterr().out
    assert "lora_rank: 4" in text
    resolved = yaml.safe_load(text.split("run folder:")[0])
    assert {name: resolved[name] for name in ("device", "dtype", "vggt_dtype", "lora_alpha", "use_wandb")} == {
        "device": "cpu", "dtype": "float32", "vggt_dtype": "float32", "lora_alpha": 4, "use_wandb": False
    }  # fmt: skip
    assert "num_workers: 0" in text
    assert not [value for value in resolved.values() if value in (None, "auto", "your-wandb-entity")]
    assert "10,183" in text  # parameters of the action head
    assert "expected memory" in text
    assert f"  {DATASET:43s} 84" in text.split("windows per epoch")[1]
    with Image.open(tmp_path / "run" / "first_batch.png") as picture:
        assert picture.width > 2 * 224
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["first_batch.png"]


def test_tail_of_episodes_can_be_trained(flags, tmp_path):
    """The original never trains on the last seven frames of an episode (defect 16)."""
    assert train(flags(tmp_path, use_tail=True, max_steps=2)) == 0
    assert metrics(tmp_path / "run")[2]["loss"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vla_path": "/nowhere/openvla"}, "/nowhere/openvla is neither a checkpoint folder nor a hub id"),
        ({"vggt_path": "/nowhere/model.pt"}, "no VGGT weights at /nowhere/model.pt"),
        ({"data_root_dir": "/nowhere"}, "/nowhere"),
        ({"dataset_name": "libero_spacial_no_noops"}, "Did you mean 'libero_spatial_no_noops'"),
        ({"num_images_in_input": 3}, "--num_images_in_input 3, but libero_spatial_no_noops has 2"),
        ({"vla_layers_align": 24}, "--vla_layers_align 24"),
        ({"vggt_layers_align": 24}, "vggt_layers_align=24 is out of range"),
        ({"resume": True}, "--resume True: no complete checkpoint with trainer state"),
        pytest.param(
            {"device": "cuda"},
            "process 0 needs GPU 0, this machine shows 0",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        pytest.param(
            {"use_tensorboard": True},
            "[tensorboard]",
            marks=pytest.mark.skipif(bool(find_spec("tensorboard")), reason="tensorboard is installed"),
        ),
    ],
)
def test_wrong_input_stops_before_any_work(flags, tmp_path, errors, changes, message):
    assert train(flags(tmp_path, **changes)) == 2
    assert message in errors.text
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("base", ["/nowhere/openvla", "somebody/openvla-of-tomorrow"])
def test_all_wrong_paths_are_listed_before_any_download(flags, tmp_path, errors, base):
    changes = {"vla_path": base, "vggt_path": "/nowhere/model.pt", "data_root_dir": "/nowhere"}
    assert train(flags(tmp_path, **changes)) == 2
    (record,) = errors.records
    problems = ["no VGGT weights at /nowhere/model.pt", "/nowhere/libero_spatial_no_noops"]
    problems += [f"{base} is neither"] if base.startswith("/") else []
    assert f"{len(problems)} problems" in record.message
    assert all(problem in record.message for problem in problems)
    assert "fetched" not in errors.text
    assert not list(tmp_path.rglob("run"))


def test_a_wrong_name_a_wrong_robot_and_a_wrong_folder_are_told_together(flags, tmp_path, errors):
    own = tmp_path / "own.yaml"
    own.write_text(
        "{name: own, embodiment: liberro, cameras: image, action: a, proprio: s, gripper: open_low, control_hz: 20}"
    )
    for name, problem in (("libero_spacial_no_noops", "Did you mean 'libero_spatial"), (own, "Did you mean 'libero'")):
        errors.clear()
        options = {"vla_path": "somebody/openvla-of-tomorrow", "vggt_path": "/nowhere/model.pt"}
        options |= {"data_root_dir": "/nowhere", "dataset_name": name, "adapt_emb": "/nowhere/gaussians.json"}
        assert train(flags(tmp_path / "runs", **options)) == 2
        (record,) = errors.records
        assert record.exc_info is None
        assert "4 problems" in record.message
        expected = (
            "hf download facebook/VGGT-1B",
            problem,
            "hf download openvla/modified_libero_rlds",
            "fit_action_ga",
        )
        assert all(text in record.message for text in expected)
        assert not (tmp_path / "runs" / "run").exists()


def test_dry_run_downloads_settings_only(flags, tmp_path, errors, tiny_base, monkeypatch, capsys):
    """The cache holds what a first dry run has fetched; the hub cannot be asked."""
    hub = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for path in tiny_base.glob("*.json"):
        shutil.copyfile(path, snapshot / path.name)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    arguments = flags(tmp_path / "runs", vla_path="somebody/tiny")
    assert train([*arguments, "--dry_run", "True"]) == 0
    assert "10,183" in capsys.readouterr().out  # parameters of the action head
    assert train([*arguments, "--vla_layers_align", "24"]) == 2
    assert "--vla_layers_align 24" in errors.text  # said before the weights are fetched
    assert train(arguments) == 2
    assert "somebody/tiny" in errors.records[-1].message or str(snapshot) in errors.records[-1].message


def test_a_base_of_another_kind(flags, tmp_path, errors, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    for dry in (False, True):
        errors.clear()
        assert train(flags(tmp_path, vla_path=tmp_path / "base", dry_run=dry)) == 2
        assert "model_type 'llama', expected 'openvla' or 'spatialvla'" in errors.text


def test_action_size_that_does_not_fit(flags, tmp_path, errors, libero):
    copied = tmp_path / "rlds" / DATASET
    shutil.copytree(libero / DATASET, copied)
    features = copied / "1.0.0" / "features.json"
    content = json.loads(features.read_text())
    steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["action"]["tensor"]["shape"]["dimensions"] = ["6"]
    features.write_text(json.dumps(content))
    assert train(flags(tmp_path, data_root_dir=tmp_path / "rlds")) == 2
    assert "action (action) has 6 numbers, libero has 7" in errors.text


def test_a_new_run_does_not_overwrite_another(long_run, flags, errors):
    """The original reuses a run folder without a word (defect 12)."""
    before = contents(long_run)
    assert train(flags(long_run.parent, max_steps=6)) == 2
    assert "Continue it with --resume True, or name another run" in errors.text
    assert contents(long_run) == before


def test_resume_with_other_structure_is_refused(long_run, flags, errors):
    assert train(flags(long_run.parent, max_steps=9, resume=True, lora_rank=8, lora_dropout=0.1)) == 2
    assert "--lora_rank 4 -> 8" in errors.text
    options = {"max_steps": 9, "resume": True, "lora_dropout": 0.1}
    assert train(flags(long_run.parent, teacher="random", **options)) == 2
    assert "--teacher vggt -> random" in errors.text


def test_resume_on_another_base_is_refused(long_run, flags, errors, tmp_path):
    other = make_tiny_openvla(tmp_path / "base", seed=1)
    options = {"max_steps": 9, "resume": True, "lora_dropout": 0.1}
    assert train(flags(long_run.parent, vla_path=other, **options)) == 2
    assert "was trained on other weights than those in" in errors.text


def test_resume_says_which_changes_alter_the_run(long_run, flags, tmp_path, caplog):
    shutil.copytree(long_run.parent, tmp_path / "copy")
    options = {"lora_dropout": 0.1, "resume": True, "max_steps": 7}
    assert train(flags(tmp_path / "copy", learning_rate=1e-4, save_freq=50, **options)) == 0
    assert "restored exactly, but the run goes on with changed flags: --learning_rate 0.0005 -> 0.0001\n" in caplog.text


def test_resume_of_a_finished_run_changes_nothing(long_run, flags):
    before = state(RunFolder(long_run).step_folder(6))
    assert train(flags(long_run.parent, max_steps=6, save_freq=4, align_map_freq=5, lora_dropout=0.1, resume=True)) == 0
    after = state(RunFolder(long_run).step_folder(6))
    assert all(torch.equal(before[name], after[name]) for name in before)
