"""Processes end with the one that started them, whatever they are doing; SIGTERM cleans up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from tests.processes import MARK, ended, left_after, members, members_once
from tests.training.conftest import REPOSITORY, environment

pytestmark = pytest.mark.processes

PROGRAM = """
import sys, threading, time
from prismo.sim.libero_worker import LiberoWorker
from prismo.sim.assets import resolve_assets

def start():
    worker = LiberoWorker(resolve_assets("stand-ins"), cameras=False)
    worker.reset("libero_object", 0, 0)
    workers.append(worker)

workers = []
if sys.argv[1] == "thread":
    threading.Thread(target=lambda: (start(), time.sleep(1000))).start()
    while not workers:
        time.sleep(0.1)
else:
    start()
print(workers[0].pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("starter", "busy"), [("main", True), ("main", False), ("thread", False)], ids=["stopped", "main", "thread"]
)
def test_a_simulator_ends_with_its_parent(starter, busy):
    """Also one that cannot run a line of Python (stopped), as inside a driver that hangs."""
    mark = uuid.uuid4().hex
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, starter],
        stdout=subprocess.PIPE,
        env=environment() | {MARK: mark},
        cwd=REPOSITORY,
        text=True,
        start_new_session=True,
    )
    try:
        simulator = int(parent.stdout.readline())
        assert set(members(mark)) == {parent.pid, simulator}
        if busy:
            os.kill(simulator, signal.SIGSTOP)
            time.sleep(0.1)
        parent.kill()
        assert ended(parent, 5)
        assert not left_after(5, mark)
    finally:
        for pid in members(mark):
            os.kill(pid, signal.SIGKILL)


def test_sigterm_ends_a_command_cleanly(tmp_path):
    """SIGTERM in a command runs its clean-up: the temporary folder is gone, the exit code is the usual one."""
    program = (
        "import sys, time, pathlib\n"
        "from dataclasses import dataclass\n"
        "from prismo.util.cli import run_command\n"
        "from prismo.util.files import atomic_folder\n"
        "@dataclass\n"
        "class Flags:\n"
        "    folder: str\n"
        "def main(cfg):\n"
        "    with atomic_folder(cfg.folder) as folder:\n"
        "        print(folder, flush=True)\n"
        "        time.sleep(1000)\n"
        "sys.exit(run_command(main, Flags))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--folder", str(tmp_path / "made")],
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=REPOSITORY,
        text=True,
    )
    process.stdout.readline()
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


JOB = """
import subprocess, sys, time
from prismo.util.reaper import end_descendants_of_this_process

end_descendants_of_this_process()
child = "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN)\\n"
grandchild = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); print(1, flush=True)\\n"
subprocess.Popen([sys.executable, "-c", child + grandchild + "time.sleep(1000)"], start_new_session=True)
time.sleep(1000)
"""


def test_children_that_others_started_end_with_a_job():
    """As torch's compile workers, which look once a minute: deaf ones, in a group of their own, and their children."""
    mark = uuid.uuid4().hex
    job = subprocess.Popen(
        [sys.executable, "-c", JOB],
        stdout=subprocess.PIPE,
        env=environment() | {MARK: mark},
        cwd=REPOSITORY,
        text=True,
        start_new_session=True,
    )
    try:
        job.stdout.readline()
        assert len(members_once(4, mark)) == 4  # job, reaper, child, grandchild
        os.killpg(job.pid, signal.SIGKILL)
        assert ended(job, 5)
        assert not left_after(5, mark)
    finally:
        for pid in members(mark):
            os.kill(pid, signal.SIGKILL)
