"""Run folders: what of killed runs is put in order, and that nothing of other runs is touched."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.training.run_folder import Resume, RunFolder, find_resume, run_folder
from prismo.util.files import write_json
from prismo.util.locks import LockedError


def make(path: Path, content: str = "") -> Path:
    """A folder with one file."""
    path.mkdir(parents=True)
    (path / "file").write_text(content)
    return path


def checkpoint(run: RunFolder, step: int, state: bool = True) -> Path:
    """A checkpoint as far as finding it goes."""
    folder = make(run.step_folder(step))
    (folder / "dataset_statistics.json").write_text("{}")
    if state:
        (make(folder / "trainer_state") / "state.json").write_text(f'{{"step": {step}}}')
    return folder


def test_the_checkpoint_that_another_run_is_writing_is_left_alone(tmp_path):
    """Names of generated runs begin alike: `X` and `X--note`."""
    ours, other = RunFolder(tmp_path / "run+b8"), RunFolder(tmp_path / "run+b8--note")
    with other.locked(), other.new_checkpoint(100, latest=False) as (folder, _):
        (folder / "weights").write_text("half")
        removed = make(other.step_folder(50).with_name(".run+b8--note--50_chkpt.removed"))
        with ours.locked():
            ours.prune(1, 1)
        (folder / "rest").write_text("whole")
        assert removed.is_dir()
    assert {path.name for path in other.step_folder(100).iterdir()} == {"weights", "rest"}


def test_what_killed_processes_left_is_cleared(tmp_path):
    run = RunFolder(tmp_path / "run")
    kept = checkpoint(run, 1)
    for name in ("--1_chkpt.0a1b2c3d", "--2_chkpt.0a1b2c3d", "--1_chkpt.old.0a1b2c3d", "--1_chkpt.removed"):
        make(tmp_path / f".run{name}")
    make(kept / ".trainer_state.removed")
    make(run.path / "..checkpoint.0a1b2c3d")
    (run.path / ".metrics.jsonl.0a1b2c3d").write_text("")
    (run.path / "metrics.jsonl").write_text("")
    with run.locked():
        assert {path.name for path in tmp_path.iterdir()} == {"run", "run--1_chkpt"}
        assert {path.name for path in run.path.iterdir()} == {".lock", "metrics.jsonl"}
        assert {path.name for path in kept.iterdir()} == {"file", "dataset_statistics.json", "trainer_state"}


def test_a_checkpoint_that_was_moved_aside_gets_its_name_back(tmp_path):
    """File systems that cannot exchange two folders move the old one aside first, and a kill may follow."""
    run = RunFolder(tmp_path / "run")
    make(tmp_path / ".run--1_chkpt.old.0a1b2c3d", "old")
    make(tmp_path / ".run--1_chkpt.11111111", "new")
    with run.locked():
        assert (run.step_folder(1) / "file").read_text() == "old"
    assert not list(tmp_path.glob(".run*"))


def test_one_process_at_a_time_has_a_run(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        (run.path / "metrics.jsonl").write_text("")
        with (
            pytest.raises(LockedError, match=r"process \d+ on .* is at work on .*/run\. .*--run_id_note"),
            run.locked(),
        ):
            pass
    with run.locked():
        pass
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "metrics.jsonl"]


def test_a_run_that_could_not_start_leaves_no_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="wrong flag"), run.locked():
        raise ValueError("wrong flag")
    assert not list(tmp_path.iterdir())


def run_of(root: Path, *steps: int, **flags: object) -> RunFolder:
    """A run with complete checkpoints, as its flags name it."""
    config = FinetuneConfig(vla_path="openvla/openvla-7b", dataset_name="libero", run_root_dir=root, **flags)
    run = run_folder(config)
    run.path.mkdir(parents=True)
    values = {f.name: getattr(config, f.name) for f in fields(config)} | {"run_root_dir": str(root)}
    content = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    write_json(run.path / "training_config.json", content)
    for step in steps:
        checkpoint(run, step)
    return run


def resume(root: Path, **flags: object) -> tuple[RunFolder, Resume | None]:
    """Where such a command would write and what it would go on from."""
    given = {"vla_path": "openvla/openvla-7b", "dataset_name": "libero", "resume": True} | flags
    config = FinetuneConfig(run_root_dir=root, **given)
    config.validate()
    run = run_folder(config)
    return run, find_resume(config, run)


def test_states_to_keep(tmp_path):
    run = run_of(tmp_path, 1, 2, 3, 4)
    said = run.prune(None, 2)
    assert [(c.step, c.resumable) for c in run.checkpoints()] == [(4, True), (3, True), (2, False), (1, False)]
    assert said == [f"{run.step_folder(step)} can no longer be resumed from (--keep_states 2)" for step in (2, 1)]
    assert f"{run.step_folder(1)} is deleted (--keep_last 3)" in run.prune(3, 1)
    assert [(c.step, c.resumable) for c in run.checkpoints()] == [(4, True), (3, False), (2, False)]


def test_going_back_to_an_earlier_step(tmp_path):
    """Newer checkpoints would be mixed up with those of the new attempt, and the next restart would take them."""
    run = run_of(tmp_path, 1, 2, 3)
    with pytest.raises(
        ValueError, match=r"--3_chkpt is newer than --resume_step 2.*--vla_path .*--2_chkpt .*_override"
    ):
        resume(tmp_path, resume_step=2)
    other, found = resume(tmp_path, vla_path=str(run.step_folder(2)), run_id_override="other")
    assert (other.path, found) == (tmp_path / "other", Resume(run.step_folder(2), 2, exact=True))
    run.step_folder(3).rename(tmp_path / "spike")
    assert resume(tmp_path, resume_step=2) == (run, Resume(run.step_folder(2), 2, exact=True))


@pytest.mark.parametrize("by_folder", [False, True])
def test_an_older_checkpoint_says_what_it_lacks(tmp_path, by_folder):
    run = run_of(tmp_path, 1, 2)
    run.prune(None, 1)
    given = {"vla_path": str(run.step_folder(1))} if by_folder else {}
    with pytest.raises(
        FileNotFoundError, match=r"--1_chkpt has no trainer_state.*--keep_states.*--2_chkpt.*prismo merge"
    ):
        resume(tmp_path, resume_step=1, **given)


def test_resume_auto(tmp_path):
    run, found = resume(tmp_path, resume="auto")
    assert found is None
    checkpoint(run, 5)
    expected = Resume(run.step_folder(5), 5, exact=True)
    assert resume(tmp_path, resume="auto") == (run, expected)
    assert resume(tmp_path, resume="auto", vla_path=str(run.step_folder(5))) == (run, expected)
    shutil.rmtree(run.step_folder(5) / "trainer_state")
    with pytest.raises(ValueError, match=r"--5_chkpt already is a checkpoint of this run \(step 5\)"):
        resume(tmp_path, resume="auto")


def test_resume_auto_on_a_published_checkpoint_starts_a_run_of_its_own(tmp_path):
    """With `True` it would go on beside the checkpoint; a start there would write logs into it."""
    published = make(tmp_path / "ckpts" / "libero-policy")
    for name in ("dataset_statistics.json", "config.json"):
        (published / name).write_text("{}")
    run, found = resume(tmp_path / "runs", resume="auto", vla_path=str(published))
    assert (run.path.parent, found) == (tmp_path / "runs", None)
    checkpoint(run, 3)
    assert resume(tmp_path / "runs", resume="auto", vla_path=str(published))[1] == Resume(run.step_folder(3), 3, True)
    assert resume(tmp_path / "runs", vla_path=str(published), resume_step=9)[0].path == published


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ({"learning_rate": 1e-4}, r"--learning_rate 0\.0005 \(here 0\.0001\)"),
        ({"lora_rank": 64, "run_id_note": "x"}, r"--lora_rank 32 \(here 64\), --run_id_note None \(here x\)"),
        ({"grad_accumulation_steps": 4}, r"--grad_accumulation_steps 1 \(here 4\)"),
    ],
)
def test_a_near_miss_is_named(tmp_path, flags, difference):
    run_of(tmp_path, 7, run_id_note="another", learning_rate=1e-3, image_aug=False)
    near = run_of(tmp_path, 5)
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(near.path))} \(step 5\), started with {difference}"):
        resume(tmp_path, **flags)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"step": "5"}', '{"step": -1}', '{"step": 1.5}', '{"step": 6}', "{}", "\xff", "[" * 9999]
)
def test_damaged_state_is_one_sentence(tmp_path, content):
    run = run_of(tmp_path, 5)
    (run.step_folder(5) / "trainer_state" / "state.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"state\.json.*delete .*trainer_state.* to go on from another checkpoint"):
        resume(tmp_path)


def test_a_dry_run_is_not_refused_because_of_a_checkpoint(tmp_path, caplog):
    run_of(tmp_path, 5)
    given = {"vla_path": "openvla/openvla-7b", "dataset_name": "libero", "run_root_dir": tmp_path}
    config = FinetuneConfig(**given)
    with pytest.raises(ValueError, match="already is a checkpoint of this run"):
        find_resume(config, run_folder(config))
    assert find_resume(replace(config, dry_run=True), run_folder(config)) is None
    assert "would be refused" in caplog.text


def test_the_refusal_says_how_the_other_run_was_started(tmp_path):
    """finetune.py and finetune_align.py give the published names, which do not tell them apart."""
    run = run_of(tmp_path, 5)
    config = FinetuneAlignConfig(vla_path="openvla/openvla-7b", dataset_name="libero", run_root_dir=tmp_path)
    assert run_folder(config) == run
    with pytest.raises(ValueError, match=r"\(step 5, started with no alignment \(here one\)\)\. Continue"):
        find_resume(config, run)
