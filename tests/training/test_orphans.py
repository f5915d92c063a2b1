"""Kills at random moments, to the process and to its group: no process is left after 5 s, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from prismo.training.run_folder import RunFolder
from tests.processes import MARK, ended, left_after
from tests.training.conftest import REPOSITORY, assert_same_state, environment, figures

pytestmark = pytest.mark.processes

SCRIPT = REPOSITORY / "vla-scripts" / "finetune_align.py"
KILLS = 30
WORKERS = 3
GRACE = 5.0
STEPS = 12


def start(arguments: list[str], mark: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment() | {MARK: mark},
            cwd=REPOSITORY,
            start_new_session=True,
        )


@pytest.mark.slow
def test_random_kills_leave_no_process_and_lose_nothing(flags, tmp_path):
    """TERM and KILL by turns, to the process and to the group, at any moment from the first import to the exit.

    Between them the run goes on with --resume auto; whenever it has reached its end, it must be that of an
    uninterrupted one, and another run begins.
    """
    generator = random.Random(7)
    options = {"max_steps": STEPS, "save_freq": 2, "batch_size": 1, "num_workers": WORKERS, "keep_last": 2}
    began = time.monotonic()
    whole = start(flags(tmp_path / "whole", **options), uuid.uuid4().hex, tmp_path / "whole.log")
    assert whole.wait(300) == 0, (tmp_path / "whole.log").read_text()[-4000:]
    seconds = time.monotonic() - began
    runs = 0
    for kill in range(KILLS):
        root = tmp_path / str(runs)
        log, mark = tmp_path / f"{runs}.log", uuid.uuid4().hex
        process = start(flags(root, resume="auto", **options), mark, log)
        time.sleep(generator.uniform(0, seconds))
        number = signal.SIGTERM if kill % 2 else signal.SIGKILL
        if process.poll() is None:
            (os.killpg if kill % 4 < 2 else os.kill)(process.pid, number)
        told = f"kill {kill}, {number.name}:\n{log.read_text(errors='replace')[-1500:]}"
        assert ended(process, 20), f"the command goes on after {told}"
        left = left_after(GRACE, mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"{left} are left by {told}"
        if finished(root):
            assert_as_uninterrupted(root, tmp_path / "whole")
            runs += 1
    last = start(flags(tmp_path / str(runs), resume="auto", **options), uuid.uuid4().hex, tmp_path / "last.log")
    assert last.wait(300) == 0, (tmp_path / "last.log").read_text()[-4000:]
    assert_as_uninterrupted(tmp_path / str(runs), tmp_path / "whole")


def finished(root: Path) -> bool:
    return any(checkpoint.step == STEPS for checkpoint in RunFolder(root / "run").checkpoints())


def assert_as_uninterrupted(root: Path, whole: Path) -> None:
    runs = [RunFolder(folder / "run") for folder in (root, whole)]
    assert_same_state(*(run.step_folder(STEPS) for run in runs))
    left, right = (figures(run.path) for run in runs)
    assert left == right
