"""Runs a shell block as it stands: bash reads it, and the commands it calls run in this process, at tiny sizes.

Starting Python with torch for each of them would take most of the time. So `PATH` is a folder in which every
command is a few lines of bash: they hand directory and arguments over and wait for the exit code. Other commands than
these few are not found, so that no block installs or downloads anything. What a block sets reaches scripts only.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from prismo.commands import main

STEPS = 2
TRAIN = {
    "max_steps": STEPS, "batch_size": 2, "lora_rank": 4, "num_workers": 0, "wandb_log_freq": 1, "device": "cpu",
}  # fmt: skip
ALIGN = {"vla_layers_align": 2, "align_map_freq": 0}
ROLL_OUT = {
    "task_ids": 0, "num_trials_per_task": 1, "max_steps": 2, "env_img_res": 64, "libero_assets": "stand-ins",
    "task_suite_name": "libero_object", "device": "cpu",
}  # fmt: skip
COLLECT = {"task_ids": 0, "num_demos_per_task": 1, "image_size": 64, "num_workers": 1, "libero_assets": "stand-ins"}
# Command -> what makes it small. The last of a repeated flag counts.
SIZES = {
    "train": TRAIN | ALIGN,
    "finetune": TRAIN,
    "eval": ROLL_OUT,
    "data collect": COLLECT,
    "vla-scripts/finetune_align.py": TRAIN | ALIGN,
    "vla-scripts/finetune.py": TRAIN,
}
_STUB = """#!/usr/bin/env bash
printf '%s\\0' "$PWD" "{name}" "$@" > "{requests}"
read -r code < "{answers}"
exit "$code"
"""


class Shell:
    """A folder in which blocks run.

    Args:
        folder: the block's current directory.
        download: what `hf download` does: (repository, folder).
    """

    def __init__(self, folder: Path, download: Callable[[str, Path], None]) -> None:
        self.folder = folder
        self.download = download
        self._requests, self._answers = folder / ".requests", folder / ".answers"
        self._bin = folder / ".bin"
        self._bin.mkdir()
        for pipe in (self._requests, self._answers):
            os.mkfifo(pipe)
        for name in ("prismo", "python", "torchrun", "hf"):
            stub = self._bin / name
            stub.write_text(_STUB.format(name=name, requests=self._requests, answers=self._answers))
            stub.chmod(0o755)
        for name in ("bash", "dirname", "mkdir", "sed"):
            (self._bin / name).symlink_to(shutil.which(name) or name)

    def run(self, block: str) -> int:
        """Run a block; returns its exit code, that of the first command that fails."""
        script = self.folder / ".block.sh"
        script.write_text(f"set -euo pipefail\n{block}")
        end = f'bash "{script}"; printf "%s\\0" "$?" > "{self._requests}"'
        environment = os.environ | {"PATH": str(self._bin)}
        with subprocess.Popen([self._bin / "bash", "-c", end], cwd=self.folder, env=environment) as bash:
            while len(request := self._requests.read_bytes().decode().split("\0")[:-1]) > 1:
                directory, *command = request
                with patch.object(sys, "argv", command):
                    code = self._command(Path(directory), command)
                self._answers.write_text(f"{code}\n")
            bash.wait()
        return int(request[0])

    def _command(self, directory: Path, command: list[str]) -> int:
        before = Path.cwd()
        os.chdir(directory)
        try:
            return self._call(*command) or 0
        except SystemExit as stop:
            return int(stop.code or 0)
        except Exception:  # bash waits for an answer
            traceback.print_exc()
            return 1
        finally:
            os.chdir(before)

    def _call(self, program: str, *arguments: str) -> int | None:
        if program == "hf":
            return self._hf(*arguments)
        if program == "torchrun":  # one process stands for all; tests/training/test_processes.py starts several
            first = next(i for i, word in enumerate(arguments) if word == "-m" or word.endswith(".py"))
            return self._call("python", *arguments[first:])
        if program == "python" and arguments[:2] == ("-m", "prismo"):
            return self._call("prismo", *arguments[2:])
        if program == "python":
            sys.argv = small(list(arguments))
            runpy.run_path(arguments[0], run_name="__main__")
            return 0
        return main(small(list(arguments)))

    def _hf(self, verb: str, repository: str, *arguments: str) -> None:
        assert verb == "download"
        self.download(repository, Path(arguments[arguments.index("--local-dir") + 1]))


def small(arguments: list[str]) -> list[str]:
    """The arguments of a command with those that make it small behind them."""
    arguments = [re.sub(r"--\d+_chkpt$", f"--{STEPS}_chkpt", argument) for argument in arguments]
    command = next((name for name in (" ".join(arguments[:2]), arguments[0]) if name in SIZES), None)
    sizes = dict(SIZES.get(command, {}))
    if command == "eval":
        suite = arguments[arguments.index("--task_suite_name") + 1]
        if "--unnorm_key" not in arguments:  # the stand-ins know one suite only
            sizes["unnorm_key"] = f"{suite}_no_noops"
        if "--save_videos" not in arguments:
            sizes["save_videos"] = "none"
    return [*arguments, *(word for name, value in sizes.items() for word in (f"--{name}", str(value)))]


def copy(source: Path, target: Path) -> None:
    """A file or a folder, under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
