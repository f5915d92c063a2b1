"""The original's text log and W&B keys, line by line, for scripts that read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from prismo.eval.config import EvalConfig
from prismo.eval.results import EpisodeResult, Summary, tally
from prismo.util.extras import install_hint


@dataclass(frozen=True)
class TextLog:
    """Writes `EVAL-*.txt`, in which a continued run goes on.

    Attributes:
        file: open for appending.
    """

    file: IO[str]

    def write(self, line: str) -> None:
        """One line, flushed."""
        print(line, file=self.file, flush=True)

    def episode(self, result: EpisodeResult, done: list[EpisodeResult]) -> None:
        """The block of one episode. `done` are all results so far, this one included."""
        same_task = [other for other in done if other.task_id == result.task_id]
        successes = tally(done).successes
        self.write(f"\nTask: {result.task}")
        self.write(f"Starting episode {len(same_task)}...")
        if result.error:
            self.write(f"Episode error: {result.error}")
        self.write(f"Success: {result.outcome == 'success'}")
        self.write(f"# episodes completed so far: {len(done)}")
        self.write(f"# successes: {successes} ({successes / len(done) * 100:.1f}%)")

    def task_end(self, task: list[EpisodeResult], done: list[EpisodeResult]) -> None:
        """The rates after the last episode of a task."""
        self.write(f"Current task success rate: {tally(task).success_rate}")
        self.write(f"Current total success rate: {tally(done).success_rate}")

    def end(self, summary: Summary, warnings: Iterable[str]) -> None:
        """The final block, behind what makes its rates incomparable."""
        rate = summary.total.success_rate or 0.0
        for warning in warnings:
            self.write(f"Warning: {warning}")
        self.write("Final results:")
        self.write(f"Total episodes: {summary.total.episodes}")
        self.write(f"Total successes: {summary.total.successes}")
        if summary.total.errors:
            self.write(f"Total errors: {summary.total.errors} (in neither number of the rate)")
        self.write(f"Overall success rate: {rate:.4f} ({rate * 100:.1f}%)")


class WandbLog:
    """Weights & Biases with the original's keys; does nothing when it is off.

    Args:
        cfg: whether, and where to.
        folder: of the run. Its name becomes the W&B run's, in which a continued run goes on; W&B's files go into it.
        config: to be shown with the run.

    Raises:
        ValueError: wandb is not installed or does not start.
    """

    def __init__(self, cfg: EvalConfig, folder: Path, config: dict[str, Any]) -> None:
        self._run = None
        if not cfg.use_wandb:
            return
        try:
            import wandb  # noqa: PLC0415 (optional)
        except ImportError as error:
            raise ValueError(f"--use_wandb True needs wandb: {install_hint('wandb')}") from error
        identifier = "".join(c if c.isalnum() or c in "-_" else "_" for c in folder.name)
        try:
            self._run = wandb.init(
                entity=cfg.wandb_entity,
                project=cfg.wandb_project,
                name=folder.name,
                id=identifier,
                resume="allow",
                config=config,
                dir=folder,
            )
        except wandb.Error as error:
            raise ValueError(
                f"W&B does not start: {error}. `wandb login`, or WANDB_MODE=offline to log here"
            ) from error

    def task(self, name: str, results: list[EpisodeResult]) -> None:
        """Rate and number of episodes of a task, or of all as "total"."""
        counts = tally(results)
        if self._run is not None and counts.success_rate is not None:
            self._run.log({f"success_rate/{name}": counts.success_rate, f"num_episodes/{name}": counts.episodes})

    def close(self, text_log: Path) -> None:
        """Attach the text log and end the run."""
        if self._run is not None:
            self._run.save(str(text_log), base_path=str(text_log.parent), policy="now")
            self._run.finish()
