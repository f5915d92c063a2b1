"""Where a run writes and what it left there: names of runs and checkpoints, and which checkpoint to resume.

    {run_root_dir}/{run_id}/                   logs, statistics, and the checkpoint of --save_latest_checkpoint_only
    {run_root_dir}/{run_id}--{step}_chkpt/     one checkpoint per saved step

A step folder appears under its name only when it is complete. The files of a "latest" checkpoint lie among the logs and
cannot appear at once: they are prepared in `.checkpoint/` and moved from there, and whoever finds that folder finishes
the move. So at every instant one complete checkpoint can be found.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prismo.models.component_files import Step
from prismo.training.config import FinetuneConfig
from prismo.util.files import atomic_folder
from prismo.util.schema import JsonObject, read_json

STATE_FOLDER = "trainer_state"
STATE_FILE = "state.json"
TRAINING_CONFIG = "training_config.json"
_STAGED = ".checkpoint"
_STEP_SUFFIX = re.compile(r"--(\d+)_chkpt$")
# A merged model that belongs to an older adapter; without config.json nobody takes the folder for a merged checkpoint.
_MERGED = ("config.json", "merge.json", "model*.safetensors*")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run.

    Attributes:
        folder: where it lies.
        step: updates that its weights have seen.
        resumable: the trainer state is there.
    """

    folder: Path
    step: int
    resumable: bool


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, `{run_root_dir}/{run_id}`."""

    path: Path

    def step_folder(self, step: int) -> Path:
        """Folder of the checkpoint after `step` updates."""
        return self.path.with_name(f"{self.path.name}--{step}_chkpt")

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, newest first."""
        found = []
        folders = [self.path, *self.path.parent.glob("*_chkpt")] if self.path.parent.is_dir() else []
        for folder in folders:
            match = _STEP_SUFFIX.search(folder.name)
            if folder != self.path and not (match and folder == self.step_folder(int(match[1]))):
                continue
            state = folder / STATE_FOLDER / STATE_FILE
            if state.is_file():
                found.append(Checkpoint(folder, int(read_json(state, JsonObject)["step"]), True))
            elif match:
                found.append(Checkpoint(folder, int(match[1]), False))
        return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)

    @contextmanager
    def new_checkpoint(self, step: int, *, latest: bool) -> Iterator[tuple[Path, Step]]:
        """Yield a folder to fill and the step for file names; when the block ends well it becomes the checkpoint."""
        if not latest:
            with atomic_folder(self.step_folder(step)) as folder:
                yield folder, step
            return
        with atomic_folder(self.path / _STAGED) as folder:
            yield folder, "latest"
        self.finish_pending()

    def finish_pending(self) -> None:
        """Move the files of a prepared "latest" checkpoint to their places; also after being killed in the middle."""
        staged = self.path / _STAGED
        if not staged.is_dir():
            return
        for pattern in _MERGED:
            for stale in self.path.glob(pattern):
                stale.unlink()
        for entry in sorted(staged.iterdir()):
            target = self.path / entry.name
            if target.is_dir():
                shutil.rmtree(target)  # its successor lies in the prepared folder until the next line
            entry.replace(target)
        staged.rmdir()

    def remove_leftovers(self) -> None:
        """Delete half-written folders of killed runs."""
        for folder in (*self.path.parent.glob(f".{self.path.name}--*_chkpt.*"), *self.path.glob(f".{_STAGED}.*")):
            shutil.rmtree(folder, ignore_errors=True)

    def prune(self, keep_last: int | None) -> None:
        """Delete step folders but the newest `keep_last`, and trainer states but that of the newest checkpoint.

        A trainer state is several times as large as the policy and only of use to go on from it.
        """
        checkpoints = self.checkpoints()
        for number, checkpoint in enumerate(checkpoints):
            if number == 0:
                continue
            if keep_last is not None and number >= keep_last and checkpoint.folder != self.path:
                _remove(checkpoint.folder)
            elif checkpoint.resumable:
                _remove(checkpoint.folder / STATE_FOLDER)


def _remove(folder: Path) -> None:
    """Delete a folder; it loses its name first, so that a kill in between leaves nothing that looks complete."""
    doomed = folder.rename(folder.with_name(f".{folder.name}.removed"))
    shutil.rmtree(doomed, ignore_errors=True)


def run_id(config: FinetuneConfig) -> str:
    """Name of the run, as the original builds it."""
    if config.run_id_override:
        return config.run_id_override
    if config.resume and is_checkpoint(Path(config.vla_path)):
        return _STEP_SUFFIX.sub("", Path(config.vla_path).resolve().name)
    base = config.vla_path.rstrip("/").split("/")[-1]
    dataset = Path(config.dataset_name).stem if config.dataset_name.endswith((".yaml", ".yml")) else config.dataset_name
    batch = config.batch_size * config.grad_accumulation_steps
    name = f"{base}+{dataset.replace('/', '-')}+b{batch}+lr-{config.learning_rate}"
    name += f"+lora-r{config.lora_rank}+dropout-{config.lora_dropout}" if config.use_lora else "+full"
    if config.image_aug:
        name += "--image_aug"
    return f"{name}--{config.run_id_note}" if config.run_id_note else name


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is the result of a fine-tuning run (ours or the original's), not a base model."""
    return folder.is_dir() and ((folder / "dataset_statistics.json").is_file() or (folder / TRAINING_CONFIG).is_file())


@dataclass(frozen=True)
class Resume:
    """What a run continues from.

    Attributes:
        folder: the checkpoint.
        step: updates done.
        exact: everything is restored; otherwise only the side modules are, on new adapters of the merged weights.
    """

    folder: Path
    step: int
    exact: bool


def run_folder(config: FinetuneConfig) -> RunFolder:
    """The folder that the run writes to. A checkpoint given as vla_path to resume from continues beside itself."""
    root = config.run_root_dir
    if config.resume and not config.run_id_override and is_checkpoint(Path(config.vla_path)):
        root = Path(config.vla_path).resolve().parent
    return RunFolder(root / run_id(config))


def find_resume(config: FinetuneConfig, run: RunFolder) -> Resume | None:
    """The checkpoint that --resume and --resume_step mean; None for a new run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a new run in a folder that already holds checkpoints.
    """
    run.finish_pending()
    present = run.checkpoints()
    if not config.resume:
        if present:
            raise ValueError(
                f"{present[0].folder} already is a checkpoint of this run (step {present[0].step}). Continue it with "
                "--resume True, or name another run with --run_id_note or --run_id_override"
            )
        return None
    given, wanted = Path(config.vla_path), config.resume_step
    candidates = list(present)
    if (given / STATE_FOLDER / STATE_FILE).is_file():
        candidates.append(
            Checkpoint(given, int(read_json(given / STATE_FOLDER / STATE_FILE, JsonObject)["step"]), True)
        )
    for checkpoint in candidates:
        if checkpoint.resumable and wanted in (None, checkpoint.step):
            return Resume(checkpoint.folder, checkpoint.step, exact=True)
    if wanted is not None and is_checkpoint(given):
        return Resume(given, wanted, exact=False)
    shown = ", ".join(f"{c.folder.name} (step {c.step}, no trainer state)" for c in present) or "nothing"
    raise FileNotFoundError(
        f"--resume True: no complete checkpoint{'' if wanted is None else f' of step {wanted}'} with trainer state in "
        f"{run.path} or {run.path}--*_chkpt; found {shown}. Start the run without --resume, or continue a published "
        "checkpoint with --vla_path its merged folder and --resume_step its step"
    )
