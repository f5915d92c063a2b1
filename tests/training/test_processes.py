"""Real processes: torchrun with two of them, kill -9, SIGTERM, and two processes against one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from prismo.models.component_files import read_component
from prismo.training.run_folder import RunFolder
from tests.training.conftest import REPOSITORY, assert_same_state, environment, figures, train

SCRIPT = REPOSITORY / "vla-scripts" / "finetune_align.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", "2"]
TIMEOUT = 240
STEPS = 8


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(), cwd=REPOSITORY, start_new_session=True
        )


def run(command: list[str], log: Path) -> None:
    process = start(command, log)
    assert process.wait(TIMEOUT) == 0, log.read_text()[-4000:]


def wait_until(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None, f"the process ended before it was expected:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.002)


def kill_9(process: subprocess.Popen[bytes]) -> None:
    """Kill launcher, ranks and data workers at once; nobody can clean up."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in everyone:
        member.kill()
    process.wait(TIMEOUT)
    psutil.wait_procs(everyone, timeout=10)


def logged(run_root: Path) -> int:
    """Updates that the log shows."""
    path = run_root / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_reduction_of_gradients(tmp_path):
    log = tmp_path / "log"
    run([*TORCHRUN, str(REPOSITORY / "tests" / "training" / "two_ranks.py")], log)
    results = json.loads(log.read_text().splitlines()[-1])
    assert results["ours"] == []
    assert results["original"] == ["head.bias", "head.weight"]  # so the check does see an unreduced head (defect 1)
    assert results["reductions"] == [1, 1]  # once per update, also with three micro-batches
    assert results["distance"] < 1e-6
    assert results["refused"] is True
    assert results["any"] is True
    assert results["mean"] == 0.5


@pytest.fixture(scope="module")
def two_processes(flags, tmp_path_factory) -> Path:
    """An uninterrupted run of two processes, with dropout and two data workers each."""
    root = tmp_path_factory.mktemp("two")
    run([*TORCHRUN, str(SCRIPT), *two_process_flags(flags, root)], root / "log")
    return root


def two_process_flags(flags, root: Path, **changes: object) -> list[str]:
    return flags(root, **({"batch_size": 1, "max_steps": STEPS, "save_freq": 2, "num_workers": 1} | changes))


@pytest.mark.slow
def test_two_processes_killed_and_resumed(two_processes, flags, tmp_path):
    """kill -9 after a checkpoint, resume, SIGTERM in the middle of an update, resume: the same run bit for bit.

    The trainer itself refuses to save weights that differ between processes, so both ranks agreed at every checkpoint.
    """
    command = [*TORCHRUN, str(SCRIPT), *two_process_flags(flags, tmp_path)]
    run_folder = RunFolder(tmp_path / "run")
    log = tmp_path / "log"
    process = start(command, log)
    wait_until(process, log, lambda: run_folder.step_folder(2).is_dir() and logged(tmp_path) >= 3)
    kill_9(process)
    assert run_folder.checkpoints()[0].step < STEPS

    process = start([*command, "--resume", "True"], log)
    wait_until(process, log, lambda: "resumed at update" in log.read_text())
    before = logged(tmp_path)  # what the killed run logged after its checkpoint is gone
    wait_until(process, log, lambda: logged(tmp_path) > before)
    # As a cluster does it, to every process of the job; the launcher then passes it on once more.
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        member.send_signal(signal.SIGTERM)
    process.wait(TIMEOUT)
    assert "SIGTERM: finishing this update, then saving" in log.read_text()
    newest = run_folder.checkpoints()[0]
    assert newest.resumable
    assert before < newest.step == logged(tmp_path)
    assert not list(tmp_path.glob(".run--*"))  # no half-written folder is left

    run([*command, "--resume", "True"], log)
    whole = RunFolder(two_processes / "run")
    assert_same_state(run_folder.step_folder(STEPS), whole.step_folder(STEPS))
    assert figures(run_folder.path) == figures(whole.path)


def test_two_processes_equal_one_with_the_double_batch(two_processes, flags, tmp_path):
    """Also in the action head, which the original trains per process (defect 1)."""
    assert train(flags(tmp_path, batch_size=2, max_steps=2)) == 0
    ours, alone = (RunFolder(root / "run").step_folder(2) for root in (two_processes, tmp_path))
    for stem in ("action_head", "proprio_projector", "align_projector"):
        left, right = (read_component(folder / f"{stem}--2_checkpoint.pt") for folder in (ours, alone))
        assert max((left[name] - right[name]).abs().max().item() for name in left) < 2e-5, stem
    left, right = (load_file(folder / "lora_adapter" / "adapter_model.safetensors") for folder in (ours, alone))
    assert max((left[name] - right[name]).abs().max().item() for name in left) < 2e-5
    one, two = figures(tmp_path / "run"), figures(two_processes / "run")
    for step in (1, 2):
        for name in ("loss", "align_loss", "gradient_norm", "position_error_mm", "epoch"):
            assert two[step][name] == pytest.approx(one[step][name], rel=2e-4), (step, name)


def test_resume_with_another_number_of_processes(two_processes, flags, tmp_path):
    """One process goes on where two stopped: the same samples, at the double batch."""
    shutil.copytree(two_processes, tmp_path / "copy")
    last = RunFolder(tmp_path / "copy" / "run").step_folder(STEPS)
    position = json.loads((last / "trainer_state" / "state.json").read_text())
    assert position["world_size"] == 2
    assert position["data"] == {"epoch": 0, "sample": 2 * STEPS}
    arguments = two_process_flags(flags, tmp_path / "copy", batch_size=2, max_steps=STEPS + 1, num_workers=0)
    assert train([*arguments, "--resume", "True"]) == 0
    after = RunFolder(tmp_path / "copy" / "run").step_folder(STEPS + 1)
    stored = json.loads((after / "trainer_state" / "state.json").read_text())
    assert (stored["world_size"], stored["step"]) == (1, STEPS + 1)
    assert stored["data"] == {"epoch": 0, "sample": 2 * STEPS + 2}


def stop_in_the_middle_of_a_save(process: subprocess.Popen[bytes], run_folder: RunFolder, log: Path) -> None:
    """Freeze the process while it writes a checkpoint that is not the first."""

    def caught() -> bool:
        if not (run_folder.checkpoints() and list(run_folder.path.parent.glob(".run--*_chkpt.*"))):
            return False
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        if list(run_folder.path.parent.glob(".run--*_chkpt.*/lora_adapter")):
            return True
        process.send_signal(signal.SIGCONT)  # too early or too late: the next one
        return False

    wait_until(process, log, caught)


def test_one_process_killed_while_saving_and_resumed(flags, tmp_path):
    """Plain `python`, no torchrun: kill -9 in the middle of a save, then resume in another process."""
    options = {"max_steps": STEPS, "save_freq": 1, "batch_size": 1}
    assert train(flags(tmp_path / "whole", **options)) == 0
    log = tmp_path / "log"
    process = start([sys.executable, str(SCRIPT), *flags(tmp_path, **options)], log)
    run_folder = RunFolder(tmp_path / "run")
    stop_in_the_middle_of_a_save(process, run_folder, log)
    kill_9(process)
    newest = run_folder.checkpoints()[0]
    assert newest.resumable
    assert newest.step < STEPS
    assert list(tmp_path.glob(".run--*_chkpt.*")), "the kill did not hit a save"
    assert train(flags(tmp_path, resume=True, **options)) == 0
    assert not list(tmp_path.glob(".run--*"))
    assert_same_state(run_folder.step_folder(STEPS), RunFolder(tmp_path / "whole" / "run").step_folder(STEPS))
    assert figures(run_folder.path) == figures(tmp_path / "whole" / "run")


def test_ctrl_c_saves_and_ends_with_success(flags, tmp_path):
    log = tmp_path / "log"
    arguments = flags(tmp_path, max_steps=1000, num_workers=1)
    process = start([sys.executable, str(SCRIPT), *arguments], log)
    wait_until(process, log, lambda: logged(tmp_path) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the data workers as well
    assert process.wait(TIMEOUT) == 0, log.read_text()
    text = log.read_text()
    assert "SIGINT: finishing this update, then saving" in text
    assert "Traceback" not in text
    newest = RunFolder(tmp_path / "run").checkpoints()[0]
    assert newest.resumable
    assert newest.step == logged(tmp_path)
    assert train(flags(tmp_path, max_steps=newest.step + 1, resume=True)) == 0
