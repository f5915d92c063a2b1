"""An evaluation from its flags to its results: `prepare` settles everything that can be wrong, `Evaluation.run` plays.

Called by `prismo eval`. Episodes run one after the other; `prismo.eval.rollout` plays each.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from prismo.eval.benchmark import Benchmark, benchmark_of
from prismo.eval.config import EvalConfig
from prismo.eval.episode import Episode, Rollout, RolloutSettings, plan_episodes
from prismo.eval.results import EpisodeResult, Summary, summarize
from prismo.eval.rollout import reset, run_episode
from prismo.eval.run_folder import EPISODES, EvalFolder, RunIdentity, open_run
from prismo.eval.summary import report
from prismo.eval.text_log import TextLog, WandbLog
from prismo.eval.versions import changed_versions, collect_versions, episode_versions, mixed_versions
from prismo.eval.video import annotated, check_video_writer, video_path, write_video
from prismo.policies.base import Policy
from prismo.policies.checkpoint import checkpoint_hash
from prismo.policies.loading import PolicySpec, prepare_policy
from prismo.sim.gl import physical_cuda_index
from prismo.sim.interface import STAND_INS
from prismo.sim.worker import SimWorker
from prismo.util.cli import BrokenOffError
from prismo.util.files import write_json

_LOG = logging.getLogger(__name__)


def evaluate(cfg: EvalConfig) -> Summary:
    """Run (or continue) an evaluation and write its results; see `prepare` and `Evaluation`."""
    with prepare(cfg) as evaluation:
        return evaluation.run()


@contextmanager
def prepare(cfg: EvalConfig) -> Generator[Evaluation]:
    """Check flags, checkpoint and simulator, find or create the run, load the policy; at the end free all of them.

    Raises:
        ValueError, FileNotFoundError, SelfTestError, SimulatorError, GLUnavailableError: with one clear message.
            Nothing has been run, and no run folder has been made, unless the weights themselves cannot be loaded.
    """
    benchmark = benchmark_of(cfg)
    if cfg.save_videos != "none":
        check_video_writer()
    spec = prepare_policy(cfg, benchmark.robot, default_key=cfg.task_suite_name)
    episodes = plan_episodes(cfg, benchmark)
    settings = _rollout_settings(cfg, spec, benchmark)
    local = spec.device.index or 0
    with benchmark.open(cfg, physical_cuda_index(local) if spec.device.type == "cuda" else None) as worker:
        reset(worker, episodes[0], settle_steps=0)  # fail now, not in every episode, if no scene can be built or drawn
        versions = collect_versions(worker.info)
        changing = _identity_settings(cfg, spec, settings, benchmark.settings(cfg) | {"assets": versions["assets"]})
        identity = RunIdentity(cfg.task_suite_name, spec.checkpoint.family, cfg.run_id_note, changing)
        run, resumed = open_run(cfg, identity, versions)
        with closing(run):
            for warning in benchmark.warnings(versions):  # of stand-ins, whoever found them has warned
                _LOG.warning(warning)
            done = run.log.results
            todo = [e for e in episodes if e.number not in done or (cfg.retry_errors and done[e.number].error)]
            if resumed:
                if todo and not cfg.allow_mixed:
                    _refuse_mixture(run, {e.number for e in todo}, versions)
                _LOG.info("continuing %s: %d of %d episodes are done", run.path, len(done), len(episodes))
            run.begin(cfg, episodes)
            wandb = WandbLog(cfg, run.path, asdict(run.about))
            policy = spec.load() if todo else None
            yield Evaluation(cfg, benchmark, run, worker, policy, episodes, todo, settings, versions, wandb)


class RepeatedError(BrokenOffError):
    """Episode after episode ends in the same error, so the evaluation was stopped."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is ready to run, inside of `prepare`.

    Attributes:
        benchmark: that `cfg` names.
        run_folder: its files.
        worker: the simulator.
        policy: None where every episode is done already.
        episodes, todo: all of them, and those that are left.
    """

    cfg: EvalConfig
    benchmark: Benchmark
    run_folder: EvalFolder
    worker: SimWorker
    policy: Policy | None
    episodes: tuple[Episode, ...]
    todo: list[Episode]
    settings: RolloutSettings
    versions: dict[str, Any]
    wandb: WandbLog

    def run(self) -> Summary:
        """Play what is left, one episode after the other, and write results.json.

        Raises:
            RepeatedError: see `--max_errors`.
            OSError: results cannot be written. What is in the log stays there; the same command continues.
        """
        start, run = time.perf_counter(), self.run_folder
        seed_everything(self.cfg.seed)
        try:
            with run.text_log.open("a", encoding="utf-8") as file, logging_redirect_tqdm():
                text = TextLog(file)
                self._play(text)
                summary = summarize(run.log.results.values(), len(self.episodes))
                text.end(summary, self._warnings())
            self._write_results(summary, time.perf_counter() - start)
        except (KeyboardInterrupt, OSError) as error:
            stopped = f"stopped after {len(run.log.results)} of {len(self.episodes)} episodes"
            if isinstance(error, OSError):
                advice = f"{run.path} cannot be written ({error}). Make room; the same command continues"
                raise OSError(f"{stopped}: {advice}") from error
            _LOG.warning("%s; the same command continues", stopped)
            raise
        finally:
            self._leave()
        self.wandb.task("total", list(run.log.results.values()))
        self.wandb.close(run.text_log)
        if summary.total.errors:
            errors = f"{summary.total.errors} of {summary.planned} episodes ended in an error"
            _LOG.error("%s and count as neither success nor failure; see %s", errors, run.path / EPISODES)
        return summary

    def _leave(self) -> None:
        """Pictures, links and the summary of what there is by now; never in the way of the error that ends it."""
        try:
            _LOG.info("%s", report(self.run_folder.path))
        except (OSError, ValueError) as error:
            _LOG.warning("no summary: %s", error)

    def _play(self, text: TextLog) -> None:
        if self.policy is None:
            return
        log = self.run_folder.log
        causes: list[str | None] = []
        with tqdm(total=len(self.episodes), initial=len(self.episodes) - len(self.todo), unit="episode") as bar:
            for episode in self.todo:
                rollout = run_episode(self.worker, self.policy, episode, self.settings)
                result = self._result(episode, rollout)
                log.append(result)
                if result.error:
                    _LOG.error("episode %d (%s): %s", result.episode, result.task, _reason(result.error))
                results = log.results
                done = list(results.values())
                text.episode(result, done)
                same_task = [e.number for e in self.episodes if e.task == episode.task]
                if all(number in results for number in same_task):
                    task_results = [results[number] for number in same_task]
                    text.task_end(task_results, done)
                    self.wandb.task(result.task, task_results)
                bar.update()
                bar.set_postfix_str(_progress(done))
                causes.append(_cause(result.error))
                self._stop_at_repeated(causes)

    def _stop_at_repeated(self, causes: list[str | None]) -> None:
        """Raise RepeatedError where the last episodes have the same cause, which is then none of theirs."""
        limit = self.cfg.max_errors
        if limit and causes[-1] is not None and causes[-limit:] == [causes[-1]] * limit:
            raise RepeatedError(
                f"{limit} episodes in a row ended in the same error ({causes[-1]}); the tracebacks are in "
                f"{self.run_folder.path / EPISODES}. When its cause is gone, the same command with "
                "--retry_errors True repeats them and goes on; --max_errors 0 goes on in any case"
            )

    def _result(self, episode: Episode, rollout: Rollout) -> EpisodeResult:
        """The line of an episode, with its video written."""
        return EpisodeResult(
            episode=episode.number,
            suite=episode.task.suite,
            task_id=episode.task.index,
            task=episode.task.language,
            init_state=episode.init_state,
            env_seed=episode.env_seed,
            policy_seed=episode.policy_seed,
            outcome=rollout.outcome,
            steps=rollout.steps,
            queries=rollout.queries,
            seconds=round(rollout.seconds, 3),
            policy_seconds=round(rollout.policy_seconds, 3),
            actions_sha256=rollout.actions_sha256,
            attempts=rollout.attempts,
            video=self._video(episode, rollout),
            error=rollout.error,
            finished=datetime.now().astimezone().isoformat(timespec="seconds"),
            versions=episode_versions(self.versions),
        )

    def _video(self, episode: Episode, rollout: Rollout) -> str | None:
        """Path of the episode's video, or None if it is not wanted or cannot be written."""
        success, wanted = rollout.outcome == "success", self.cfg.save_videos
        if not rollout.frames or wanted == "none" or (wanted == "failures" and success):
            return None
        about = self.run_folder.about
        path = video_path(self.cfg.rollout_dir, about.timestamp, about.family, episode, success)
        frames: Iterable[np.ndarray] = rollout.frames
        if self.cfg.annotate_videos:
            frames = annotated(np.stack(rollout.frames), episode, rollout.outcome, self.settings.max_steps)
        try:
            write_video(path, frames)
        except OSError as error:  # a full disk must not cost the episode
            _LOG.warning("no video of episode %d: %s", episode.number, str(error).strip().splitlines()[0])
            return None
        return str(path)

    def _warnings(self) -> list[str]:
        """One sentence for everything that makes the rates incomparable."""
        mixed = self._mixed_versions()
        several = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in mixed.items())
        found = [f"episodes were played with different versions: {several}"] if mixed else []
        smoke = ["the scenes are built-in stand-ins: this is a smoke run, its rates compare with nothing"]
        return [*self.benchmark.warnings(self.versions), *(smoke if self._is_smoke_run else []), *found]

    @property
    def _is_smoke_run(self) -> bool:
        return self.versions["assets"] == STAND_INS

    def _mixed_versions(self) -> dict[str, list[str | None]]:
        return mixed_versions(_versions_of(self.run_folder, self.run_folder.log.results.values()))

    def _write_results(self, summary: Summary, seconds: float) -> None:
        """results.json: what came out, and everything it depends on."""
        content = {
            "smoke_run": self._is_smoke_run,  # boxes and cylinders: the rates compare with nothing
            **summary.to_json(),
            **asdict(self.run_folder.about),
            "versions": self.versions,  # of this start
            "mixed_versions": self._mixed_versions(),
            "warnings": self._warnings(),
            "policy": None if self.policy is None else self.policy.describe(),
            "wall_seconds": round(seconds, 1),  # of this start only
            "episode_seconds": round(sum(r.seconds for r in self.run_folder.log.results.values()), 1),
            "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        write_json(self.run_folder.results_file, content)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random, and ask cuDNN for repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _rollout_settings(cfg: EvalConfig, spec: PolicySpec, benchmark: Benchmark) -> RolloutSettings:
    chunk, images, views = spec.settings.chunk, spec.settings.num_images, benchmark.robot.cameras
    film = views if cfg.annotate_videos else views[:1]
    if cfg.num_open_loop_steps is not None and cfg.num_open_loop_steps > chunk:
        raise ValueError(
            f"--num_open_loop_steps is {cfg.num_open_loop_steps}, but the checkpoint predicts chunks of {chunk} actions"
        )
    if images > len(views):
        has = f"--benchmark {cfg.benchmark} has {len(views)} ({', '.join(views)})"
        raise ValueError(f"the checkpoint takes {images} camera images; {has}")
    cameras = spec.robot.cameras if images <= len(spec.robot.cameras) else views
    states = () if spec.checkpoint.proprio_dim is None else spec.robot.states
    return RolloutSettings(
        max_steps=cfg.max_steps or benchmark.max_steps(cfg),
        open_loop_steps=cfg.num_open_loop_steps or chunk,
        settle_steps=cfg.num_steps_wait,
        cameras=_present(cfg, "cameras", cameras[:images], views)[:images],
        states=_present(cfg, "states", states, benchmark.robot.states) or benchmark.robot.states,
        film=film if cfg.save_videos != "none" else (),
    )


def _present(cfg: EvalConfig, what: str, names: tuple[str, ...], available: tuple[str, ...]) -> tuple[str, ...]:
    """The names that the policy was trained with, if the benchmark has all of them.

    Raises:
        ValueError: it has not; with --force a warning, and the benchmark's own take their places.
    """
    if set(names) <= set(available):
        return names
    text = (
        f"{cfg.pretrained_checkpoint} was trained with the {what} {', '.join(names)}, but --benchmark {cfg.benchmark} "
        f"has {', '.join(available)}"
    )
    if not cfg.force:
        raise ValueError(f"{text}; --force True takes these in that order")
    _LOG.warning("%s, which are taken in that order (--force)", text)
    return available


def _versions_of(run: EvalFolder, results: Iterable[EpisodeResult]) -> list[Mapping[str, Any]]:
    """What played each episode; lines of earlier releases do not say it."""
    return [result.versions or run.about.versions for result in results]


def _refuse_mixture(run: EvalFolder, todo: Collection[int], versions: dict[str, Any]) -> None:
    """Raise ValueError where the episodes that stay were played with other versions than those of now."""
    kept = [result for number, result in run.log.results.items() if number not in todo]
    changed = changed_versions(_versions_of(run, kept), versions)
    if changed:
        raise ValueError(
            f"{run.path} holds {len(kept)} episodes that were played with other versions ({changed}), and a rate of "
            "both would be that of neither. Go back to those versions, start a new run with --resume False, or "
            "continue all the same with --allow_mixed True"
        )


def _identity_settings(
    cfg: EvalConfig, spec: PolicySpec, settings: RolloutSettings, of_benchmark: dict[str, Any]
) -> dict[str, Any]:
    """Everything that changes an episode, as JSON reads it back."""
    values = {
        "checkpoint_hash": checkpoint_hash(spec.checkpoint),
        "policy": spec.describe(),
        "dtype": str(spec.dtype),
        "task_ids": None if cfg.task_ids is None else sorted(set(cfg.task_ids)),
        "num_trials_per_task": cfg.num_trials_per_task,
        "num_open_loop_steps": settings.open_loop_steps,
        "num_steps_wait": settings.settle_steps,
        "max_steps": settings.max_steps,
        **of_benchmark,
        "seed": cfg.seed,
    }
    return json.loads(json.dumps(values))


def _reason(error: str) -> str:
    """The last line of a traceback."""
    return error.strip().splitlines()[-1]


def _cause(error: str | None) -> str | None:
    """The reason without its numbers (bytes, addresses, process ids): the same for the same cause."""
    return None if error is None else re.sub(r"\d+", "#", _reason(error))


def _progress(done: list[EpisodeResult]) -> str:
    """Beside the progress bar."""
    counts = summarize(done, len(done)).total
    rate = "-" if counts.success_rate is None else f"{100 * counts.success_rate:.1f} %"
    return f"success {rate}" + (f", {counts.errors} errors" if counts.errors else "")
