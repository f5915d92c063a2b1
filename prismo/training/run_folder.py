"""Where a run writes and what it left there: names of runs and checkpoints, and which checkpoint to resume.

    {run_root_dir}/{run_id}/                   logs, statistics, and the checkpoint of --save_latest_checkpoint_only
    {run_root_dir}/{run_id}--{step}_chkpt/     one checkpoint per saved step
    {run_root_dir}/latest                      link to the run that was started last
    {run_root_dir}/{run_id}/latest             link to its newest step folder

One process at a time has a run (`RunFolder.locked`). A step folder appears under its name only when it is complete. The
files of a "latest" checkpoint lie among the logs and cannot appear at once: they are prepared in `.checkpoint/` and
moved from there, and whoever finds that folder finishes the move. So at every instant one complete checkpoint can be
found.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from prismo.models.folder import TRAINING_CONFIG
from prismo.training.config import FinetuneConfig
from prismo.training.run_name import naming_flags, run_id
from prismo.util.files import atomic_folder, point_link
from prismo.util.locks import LockedError, take_lock
from prismo.util.schema import JsonObject, read_json

if TYPE_CHECKING:
    from prismo.models.component_files import Step

_LOG = logging.getLogger(__name__)
LATEST = "latest"
STATE_FOLDER = "trainer_state"
STATE_FILE = "state.json"
_LOCK = ".lock"
_STAGED = ".checkpoint"
# What a killed process leaves of an entry: half of its successor, itself moved aside, or doomed.
_LEFTOVER = r"\.({name})\.([0-9a-f]{{8}}|old\.[0-9a-f]{{8}}|removed)"
# In how many of the flags that name a run another one may differ to be called a near miss.
_NEAR = 3
_OWN_ENTRIES = rf"{re.escape(_STAGED)}|{STATE_FOLDER}|{LATEST}|\w+\.(?:jsonl?|png)"
_STEP_SUFFIX = re.compile(r"--(\d+)_chkpt$")
# A merged model that belongs to an older adapter; without config.json nobody takes the folder for a merged checkpoint.
_MERGED = ("config.json", "merge.json", "model*.safetensors*")


@dataclass(frozen=True)
class SavedStep:
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
class _State:
    """What is looked at of a state.json to find checkpoints; `prismo.training.checkpoint` reads the rest."""

    step: Annotated[int, Ge(0)]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, `{run_root_dir}/{run_id}`."""

    path: Path

    def step_folder(self, step: int) -> Path:
        """Folder of the checkpoint after `step` updates."""
        return self.path.with_name(f"{self.path.name}--{step}_chkpt")

    def checkpoints(self) -> list[SavedStep]:
        """Complete checkpoints, newest first."""
        folders = [self.path, *self.path.parent.glob("*_chkpt")] if self.path.parent.is_dir() else []
        found = []
        for folder in folders:
            match = _STEP_SUFFIX.search(folder.name)
            if folder == self.path or (match and folder == self.step_folder(int(match[1]))):
                found += _checkpoint_in(folder)
        return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)

    @contextmanager
    def new_checkpoint(self, step: int, *, latest: bool) -> Generator[tuple[Path, Step]]:
        """Yield a folder to fill and the step for file names; when the block ends well it becomes the checkpoint."""
        if not latest:
            with atomic_folder(self.step_folder(step)) as folder:
                yield folder, step
            point_link(self.path / LATEST, self.step_folder(step))
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

    @contextmanager
    def locked(self) -> Generator[None]:
        """Have this run for this process alone, in order: without what killed processes left half done.

        Raises:
            LockedError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / _LOCK
        try:
            held = take_lock(lock)
        except LockedError as error:
            raise LockedError(
                f"{error}. Wait until it has ended, or give this run another name with --run_id_note or "
                "--run_id_override"
            ) from error
        with held:
            if os.fstat(held.fileno()).st_nlink == 0:
                raise LockedError(f"another process was just looking at {self.path}; start again")
            try:
                self._tidy()
                yield
            finally:
                if [path.name for path in self.path.glob("*")] == [_LOCK]:  # of a run that could not start
                    lock.unlink()
                    self.path.rmdir()

    def _tidy(self) -> None:
        """Finish or undo what killed processes began."""
        _clear_leftovers(self.path.parent, rf"{re.escape(self.path.name)}--\d+_chkpt")
        _clear_leftovers(self.path, _OWN_ENTRIES)
        self.finish_pending()
        for checkpoint in self.checkpoints():
            _clear_leftovers(checkpoint.folder, STATE_FOLDER)

    def prune(self, keep_last: int | None, keep_states: int) -> list[str]:
        """Delete step folders but the newest `keep_last`, and trainer states but the newest `keep_states`.

        A trainer state is several times as large as the policy and only of use to go on from it.

        Returns:
            What was deleted, a clause each.
        """
        states, deleted = 0, list[str]()
        for number, checkpoint in enumerate(self.checkpoints()):
            states += checkpoint.resumable
            if keep_last is not None and number >= keep_last and checkpoint.folder != self.path:
                _remove(checkpoint.folder)
                deleted.append(f"{checkpoint.folder} is deleted (--keep_last {keep_last})")
            elif checkpoint.resumable and states > keep_states:
                _remove(checkpoint.folder / STATE_FOLDER)
                deleted.append(f"{checkpoint.folder} can no longer be resumed from (--keep_states {keep_states})")
        return deleted


def _checkpoint_in(folder: Path) -> list[SavedStep]:
    """The checkpoint of a folder, if there is one.

    Raises:
        ValueError: its state.json is damaged.
    """
    named = _STEP_SUFFIX.search(folder.name) or _STEP_SUFFIX.search(folder.resolve().name)
    for parent in (folder / _STAGED, folder):  # a prepared one is complete, see `finish_pending`
        state = parent / STATE_FOLDER / STATE_FILE
        if state.is_file():
            advice = f"restore it, or delete {state.parent} to go on from another checkpoint"
            step = read_json(state, _State, advice=advice).step
            if named and step != int(named[1]):
                raise ValueError(f"{state}: its step is {step}, that of the folder {int(named[1])}; {advice}")
            return [SavedStep(folder, step, True)]
    return [SavedStep(folder, int(named[1]), False)] if named else []


def _clear_leftovers(folder: Path, names: str) -> None:
    """Delete what killed processes left in `folder` of entries whose names match `names`, exactly.

    Names of runs begin alike (`X` and `X--note`), and the other run may be writing at this moment. What was moved aside
    gets its name back where nothing has taken its place (see `atomic_folder`).
    """
    for left in list(folder.iterdir()):
        match = re.fullmatch(_LEFTOVER.format(name=names), left.name)
        if match is None:
            continue
        original = left.with_name(match[1])
        if match[2].startswith("old.") and not original.exists():
            left.replace(original)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


def _remove(folder: Path) -> None:
    """Delete a folder; it loses its name first, so that a kill in between leaves nothing that looks complete."""
    doomed = folder.rename(folder.with_name(f".{folder.name}.removed"))
    shutil.rmtree(doomed, ignore_errors=True)


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
    """The folder that the run writes to.

    A checkpoint given as vla_path to resume from continues beside itself; with "auto" only if its run has a checkpoint
    to go on from, because a new run belongs into run_root_dir.
    """
    new = RunFolder(config.run_root_dir / run_id(config))
    given = Path(config.vla_path)
    if not config.resume or config.run_id_override or not is_checkpoint(given):
        return new
    given = given.resolve()
    beside = RunFolder(given.with_name(_STEP_SUFFIX.sub("", given.name)))
    if config.resume == "auto" and not any(checkpoint.resumable for checkpoint in beside.checkpoints()):
        return new
    return beside


def find_resume(config: FinetuneConfig, run: RunFolder) -> Resume | None:
    """The checkpoint that --resume and --resume_step mean; None for a new run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a new run in a folder that already holds checkpoints, a damaged checkpoint, or newer ones that those
            of this run would be mixed up with.
    """
    present = run.checkpoints()
    given, wanted = Path(config.vla_path), config.resume_step
    for checkpoint in (*present, *_checkpoint_in(given)) if config.resume else ():
        if checkpoint.resumable and wanted in (None, checkpoint.step):
            return _without_newer(Resume(checkpoint.folder, checkpoint.step, exact=True), present, wanted)
    if config.resume is True:
        lacking = next((c.folder for c in present if c.step == wanted), given)
        if wanted is None or not is_checkpoint(lacking):
            raise FileNotFoundError(_nothing_found(config, run, present))
        if not is_checkpoint(given) or not (given / "config.json").is_file():
            raise FileNotFoundError(_state_is_gone(lacking, present))
        return _without_newer(Resume(given, wanted, exact=False), present, wanted)
    if present:
        step = f"step {present[0].step}{_started_with(config, run)}"
        refusal = (
            f"{present[0].folder} already is a checkpoint of this run ({step}). Continue it with --resume True, or "
            "name another run with --run_id_note or --run_id_override"
        )
        if not config.dry_run:  # which writes no checkpoint
            raise ValueError(refusal)
        _LOG.warning("without --dry_run this would be refused: %s", refusal)
    elif config.resume == "auto" and (near := _near_miss(config, run)):
        _LOG.info("there is nothing to continue, a new run begins. %s", near.strip())
    return None


def _started_with(config: FinetuneConfig, run: RunFolder) -> str:
    """In what the run that has this name differs, for an error."""
    path = run.path / TRAINING_CONFIG
    differing = _differing(read_json(path, JsonObject), config) if path.is_file() else []
    return f", started with {', '.join(differing)}" if differing else ""


def _without_newer(found: Resume, present: Sequence[SavedStep], wanted: int | None) -> Resume:
    """`found`, unless there are newer checkpoints, which the next start would take for those of this attempt."""
    if wanted is not None and present and present[0].step > wanted:
        raise ValueError(
            f"{present[0].folder} is newer than --resume_step {wanted}. Leave --resume_step out to go on from the "
            "newest checkpoint; or move the newer ones away; or go back under another name: "
            f"--vla_path {found.folder} --resume True --resume_step {wanted} --run_id_override NAME"
        )
    return found


def _state_is_gone(lacking: Path, present: Sequence[SavedStep]) -> str:
    """Why a checkpoint of the right step is not enough, and what else there is."""
    resumable = [checkpoint.folder for checkpoint in present if checkpoint.resumable]
    newest = f"Go on from {resumable[0]} by leaving --resume_step out, or merge" if resumable else "Merge"
    return (
        f"{lacking} has no {STATE_FOLDER}: only the newest checkpoints keep theirs (--keep_states). {newest} this one "
        "(prismo merge --base_checkpoint BASE_MODEL "
        f"--lora_finetuned_checkpoint_dir {lacking}) and give it as --vla_path; weights and side modules are then "
        "restored, the optimizer is not"
    )


def _nothing_found(config: FinetuneConfig, run: RunFolder, present: Sequence[SavedStep]) -> str:
    """What was looked for, what there is, and the run that was probably meant."""
    step = "" if config.resume_step is None else f" of step {config.resume_step}"
    shown = ", ".join(f"{c.folder.name} (step {c.step}, no trainer state)" for c in present) or "nothing"
    return (
        f"--resume True: no complete checkpoint{step} with trainer state in {run.path} or {run.path}--*_chkpt; found "
        f"{shown}. {_near_miss(config, run)}Start the run without --resume (or with --resume auto, which starts where "
        "there is nothing to continue), or continue a published checkpoint with --vla_path its merged folder and "
        "--resume_step its step"
    )


def _near_miss(config: FinetuneConfig, run: RunFolder) -> str:
    """The run beside this one whose name differs by the fewest flags, as a sentence; empty if none is near."""
    near: list[tuple[int, str]] = []
    for path in run.path.parent.glob(f"*/{TRAINING_CONFIG}"):
        try:
            started, checkpoints = read_json(path, JsonObject), RunFolder(path.parent).checkpoints()
        except ValueError:  # a damaged neighbour is no matter of this run
            continue
        if (
            _STEP_SUFFIX.search(path.parent.name)
            or path.parent.is_symlink()
            or not any(checkpoint.resumable for checkpoint in checkpoints)
        ):
            continue
        differing = _differing(started, config)
        if len(differing) <= _NEAR:
            flags = f", started with {', '.join(differing)}" if differing else ""
            near.append((len(differing), f"The nearest run is {path.parent} (step {checkpoints[0].step}){flags}. "))
    return min(near)[1] if near else ""


def _differing(started: JsonObject, config: FinetuneConfig) -> list[str]:
    """The flags of a run's name in which one that was started differs: "--seed 7 (here 8)"."""
    here = {name: getattr(config, name) for name in naming_flags(config)}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in here.items()}
    differing = [
        f"--{name} {started[name]} (here {value})"
        for name, value in plain.items()
        if name in started and started[name] != value
    ]
    if (started.get("align_recipe") is None) == (config.align_recipe is None):
        return differing
    return [*differing, "an alignment (here none)" if config.align_recipe is None else "no alignment (here one)"]
