"""What a run leaves to be found: links, its log, the curves, and a summary with the next command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from prismo.merging.merge import merge
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig, parse_config
from prismo.training.curves import draw_curves
from prismo.training.run_folder import RunFolder, find_resume, run_folder
from prismo.training.summary import report, resume_command, run_summary
from prismo.util.files import point_link, write_json
from prismo.util.schema import JsonObject, read_json
from tests.training.conftest import train


@pytest.fixture
def copied(long_run: Path, tmp_path: Path) -> Path:
    """A copy of the run and its checkpoints, with its links."""
    shutil.copytree(long_run.parent, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs" / "run"


def test_links_lead_to_the_newest(long_run):
    root = long_run.parent
    assert os.readlink(root / "latest") == "run"
    assert os.readlink(long_run / "latest") == "../run--6_chkpt"
    assert (root / "latest" / "latest" / "lora_adapter").is_dir()
    assert [checkpoint.step for checkpoint in RunFolder(long_run).checkpoints()] == [6, 4]


def test_a_link_is_replaced_and_nothing_else_is(tmp_path):
    for name in ("a", "b", "real"):
        (tmp_path / name).mkdir()
    for target in ("a", "b"):
        point_link(tmp_path / "latest", tmp_path / target)
        assert os.readlink(tmp_path / "latest") == target
    (tmp_path / "a" / "far").mkdir()
    (tmp_path / "b" / "near").symlink_to(tmp_path / "a" / "far")
    point_link(tmp_path / "b" / "near" / "link", tmp_path / "real")  # ".." of `near` is not where `near` lies
    assert (tmp_path / "a" / "far" / "link").resolve() == tmp_path / "real"
    point_link(tmp_path / "real", tmp_path / "a")  # somebody's folder of that name
    point_link(tmp_path / "absent" / "latest", tmp_path / "a")  # where no link can be made
    assert not (tmp_path / "real").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "real", "latest"}


def test_log_has_a_line_per_checkpoint_and_goes_on(copied, flags, caplog):
    caplog.set_level("INFO")
    lines = (copied / "log.txt").read_text().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d .* WARNING 2 samples per update", lines[0])
    saved = [line for line in lines if "saved" in line and "chkpt" in line]
    assert re.search(r"INFO update 4: saved .*run--4_chkpt \(\d+\.\d MB, \d+\.\d s\)$", saved[0])
    assert re.search(r"update 6: saved .*--6_chkpt .*; .*--4_chkpt can no longer be resumed from", saved[1])
    options = {"max_steps": 7, "lora_dropout": 0.1, "use_val_set": False, "resume": True}
    assert train(flags(copied.parent, **options)) == 0
    after = (copied / "log.txt").read_text()
    assert after.startswith("\n".join(lines))
    assert "resumed at update 6 of 7" in after
    assert os.readlink(copied / "latest") == "../run--7_chkpt"


def test_summary_leads_from_the_run_to_the_merge_to_the_evaluation(copied, tiny_base):
    text = report(copied.parent / "latest")
    assert "run: 6 of 6 updates saved, finished" in text
    assert f"{copied}: log.txt, metrics.jsonl, curves.png, align_maps (1 pictures)" in text
    newest = copied.with_name("run--6_chkpt")
    assert f"{newest} (adapter, not merged); 1 older beside it" in text
    assert re.search(r"training   loss [\d.]+, align_loss [\d.]+, .*\(update 6\)", text)
    command = shlex.split(text.splitlines()[-1])
    assert command[2:] == ["--base_checkpoint", str(tiny_base), "--lora_finetuned_checkpoint_dir", str(newest)]
    merge(command[3], Path(command[5]))
    assert report(newest).splitlines()[-1] == (
        f"  prismo eval --pretrained_checkpoint {newest} --task_suite_name libero_spatial"
    )


def test_summary_of_a_stopped_run_resumes_it(copied):
    flags = read_json(copied / "training_config.json", JsonObject) | {"max_steps": 9}
    write_json(copied / "training_config.json", flags)
    text = run_summary(copied)
    assert "6 of 9 updates saved, not finished" in text
    console, command, *words = shlex.split(text.splitlines()[-1])
    assert (console, command) == ("prismo", "train")
    config = parse_config(FinetuneAlignConfig, words)
    assert (config.lora_dropout, config.vla_layers_align, config.lora_rank) == (0.1, 2, 4)
    assert find_resume(config, run_folder(config)).folder == copied.with_name("run--6_chkpt")
    sharded = resume_command(copied, {name: flags[name] for name in ("vla_path", "max_steps")} | {"world_size": 4})
    assert sharded.startswith("torchrun --standalone --nnodes 1 --nproc-per-node 4 -m prismo finetune --vla_path")
    assert parse_config(FinetuneConfig, shlex.split(sharded)[9:]).run_id_override == "run"


def test_curves_are_drawn_with_the_checkpoint(copied, tmp_path, flags, caplog, monkeypatch):
    draw_curves(copied)
    with Image.open(copied / "curves.png") as picture:
        assert picture.width > 1000
    (copied / "curves.png").unlink()
    draw_curves(copied, fewest=10)
    assert not (copied / "curves.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(flags(tmp_path, max_steps=2, save_freq=1, batch_size=1)) == 0
    said = [record.message for record in caplog.records if "curves.png" in record.message]
    assert len(said) == 1
    assert "no curves.png is drawn: the package matplotlib" in said[0]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of a run: it has no training_config\.json"):
        report(tmp_path)
