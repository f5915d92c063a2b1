"""What a run left, where it lies, and the next command to type: at the end of a training and at any time after it.

`run_summary` only reads the folder of the run, so it says the same of one that ended weeks ago or was killed.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from prismo.models.folder import TRAINING_CONFIG, is_model
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.training.curves import CURVES, METRICS, draw_curves
from prismo.training.run_folder import RunFolder, SavedStep
from prismo.training.run_name import run_id
from prismo.training.text_log import LOG
from prismo.util.flags import flag_words
from prismo.util.schema import JsonObject, read_json, read_json_lines

# Figures that a line of text shows.
SHOWN = ("loss", "align_loss", "l1_loss", "position_error_mm", "rotation_error_deg")
_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
_JOINT = "libero_4_task_suites_no_noops"


@dataclass(frozen=True)
class _Run:
    """A run as its folder tells.

    Attributes:
        folder: of the run.
        flags: content of its training_config.json.
        checkpoints: newest first.
    """

    folder: Path
    flags: JsonObject
    checkpoints: tuple[SavedStep, ...]

    @property
    def step(self) -> int:
        """Updates that are saved."""
        return self.checkpoints[0].step if self.checkpoints else 0

    @property
    def finished(self) -> bool:
        return self.step >= self.flags["max_steps"]


def report(path: Path) -> str:
    """Draw the curves of a run anew and return its summary.

    Args:
        path: folder of a run, one of its checkpoints, or a link to either.

    Raises:
        FileNotFoundError: no run lies there.
        ValueError: a file of it is damaged.
    """
    folder = _run_of(path)
    if not (folder / METRICS).is_file():
        return run_summary(folder)
    try:
        draw_curves(folder)
    except ValueError as error:
        return f"{run_summary(folder)}\nno {CURVES} is drawn: {error}"
    return run_summary(folder)


def run_summary(folder: Path) -> str:
    """The summary of the run in `folder`; raises as `report` does."""
    path = folder / TRAINING_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of a run: it has no {TRAINING_CONFIG}")
    run = _Run(folder, read_json(path, JsonObject), tuple(RunFolder(folder).checkpoints()))
    state = "finished" if run.finished else "not finished"
    lines = [f"{folder.name}: {run.step:,} of {run.flags['max_steps']:,} updates saved, {state}"]
    lines += [f"  {name:10s} {text}" for name, text in (*_places(run), *_figures(folder))]
    return "\n".join([*lines, *_next(run)])


def _run_of(path: Path) -> Path:
    """The run of a path: itself, or the one that a checkpoint is of."""
    path = path.resolve()
    return path.with_name(re.sub(r"--\d+_chkpt$", "", path.name))


def _places(run: _Run) -> list[tuple[str, str]]:
    """Where things lie."""
    maps = len(list((run.folder / "align_maps").glob("*.png")))
    present = [name for name in (LOG, METRICS, CURVES, "tensorboard") if (run.folder / name).exists()]
    present += [f"align_maps ({maps} pictures)"] if maps else []
    rows = [("folder", f"{run.folder}: {', '.join(present)}")]
    if run.checkpoints:
        newest = run.checkpoints[0].folder
        merged = "complete model" if is_model(newest) else "adapter, not merged"
        older = f"; {len(run.checkpoints) - 1} older beside it" if len(run.checkpoints) > 1 else ""
        rows.append(("checkpoint", f"{newest} ({merged}){older}"))
    return rows


def _figures(folder: Path) -> list[tuple[str, str]]:
    """The last entries of the log."""
    if not (folder / METRICS).is_file():
        return []
    entries = read_json_lines(folder / METRICS, JsonObject, advice="delete that line")
    rows = []
    for split, name in (("train", "training"), ("val", "validation")):
        last = next((entry for entry in reversed(entries) if entry.get("split") == split), None)
        if last is not None:
            shown = ", ".join(f"{key} {last[key]:.4g}" for key in SHOWN if key in last)
            rows.append((name, f"{shown} (update {last['step']})"))
    return rows


def _next(run: _Run) -> list[str]:
    """The command that usually comes next, with a line that says what it does."""
    if not run.finished:
        return ["go on with this run:", f"  {resume_command(run.folder, run.flags)}"]
    newest = run.checkpoints[0].folder
    if not is_model(newest):
        return ["merge the newest checkpoint:", f"  {merge_command(run.flags['vla_path'], newest)}"]
    suite = next((name for name in _SUITES if run.flags["dataset_name"].startswith(name)), None)
    if run.flags["dataset_name"] == _JOINT:
        suite = _SUITES[0]
    return ["evaluate the newest checkpoint:", f"  {_evaluation(newest, suite)}"] if suite else []


def merge_command(base: str, checkpoint: Path) -> str:
    """What merges a checkpoint into its base."""
    return shlex.join(
        ["prismo", "merge", "--base_checkpoint", base, "--lora_finetuned_checkpoint_dir", str(checkpoint)]
    )


def resume_command(folder: Path, flags: JsonObject) -> str:
    """What continues a run: the flags that it was started with, as far as they are not the defaults.

    Args:
        folder: of the run.
        flags: content of its training_config.json.
    """
    aligned = "align_loss_coeff" in flags
    kind = FinetuneAlignConfig if aligned else FinetuneConfig
    given = {field.name: flags[field.name] for field in fields(kind) if field.name in flags}
    given |= {"run_root_dir": str(folder.parent), "resume": False, "resume_step": None, "dry_run": False}
    if run_id(kind(**given)) != folder.name:
        given["run_id_override"] = folder.name
    processes = flags.get("world_size", 1)
    launcher = ["torchrun", "--standalone", "--nnodes", "1", "--nproc-per-node", str(processes), "-m"]
    words = [*(launcher if processes > 1 else []), "prismo", "train" if aligned else "finetune"]
    return shlex.join([*words, *flag_words(kind, given), "--resume", "True"])


def _evaluation(checkpoint: Path, suite: str) -> str:
    words = ["prismo", "eval", "--pretrained_checkpoint", str(checkpoint)]
    return shlex.join([*words, "--task_suite_name", suite])
