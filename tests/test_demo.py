"""The chain of `make demo` at the smallest size: every entry script on the output of the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prismo.demo import fresh_folder

ROOT = Path(__file__).resolve().parents[1]


def test_only_its_own_folder_is_overwritten(tmp_path: Path) -> None:
    """`make demo` always says --overwrite; a user's folder of that name may hold years of work, and logs/ as well."""
    theirs = tmp_path / "theirs"
    (theirs / "logs").mkdir(parents=True)
    (theirs / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"theirs was not made by the demo; name another folder with --output"):
        fresh_folder(theirs, overwrite=True)
    assert (theirs / "thesis.tex").read_text() == "precious"
    ours = tmp_path / "new" / "ours"
    fresh_folder(ours, overwrite=True)
    (ours / "report.md").write_text("old")
    with pytest.raises(FileExistsError, match=r"add --overwrite"):
        fresh_folder(ours, overwrite=False)
    fresh_folder(ours, overwrite=True)
    assert not (ours / "report.md").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("drawing")
@pytest.mark.processes
def test_smallest_demo(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    sizes = ("--tasks", "1", "--demos", "1", "--train_steps", "12", "--trials", "1", "--max_steps", "16")
    # Without assets, whatever this machine has: a newcomer has none.
    environment = {k: v for k, v in os.environ.items() if k != "PRISMO_LIBERO_ASSETS"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", "--output", str(folder), *sizes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    report = (folder / "report.md").read_text()
    for stage in ("demonstrations", "RLDS dataset", "training", "merge", "roll-outs", "total"):
        assert stage in report
    assert "stand-ins" in report
    assert (folder / "runs" / "demo" / "curves.png").stat().st_size > 10_000
    assert len(list((folder / "videos").rglob("*.mp4"))) == 1

    rows = [json.loads(line) for line in (folder / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["align_loss"] for row in rows if row["split"] == "train"]
    assert len(losses) == 2  # every five updates
    assert all(0 < loss < 2.5 for loss in losses)  # that they fall is for tests/training/test_run.py to prove

    checkpoint = folder / "runs" / "demo--12_chkpt"
    assert (checkpoint / "lora_adapter").is_dir()
    assert json.loads((checkpoint / "config.json").read_text())["norm_stats"].keys() == {"libero_object_no_noops"}
    results = json.loads(next((folder / "eval").glob("*/results.json")).read_text())
    assert results["total"]["episodes"] == 1
    assert results["total"]["errors"] == 0
    assert results["versions"]["assets"] == "stand-ins"

    again = subprocess.run(
        [sys.executable, "scripts/demo.py", "--output", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
