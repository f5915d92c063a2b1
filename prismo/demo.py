"""Runs the whole chain at a small size: every stage is the command that a user would type (it is printed)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from prismo.testing.tiny import make_tiny_openvla, make_tiny_vggt
from prismo.training.curves import CURVES, draw_curves
from prismo.util.cli import BrokenOffError
from prismo.util.reaper import end_descendants_of_this_process
from prismo.util.schema import JsonObject, read_json, read_json_lines

DATASET = "libero_object_no_noops"
_SILENCE_S = 20  # after which a stage that works says how far it is
MARKER = ".made_by_prismo_demo"


@dataclass(frozen=True)
class Stage:
    """One row of the final table."""

    name: str
    seconds: float
    result: str


class Demo:
    """Runs the stages in order and remembers how long each took.

    Args:
        folder: of everything that is made.
        tasks: of LIBERO-Object.
        demos: demonstrations per task.
        train_steps: updates.
        trials: roll-outs per task.
        max_steps: simulator steps of a roll-out.
    """

    def __init__(self, folder: Path, *, tasks: int, demos: int, train_steps: int, trials: int, max_steps: int) -> None:
        self.folder = folder.resolve()
        self.demos, self.train_steps, self.trials, self.max_steps = demos, train_steps, trials, max_steps
        self.stages: list[Stage] = []
        assets = os.environ.get("PRISMO_LIBERO_ASSETS")
        self.assets = assets or "stand-ins"
        self.tasks = json.dumps(list(range(tasks)))

    def stage(self, name: str, command: str, *flags: str) -> None:
        """Run a command of this project; its output goes to `logs/`, the end of it to the screen if it fails."""
        print(f"\n[{len(self.stages) + 1}] {name}\n$ prismo {command} {shlex.join(flags)}", flush=True)
        log = self.folder / "logs" / f"{len(self.stages) + 1}-{name.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        code = _run([sys.executable, "-m", "prismo", *command.split(), *flags], log)
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            print(tail, file=sys.stderr)
            raise BrokenOffError(f"stage '{name}' failed with exit code {code}; all it said is in {log}")
        self.stages.append(Stage(name, time.monotonic() - start, ""))
        print(f"    {self.stages[-1].seconds:.0f} s", flush=True)

    def result(self, text: str) -> None:
        """Say what the latest stage gave."""
        last = self.stages.pop()
        self.stages.append(Stage(last.name, last.seconds, text))
        print(f"    {text}", flush=True)

    def run(self) -> None:
        end_descendants_of_this_process()
        self.demonstrations()
        self.dataset()
        self.checkpoints()
        run = self.train()
        self.merge(run)
        self.evaluate(run)
        self.report(run)

    def demonstrations(self) -> None:
        self.stage(
            "scripted demonstrations",
            "data collect",
            *("--task_suite_name", "libero_object", "--task_ids", self.tasks),
            *("--num_demos_per_task", str(self.demos), "--output_dir", str(self.folder / "hdf5")),
            *("--libero_assets", self.assets, "--image_size", "128"),
        )
        files = sorted((self.folder / "hdf5").glob("*.hdf5"))
        self.result(f"{len(files)} files, assets: {self.assets}")

    def dataset(self) -> None:
        self.stage(
            "RLDS dataset",
            "data build",
            *("--hdf5_dir", str(self.folder / "hdf5"), "--dataset_name", DATASET),
            *("--data_root_dir", str(self.folder / "rlds")),
        )
        shards = list((self.folder / "rlds" / DATASET).rglob("*.tfrecord*"))
        self.result(f"{len(shards)} shards, {sum(s.stat().st_size for s in shards) / 1e6:.1f} MB")

    def checkpoints(self) -> None:
        """Random weights in the official layouts, in place of openvla-7b and VGGT-1B."""
        print(f"\n[{len(self.stages) + 1}] small checkpoints: random weights in the official layouts", flush=True)
        start = time.monotonic()
        make_tiny_openvla(self.folder / "ckpts" / "openvla-small", hidden_size=128, dtype=torch.float32)
        make_tiny_vggt(self.folder / "ckpts" / "vggt.pt", image_size=224)
        self.stages.append(Stage("small checkpoints", time.monotonic() - start, "random weights, official layouts"))

    def train(self) -> Path:
        steps = self.train_steps
        self.stage(
            "training with alignment",
            "train",
            *("--vla_path", str(self.folder / "ckpts" / "openvla-small")),
            *("--vggt_path", str(self.folder / "ckpts" / "vggt.pt")),
            *("--data_root_dir", str(self.folder / "rlds"), "--dataset_name", DATASET),
            *("--run_root_dir", str(self.folder / "runs"), "--run_id_override", "demo"),
            *("--use_proprio", "True", "--num_images_in_input", "2", "--batch_size", "8"),
            *("--vla_layers_align", "3", "--use_vlm_norm", "True", "--use_vggt_pe", "True"),
            *("--max_steps", str(steps), "--save_freq", str(steps), "--wandb_log_freq", "5"),
            *("--num_steps_before_decay", str(int(0.8 * steps)), "--learning_rate", "1e-3"),
            *("--merge_lora_during_training", "False", "--align_map_freq", str(steps)),
        )
        run = self.folder / "runs" / "demo"
        rows = training_rows(run)
        tenth = max(1, len(rows) // 10)

        def change(key: str) -> str:
            first, last = (sum(row[key] for row in part) / tenth for part in (rows[:tenth], rows[-tenth:]))
            return f"{first:.3f} -> {last:.3f}"

        self.result(f"{steps} updates; action loss {change('loss')}, alignment {change('align_loss')}")
        return run

    def merge(self, run: Path) -> None:
        self.stage(
            "merge",
            "merge",
            *("--base_checkpoint", str(self.folder / "ckpts" / "openvla-small")),
            *("--lora_finetuned_checkpoint_dir", str(self.checkpoint(run))),
        )

    def evaluate(self, run: Path) -> None:
        self.stage(
            "roll-outs",
            "eval",
            *("--pretrained_checkpoint", str(self.checkpoint(run)), "--task_suite_name", "libero_object"),
            *("--task_ids", self.tasks, "--num_trials_per_task", str(self.trials)),
            *("--libero_assets", self.assets, "--env_img_res", "128", "--max_steps", str(self.max_steps)),
            *("--local_log_dir", str(self.folder / "eval"), "--rollout_dir", str(self.folder / "videos")),
        )
        results = read_json(next((self.folder / "eval").glob("*/results.json")), JsonObject)["total"]
        rate, episodes = results["success_rate"], results["episodes"]
        self.result(f"{episodes} episodes, " + ("all ended in errors" if rate is None else f"success rate {rate:.0%}"))

    def checkpoint(self, run: Path) -> Path:
        return run.with_name(f"{run.name}--{self.train_steps}_chkpt")

    def report(self, run: Path) -> None:
        """Table on the screen and in `report.md`."""
        draw_curves(run)
        width = max(len(stage.name) for stage in self.stages)
        rows = [f"| {'stage':{width}} | seconds | result |", f"|{'-' * (width + 2)}|---------|--------|"]
        rows += [f"| {s.name:{width}} | {s.seconds:7.0f} | {s.result} |" for s in self.stages]
        rows += [f"| {'total':{width}} | {sum(s.seconds for s in self.stages):7.0f} | |"]
        (self.folder / "report.md").write_text("\n".join(rows) + "\n")
        print("\n" + "\n".join(rows))
        print(f"\nTraining curve: {run / CURVES}")
        for video in sorted((self.folder / "videos").rglob("*.mp4"))[:1]:
            print(f"A roll-out:     {video}")
        print(f"Look around in: {self.folder}")


def _run(command: list[str], log: Path) -> int:
    """Run a command with its output in a file; from time to time, the last line of it goes to the screen."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        while True:
            try:
                return process.wait(_SILENCE_S)
            except subprocess.TimeoutExpired:
                last = re.split(r"[\r\n]+", log.read_text(errors="replace").rstrip())[-1]
                print(f"    {last[:110]}", flush=True)
    finally:
        process.kill()


def training_rows(run: Path) -> list[dict[str, float]]:
    """The logged training steps of a run."""
    return [row for row in read_json_lines(run / "metrics.jsonl", JsonObject) if row["split"] == "train"]


def fresh_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the folder of everything, in the place of an old one if that was made here: its marker file says so."""
    if folder.exists():
        if not overwrite:
            raise FileExistsError(f"{folder} exists; look at {folder}/report.md, or add --overwrite to make it anew")
        if not (folder / MARKER).is_file():
            raise FileExistsError(
                f"{folder} was not made by the demo; name another folder with --output, or remove it yourself"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
