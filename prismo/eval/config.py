"""Flags of `prismo eval`: the original's names and meanings, plus a few of our own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from prismo.policies.flags import PolicyFlags
from prismo.sim import MAX_STEPS, SUITES
from prismo.sim.suites import check_task_ids
from prismo.util.flags import at_least
from prismo.util.text import did_you_mean

SaveVideos = Literal["all", "failures", "none"]
DEFAULT_STATES = "DEFAULT"
_MAX_SEED = 2**32 - 1  # numpy's
BENCHMARK_STATES = 50  # initial states per task that LIBERO ships


@dataclass(frozen=True)
class EvalConfig(PolicyFlags):
    """An evaluation in LIBERO. The flags of the policy are inherited."""

    # --- benchmark
    # libero_spatial, libero_object, libero_goal, libero_10 or libero_90
    task_suite_name: str = "libero_spatial"
    # Only these tasks (0-based), e.g. "[0, 5]". Default: all
    task_ids: list[int] | None = None
    # Episodes per task (at most 50 with LIBERO's own initial states)
    num_trials_per_task: int = 50

    # --- roll-outs
    # Actions executed between two queries: the first ones of a chunk (original default: 8). Default: the whole chunk
    num_open_loop_steps: int | None = None
    # Simulator steps without motion before the policy starts, while objects fall to rest
    num_steps_wait: int = 10
    # Policy steps before an episode counts as failed. Default: 220 / 280 / 300 / 520 / 400 by suite
    max_steps: int | None = None

    # --- benchmark
    # DEFAULT for LIBERO's initial states, or a JSON file written by `prismo data regenerate`
    initial_states_path: str = DEFAULT_STATES

    # --- simulator
    # Height and width of the camera images in pixels
    env_img_res: int = 256
    # Folder of LIBERO's assets, or "stand-ins" for the built-in ones (smoke runs). Default: PRISMO_LIBERO_ASSETS, what
    # is installed, the hub
    libero_assets: str | None = None
    # Fetch LIBERO's assets (200 MB) from the hub where none are found
    download_assets: bool = True

    # --- what is written
    # Videos of which episodes: all, failures or none (drawing every step doubles the time without a GPU)
    save_videos: str = "all"
    # Videos with the wrist view beside (drawn at every step: 60 ms each without a GPU) and a caption below
    annotate_videos: bool = False
    # Folder of the videos; they go into a sub-folder by date
    rollout_dir: str = "./rollouts"
    # Folder of the text log and of the results
    local_log_dir: str = "./experiments/logs"
    # Suffix of the run's name
    run_id_note: str | None = None

    # --- run
    # Continue the newest unfinished run of the same command; False starts a new one
    resume: bool = True
    # Run the episodes again that ended in an error
    retry_errors: bool = False
    # Continue a run although its first episodes were played with other versions of simulator, renderer or code
    allow_mixed: bool = False
    # Stop after that many equal errors in a row (0: never)
    max_errors: int = 3

    # --- what is written
    # Also log to Weights & Biases
    use_wandb: bool = False
    wandb_entity: str | None = None
    wandb_project: str = "prismo-libero-eval"

    # --- run
    # Seed of whatever the policy draws at random; scenes are seeded by the trial's number, the same for every policy
    seed: int = 7

    def validate(self) -> None:
        """Everything that can be seen without a file.

        Raises:
            ValueError: naming the flag, what it was and what it may be.
        """
        super().validate()
        if self.task_suite_name not in SUITES:
            raise ValueError(did_you_mean("task_suite_name", self.task_suite_name, SUITES))
        if self.save_videos not in get_args(SaveVideos):
            raise ValueError(did_you_mean("save_videos", self.save_videos, get_args(SaveVideos)))
        if self.annotate_videos and self.save_videos == "none":
            raise ValueError("--annotate_videos True, but --save_videos none writes none; give all or failures")
        at_least(self, num_trials_per_task=1, num_open_loop_steps=1, num_steps_wait=0, max_steps=1)
        at_least(self, env_img_res=16, max_errors=0, seed=0)
        if self.seed > _MAX_SEED:
            raise ValueError(f"--seed is {self.seed}; expected at most {_MAX_SEED}")
        if self.run_id_note is not None and not re.fullmatch(r"(?!\.)[^/\x00-\x1f]{0,100}", self.run_id_note):
            raise ValueError(
                f"--run_id_note is {self.run_id_note!r}; it becomes part of a folder's name: give at most 100 "
                "characters without slashes and line breaks, not beginning with a dot"
            )
        if self.initial_states_path == DEFAULT_STATES and self.num_trials_per_task > BENCHMARK_STATES:
            raise ValueError(
                f"--num_trials_per_task is {self.num_trials_per_task}, but LIBERO has {BENCHMARK_STATES} initial "
                "states per task; for more give your own with --initial_states_path"
            )
        check_task_ids(self.task_suite_name, self.task_ids)

    @property
    def episode_steps(self) -> int:
        """Policy steps before an episode counts as failed."""
        return self.max_steps or MAX_STEPS[self.task_suite_name]
