"""Real processes: torchrun with two of them, kill -9, SIGTERM, and two processes against one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from prismo.models.component_files import read_component
from prismo.training.run_folder import RunFolder
from tests.training.conftest import REPOSITORY, assert_same_state, environment, figures, train

pytestmark = pytest.mark.processes

SCRIPT = REPOSITORY / "vla-scripts" / "finetune_align.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", "2"]
TIMEOUT = 240
STEPS = 8


_STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    """A test that fails in the middle leaves no process behind."""
    yield
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            kill_9(process)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(), cwd=REPOSITORY, start_new_session=True
        )
    _STARTED.append(process)
    return process


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


def test_two_machines_equal_one(two_processes, flags, tmp_path):
    """A torchrun on each of two machines that share a disk, one process each: bit for bit the run of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    agents = []
    for rank in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, "--node-rank", str(rank)]
        agents.append(start([*command, str(SCRIPT), *two_process_flags(flags, tmp_path)], tmp_path / f"log-{rank}"))
    for rank, agent in enumerate(agents):
        assert agent.wait(TIMEOUT) == 0, (tmp_path / f"log-{rank}").read_text()[-4000:]
    ours, one = (RunFolder(root / "run") for root in (tmp_path, two_processes))
    assert_same_state(ours.step_folder(STEPS), one.step_folder(STEPS))
    assert figures(ours.path) == figures(one.path)


def half_written(run_folder: RunFolder) -> list[Path]:
    """Checkpoints that a process is writing."""
    return list(run_folder.path.parent.glob(f".{run_folder.path.name}--*_chkpt.????????"))


def stop_in_the_middle_of_a_save(process: subprocess.Popen[bytes], run_folder: RunFolder, log: Path) -> None:
    """Freeze the process while it writes a checkpoint that is not the first."""

    def caught() -> bool:
        if not (run_folder.checkpoints() and half_written(run_folder)):
            return False
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        if any((folder / "lora_adapter").is_dir() for folder in half_written(run_folder)):
            return True
        process.send_signal(signal.SIGCONT)  # too early or too late: the next one
        return False

    wait_until(process, log, caught)


SAVE_OFTEN = {"max_steps": STEPS, "save_freq": 1, "batch_size": 1}


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> RunFolder:
    """A run of one process that saves after every update."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert train(flags(root, **SAVE_OFTEN)) == 0
    return RunFolder(root / "run")


def test_one_process_killed_while_saving_and_resumed(undisturbed, flags, tmp_path, caplog, capsys):
    """Plain `python`, no torchrun: kill -9 in the middle of a save, then resume in another process.

    Before the kill, while the process is only frozen, nobody else gets its run.
    """
    log = tmp_path / "log"
    process = start([sys.executable, str(SCRIPT), *flags(tmp_path, **SAVE_OFTEN)], log)
    run_folder = RunFolder(tmp_path / "run")
    stop_in_the_middle_of_a_save(process, run_folder, log)
    writing = half_written(run_folder)
    given = [*flags(tmp_path, **SAVE_OFTEN, resume=True), "--vla_path", str(run_folder.checkpoints()[0].folder)]
    overridden = given.index("--run_id_override")
    for arguments in (
        flags(tmp_path, **SAVE_OFTEN),
        flags(tmp_path, **SAVE_OFTEN, resume=True),
        given[:overridden] + given[overridden + 2 :],  # goes on beside the checkpoint
    ):
        caplog.clear()
        assert train(arguments) == 2
        assert f"process {process.pid} on" in caplog.text
        assert "is at work on" in caplog.text
    assert train(flags(tmp_path, **SAVE_OFTEN, resume=True, dry_run=True)) == 0
    assert "first batch" in capsys.readouterr().out
    assert half_written(run_folder) == writing
    kill_9(process)
    newest = run_folder.checkpoints()[0]
    assert newest.resumable
    assert newest.step < STEPS
    assert writing, "the kill did not hit a save"
    assert train(flags(tmp_path, resume=True, **SAVE_OFTEN)) == 0
    assert not list(tmp_path.glob(".run--*"))
    assert_same_state(run_folder.step_folder(STEPS), undisturbed.step_folder(STEPS))
    assert figures(run_folder.path) == figures(undisturbed.path)


def test_two_runs_whose_names_begin_alike(undisturbed, flags, tmp_path):
    """`run` is started, saves, prunes and is resumed while `run--note` beside it is in the middle of a save."""
    log = tmp_path / "log"
    process = start([sys.executable, str(SCRIPT), *flags(tmp_path, **SAVE_OFTEN, run_id_override="run--note")], log)
    note, plain = RunFolder(tmp_path / "run--note"), RunFolder(tmp_path / "run")
    stop_in_the_middle_of_a_save(process, note, log)
    writing, finished = half_written(note), note.checkpoints()
    for steps in (2, 3):
        options = SAVE_OFTEN | {"max_steps": steps, "keep_last": 1, "resume": steps == 3}
        assert train(flags(tmp_path, **options)) == 0
        assert (half_written(note), note.checkpoints()) == (writing, finished)
    process.send_signal(signal.SIGCONT)
    assert train(flags(tmp_path, **SAVE_OFTEN, keep_last=1, resume=True)) == 0  # at the same time
    assert process.wait(TIMEOUT) == 0, log.read_text()[-4000:]
    for run_folder in (note, plain):
        assert_same_state(run_folder.step_folder(STEPS), undisturbed.step_folder(STEPS))
        assert figures(run_folder.path) == figures(undisturbed.path)
    assert [c.step for c in plain.checkpoints()] == [STEPS]
    assert [c.step for c in note.checkpoints()] == list(range(STEPS, 0, -1))
    assert not list(tmp_path.glob(".run*"))


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
