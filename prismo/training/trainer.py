"""The training loop: updates, logs, validation and checkpoints, the same on one process and on many.

`prismo.training.run` builds a `Trainer` and calls `fit`. One number counts everything: `done`, the optimizer updates so
far. Checkpoint N is written after exactly N of them, once, and there is always one at the end.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prismo.data.loader import Batch, Loader
from prismo.models.heads import HEADS
from prismo.training.action_error import ActionErrors
from prismo.training.checkpoint import (
    DataPosition,
    TrainerState,
    WholeState,
    gather_state,
    load_state,
    read_state,
    save_state,
    write_training_config,
)
from prismo.training.config import FinetuneConfig
from prismo.training.curves import CURVES, draw_curves
from prismo.training.distributed import World
from prismo.training.logs import Progress, Sink, gpu_peak_flops, log_all, open_sinks
from prismo.training.pictures import cosine_sheet, save_picture
from prismo.training.run_folder import LATEST, Resume, RunFolder
from prismo.training.signals import StopSignals
from prismo.training.step import TrainStep, UpdateResult
from prismo.training.summary import SHOWN, merge_command
from prismo.training.task import TrainingTask
from prismo.training.validate import validate
from prismo.util.cli import BrokenOffError
from prismo.util.files import point_link
from prismo.util.text import first_line, size_text

_LOG = logging.getLogger(__name__)
_MAP_SAMPLES = 4
_FEWEST_DRAWN = 10  # log entries; fewer are no curve


class NonFiniteLossError(BrokenOffError):
    """The loss or its gradient is not finite; the message names the batch and the saved state."""


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        train: endless batches of this process.
        val: one pass over the held-out episodes; None = no validation.
        errors: action errors in physical units.
    """

    train: Loader
    val: Loader | None
    errors: ActionErrors


@dataclass(frozen=True)
class _Update:
    """One update that was launched; it is known to be good only when the next one has been launched.

    Attributes:
        number: updates done with it.
        batches: its micro-batches on this process.
        position: in the data, before it.
        result: of the step.
    """

    number: int
    batches: list[Batch]
    position: dict[str, int]
    result: UpdateResult


class Trainer:
    """One run.

    Args:
        config: flags.
        task: the model.
        data: loaders.
        run: where to write.
        world: the processes.
        resume: None starts from the base model.
        online: logs that are open already; `fit` closes them.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        task: TrainingTask,
        data: RunData,
        run: RunFolder,
        world: World,
        resume: Resume | None = None,
        online: Sequence[Sink] = (),
    ) -> None:
        self.config, self.task, self.data, self.run, self.world = config, task, data, run, world
        self.done = 0
        self.step = TrainStep(
            task.objective,
            world,
            precision=config.precision(world.device),
            accumulation=config.grad_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            seed=config.seed,
        )
        self._position = data.train.state_dict()
        self._sinks = list(online)
        self._curves = True
        if resume is not None:
            self._restore(resume)
        samples = config.batch_size * config.grad_accumulation_steps * world.size
        self._progress = Progress(self.done, config.max_steps, samples, world.is_main)
        self._samples_per_update = samples

    def fit(self) -> int:
        """Train to `max_steps` or until a signal; returns the updates done. The last state is always saved.

        Raises:
            NonFiniteLossError: training cannot go on.
            OSError: a checkpoint could not be written; the one before is untouched.
        """
        config = self.config
        self._open()
        last_saved = self.done
        previous: _Update | None = None
        try:
            with StopSignals() as stop, closing(iter(self.data.train)) as batches:
                stopping = self.world.any(stop.requested)
                while self.done < config.max_steps and not stopping:
                    update = self._update(batches)
                    if previous is not None and previous.result.refused:
                        self._give_up(previous)
                    previous = update
                    if self.done % config.wandb_log_freq == 0:
                        self._log(update)
                    self._draw_map(update)
                    stopping = self.world.any(stop.requested)
                    if self.done % config.save_freq == 0 and not stopping and self.done < config.max_steps:
                        self._save(update)
                        last_saved = self.done
                    if self.data.val is not None and self.done % config.val_freq == 0:
                        self._validate(self.data.val)
                if previous is not None and last_saved != self.done:
                    # The scheduler that sent the signal waits seconds, not the minutes that merging may take.
                    self._save(previous, merge=not stopping)
        finally:
            self._progress.close()
            for sink in self._sinks:
                sink.close()
        return self.done

    def _open(self) -> None:
        """Logs and the run's own files."""
        if not self.world.is_main:
            return
        self.run.path.mkdir(parents=True, exist_ok=True)
        point_link(self.run.path.with_name(LATEST), self.run.path)
        self._check_space()
        write_training_config(self.run.path, self.config, self.task.robot, self.world.size, self.step.precision)
        self._sinks += open_sinks(self.config, self.run.path, self.done)
        if self.done:
            _LOG.info("resumed at update %d of %d", self.done, self.config.max_steps)

    def _check_space(self) -> None:
        """A disk that cannot take one checkpoint is an error now, not after an hour."""
        trained = sum(parameter.numel() for parameter in self.step.optimizer.parameters)
        needed, free = trained * 4 * 4, shutil.disk_usage(self.run.path).free  # fp32: weights twice, two moments
        if free < needed:
            raise OSError(f"{self.run.path} has {free / 1e9:.1f} GB free; a checkpoint takes {needed / 1e9:.1f} GB")

    def _restore(self, resume: Resume) -> None:
        """Continue from a checkpoint."""
        self.done = resume.step
        if resume.exact:
            load_state(resume.folder, self.step)
            self.data.train.load_state_dict(asdict(read_state(resume.folder).data))
            self._position = self.data.train.state_dict()
            return
        files = self.task.load_modules(resume.folder, resume.step)
        _LOG.warning(
            "%s has no trainer state: restored are the merged weights, %s and the step (%d), so that the learning rate "
            "goes on from there. New are the adapters, the optimizer's moments and the data order",
            resume.folder,
            ", ".join(files) or "no side modules",
            resume.step,
        )

    def _update(self, batches: Iterator[Batch]) -> _Update:
        """Launch one update."""
        taken: list[Batch] = []
        waited = 0.0

        def inputs() -> Iterator[Any]:
            nonlocal waited
            for _ in range(self.config.grad_accumulation_steps):
                began = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - began
                taken.append(batch)
                yield self.task.inputs(batch, True)

        before = self._position
        result = self.step(inputs(), self.done, self.config.schedule.rate(self.done))
        self.done += 1
        self._position = self.data.train.state_dict()
        self._progress.update(waited)
        if self._progress.flops_per_update == 0 and gpu_peak_flops() and not self.step.sharded:
            with self._progress.pause():
                self._progress.flops_per_update = self._count_flops(taken[-1])
        return _Update(self.done, taken, before, result)

    def _count_flops(self, batch: Batch) -> float:
        """Floating-point operations of one update on this device, counted in one extra pass that changes nothing."""
        stance = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        inputs = self.task.inputs(batch, True)
        with FlopCounterMode(display=False) as counter, stance:
            with self.step.autocast():
                total = self.step.objective(inputs).total
            torch.autograd.grad(total, self.step.optimizer.parameters)
        return float(counter.get_total_flops() * self.config.grad_accumulation_steps)

    @torch.no_grad()
    def _log(self, update: _Update) -> None:
        """One entry in every log: the figures of this update, averaged over all processes."""
        result, batch = update.result, update.batches[-1]
        values = dict(result.metrics)
        actions = result.actions
        sampled_now = update.number % self.config.diffusion_sample_freq == 0
        if actions is None and sampled_now and HEADS[self.config.head].from_noise:
            actions, sampled = self._sample(batch)
            values |= sampled
        if actions is not None:
            values |= self.data.errors(
                actions, batch.actions.to(actions.device), batch.dataset_names, batch.action_mask.to(actions.device)
            )
        means = {name: value.item() for name, value in self.world.mean(values).items()}
        if not self.world.is_main:
            return
        position = self.data.train.state_dict()
        means |= {
            "learning_rate": self.config.schedule.rate(update.number - 1),
            "gradient_norm": result.grad_norm.item(),
            "epoch": position["epoch"] + position["sample"] / self.data.train.samples_per_epoch,
            **self._progress.speed(),
        }
        self._progress.show(means)
        log_all(self._sinks, "train", update.number, means)

    def _sample(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoised actions of a batch and their L1 errors."""
        self.step.objective.eval()
        with self.step.autocast():
            actions = self.task.predict(self.task.inputs(batch, True)).float()
        self.step.objective.train()
        error = (actions - batch.actions.to(actions.device)).abs()
        return actions, {
            "curr_action_l1_loss": error[:, 0].mean(),
            "next_actions_l1_loss": error[:, 1:].mean(),
        }

    @torch.no_grad()
    def _draw_map(self, update: _Update) -> None:
        """Every `align_map_freq` updates, a picture of where policy and teacher agree."""
        frequency = getattr(self.config, "align_map_freq", 0)
        # A sharded forward pass needs all processes, and only the main one draws.
        draws = self.world.is_main and self.config.align_recipe is not None and not self.step.sharded
        if not (draws and frequency and update.number % frequency == 0):
            return
        with self._progress.pause():
            inputs = self.task.inputs(update.batches[-1], True)
            with self.step.autocast():
                cosine = self.step.objective(inputs, with_map=True).align_map
            picture = cosine_sheet(inputs.images[:_MAP_SAMPLES], cosine[:_MAP_SAMPLES], self._map_title(update.number))
            path = save_picture(picture, self.run.path / "align_maps" / f"step-{update.number:06d}.png")
            for sink in self._sinks:
                sink.image("Align Cosine Map", update.number, path)

    def _map_title(self, number: int) -> str:
        recipe = self.config.align_recipe
        layers = f"policy layer {recipe.vla_layers_align}, teacher layer {recipe.vggt_layers_align}" if recipe else ""
        return f"{self.run.path.name}, update {number}: cosine of policy and teacher ({layers})"

    def _validate(self, held_out: Loader) -> None:
        began = time.perf_counter()
        with self._progress.pause():
            values = validate(self.task, self.step, held_out, self.data.errors, self.config.val_time_limit)
        held_out.load_state_dict({"epoch": 0, "sample": 0})
        log_all(self._sinks, "val", self.done, values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name in SHOWN)
        _LOG.info("update %d: validated in %.1f s: %s", self.done, time.perf_counter() - began, shown)

    def _save(self, update: _Update, merge: bool = True) -> None:
        """Write the checkpoint of the current state; on return it is complete."""
        if update.result.refused:
            self._give_up(update)
        with self._progress.pause():
            self._check_equal()
            state = gather_state(self.step)
            if self.world.is_main:
                self._merge(self._write_checkpoint(self.done, self._position, state), now=merge)
            self.world.barrier()

    def _merge(self, folder: Path, now: bool) -> None:
        """Write the merged model into a complete checkpoint. If it cannot be, training goes on: the adapter is safe."""
        if not (self.config.use_lora and self.config.merge_lora_during_training):
            return
        later = f"merge it later: {merge_command(self.config.vla_path, folder)}"
        if not now:
            _LOG.info("%s is not merged; %s", folder, later)
            return
        try:
            self.task.merge(folder)
        except (OSError, ValueError) as error:
            _LOG.error("%s is saved, but not merged: %s; %s", folder, error, later)

    def _check_equal(self) -> None:
        """Only one process writes the weights, so they must be those of all."""
        if self.step.sharded:
            return
        names = zip(self.step.optimizer.names, self.step.optimizer.parameters, strict=True)
        if different := self.world.same_on_all(dict(names)):
            raise RuntimeError(
                f"after update {self.done} {len(different)} weights differ between processes ({different[0]}, ...): "
                "their gradients were not reduced. Nothing is saved; this is a bug"
            )

    def _write_checkpoint(self, number: int, position: dict[str, int], state: WholeState) -> Path:
        latest = self.config.save_latest_checkpoint_only
        try:
            began = time.perf_counter()
            with self.run.new_checkpoint(number, latest=latest) as (folder, name):
                self.task.write(folder, name, state.weights)
                write_training_config(folder, self.config, self.task.robot, self.world.size, self.step.precision)
                done = TrainerState(number, DataPosition(**position), self.world.size, self.task.base_fingerprint)
                save_state(folder, state, done)
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk has another name in each library
            present = self.run.checkpoints()
            before = f"the checkpoint before is whole: {present[0].folder}" if present else "there is none before"
            raise OSError(
                f"cannot write the checkpoint after update {number} ({first_line(error)}); {before}. "
                "Make room and continue with --resume True"
            ) from error
        path, seconds = self.run.path if latest else self.run.step_folder(number), time.perf_counter() - began
        pruned = self.run.prune(self.config.keep_last, self.config.keep_states)
        written = f"saved {path} ({size_text(size)}, {seconds:.1f} s)"
        _LOG.info("update %d: %s", number, "; ".join([written, *pruned]))
        self._draw_curves()
        return path

    def _draw_curves(self) -> None:
        """A run needs no picture, so what prevents it is said once and training goes on."""
        if self._curves:
            try:
                draw_curves(self.run.path, _FEWEST_DRAWN)
            except (ValueError, OSError) as error:
                self._curves = False
                _LOG.warning("no %s is drawn: %s", CURVES, error)

    def _give_up(self, update: _Update) -> None:
        """Save the state before a refused update, name its batches and raise.

        Weights and moments are still those of the update before: nothing was applied since.
        """
        bad = [not bool(torch.isfinite(total)) for total in update.result.totals]
        shown = [batch for batch, is_bad in zip(update.batches, bad, strict=True) if is_bad]
        lines = [f"process {self.world.rank}: {self._name(batch)}" for batch in shown]
        gathered = [line for lines in self.world.gather(lines) for line in lines]
        if not gathered:  # the losses are finite, only their gradient is not
            named = [f"process {self.world.rank}: {self._name(batch)}" for batch in update.batches]
            gathered = [line for lines in self.world.gather(named) for line in lines]
        saved = update.number - 1
        whole = gather_state(self.step)
        if self.world.is_main and saved > 0:
            self._write_checkpoint(saved, update.position, whole)
        self.world.barrier()
        state = f"The state after update {saved} is saved" if saved else "No update was made"
        raise NonFiniteLossError(
            f"the loss or its gradient is not finite in update {update.number}. {state}. Batches:\n  "
            + "\n  ".join(gathered)
            + "\nLook at these samples; else lower --learning_rate or --max_grad_norm, or use --dtype float32"
        )

    def _name(self, batch: Batch) -> str:
        """Dataset, episode and step of the samples to blame: those with numbers that are not finite, else all."""
        wrong = ~torch.isfinite(batch.actions).flatten(1).all(dim=1)
        if self.config.use_proprio:
            wrong |= ~torch.isfinite(batch.proprio).all(dim=1)
        places = zip(batch.dataset_names, batch.episode.tolist(), batch.step.tolist(), wrong.tolist(), strict=True)
        return ", ".join(
            f"{dataset} episode {episode} step {step}" + (" (its numbers are not finite)" if bad else "")
            for dataset, episode, step, bad in places
            if bad or not wrong.any()
        )
