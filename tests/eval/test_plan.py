"""Which episodes a command means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prismo.benchmarks.libero import BENCHMARK
from prismo.eval.benchmark import benchmark_of
from prismo.eval.config import EvalConfig
from prismo.eval.episode import plan_episodes
from prismo.sim.suites import load_tasks
from prismo.util.cli import parse_flags

pytest.importorskip("libero", reason="the tasks are read from the installed LIBERO package")


def test_trial_k_starts_from_initial_state_k() -> None:
    episodes = plan_episodes(EvalConfig(task_suite_name="libero_10"), BENCHMARK)
    assert [e.number for e in episodes] == list(range(1, 501))
    assert [e.init_state for e in episodes] == list(range(50)) * 10
    assert [e.task.index for e in episodes] == sorted(list(range(10)) * 50)
    assert [e.env_seed for e in episodes] == [e.init_state for e in episodes]
    assert len({e.policy_seed for e in episodes}) == 500
    assert episodes == plan_episodes(EvalConfig(task_suite_name="libero_10"), BENCHMARK)
    other = plan_episodes(EvalConfig(task_suite_name="libero_10", seed=8), BENCHMARK)
    assert all(a.policy_seed != b.policy_seed for a, b in zip(episodes, other, strict=True))


def test_chosen_tasks_keep_their_seeds() -> None:
    everything = plan_episodes(EvalConfig(num_trials_per_task=2), BENCHMARK)
    some = plan_episodes(EvalConfig(num_trials_per_task=2, task_ids=[5, 1]), BENCHMARK)
    assert [e.task.index for e in some] == [1, 1, 5, 5]
    assert [replace(e, number=0) for e in everything if e.task.index in (1, 5)] == [replace(e, number=0) for e in some]


def test_custom_initial_states_leave_out_failed_demonstrations(tmp_path: Path) -> None:
    tasks = load_tasks("libero_object")[:2]
    content = {
        task.language.replace(" ", "_"): {
            f"demo_{i}": {"success": i != 1, "initial_state": [float(i)] * 5} for i in range(4)
        }
        for task in tasks
    }
    file = tmp_path / "states.json"
    file.write_text(json.dumps(content))
    cfg = EvalConfig(
        task_suite_name="libero_object", task_ids=[0, 1], num_trials_per_task=3, initial_states_path=str(file)
    )
    episodes = plan_episodes(cfg, BENCHMARK)
    assert [(e.number, e.task.index, e.init_state) for e in episodes] == [(1, 0, 0), (2, 0, 2), (3, 1, 0), (4, 1, 2)]
    np.testing.assert_array_equal(episodes[1].state, [2.0] * 5)
    with pytest.raises(ValueError, match="unknown task"):
        plan_episodes(replace(cfg, task_ids=[2]), BENCHMARK)


def test_a_task_without_a_state_is_named(tmp_path: Path) -> None:
    """Its first success lies behind the trials: without a word it would be missing from the rate."""
    key = load_tasks("libero_object")[0].language.replace(" ", "_")
    states = {f"demo_{i}": {"success": i == 7, "initial_state": [0.0] * 5} for i in range(9)}
    file = tmp_path / "states.json"
    file.write_text(json.dumps({key: states}))
    cfg = EvalConfig(
        task_suite_name="libero_object", task_ids=[0], num_trials_per_task=5, initial_states_path=str(file)
    )
    with pytest.raises(ValueError, match=r"its first success is demo_7.*--num_trials_per_task 8"):
        plan_episodes(cfg, BENCHMARK)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"task_suite_name": "libero_objects"}, "Did you mean 'libero_object'"),
        ({"num_trials_per_task": 51}, "LIBERO has 50 initial states"),
        ({"save_videos": "some"}, "Available: all, failures, none"),
        ({"task_ids": [0, 10]}, r"holds \[10\]; libero_spatial has tasks 0 to 9"),
        ({"num_open_loop_steps": 0}, "expected at least 1"),
        ({"task_ids": []}, r"--task_ids is empty; leave it out for all tasks"),
        ({"task_ids": [0, -1]}, r"holds \[-1\]"),
        ({"seed": -1}, "--seed is -1; expected at least 0"),
        ({"seed": 2**32}, "--seed is 4294967296; expected at most 4294967295"),
        ({"max_errors": -1}, "--max_errors is -1"),
        ({"run_id_note": "a/b"}, "--run_id_note is 'a/b'; it becomes part of a folder's name"),
        ({"run_id_note": "../../escape"}, "--run_id_note"),
        ({"run_id_note": "a\tb"}, "--run_id_note"),
        ({"run_id_note": "x" * 200}, "--run_id_note"),
        ({"ensemble_alpha": float("nan")}, "--ensemble_alpha is nan"),
    ],
)
def test_wrong_flags(flags: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        benchmark_of(EvalConfig(**flags))


def test_an_unknown_flag_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown flag '--task_suite'\. Did you mean '--task_suite_name'"):
        parse_flags(EvalConfig, ["--task_suite", "libero_goal"])
