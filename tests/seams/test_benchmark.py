"""A benchmark is one module and one line: another robot, another camera, another simulator, through `prismo eval`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prismo.commands.eval import main
from prismo.eval.benchmark import BENCHMARKS, benchmark_of
from prismo.eval.config import EvalConfig
from prismo.testing.tiny import make_tiny_policy

pytestmark = pytest.mark.processes

MODULE = '''
"""Two arms on a line that reach for nothing: 14 joints, one camera, a goal that is reached after 7 actions."""

import sys

import numpy as np

from prismo.sim.interface import Observation, SimInfo, SimulatorError, StepResult
from prismo.sim.server import serve


class Arms:
    def __init__(self, size):
        assert "torch" not in sys.modules and "mujoco" not in sys.modules
        self.size = size

    def info(self):
        return SimInfo(assets="none", gl="none", versions={"arms": "1.2"})

    def reset(self, suite, task_id, init_state, seed, settle_steps):
        if (suite, task_id) != ("aloha_reach", 1):
            raise SimulatorError("there is no such task")
        self.joints = np.full(14, 0.1 * init_state) if isinstance(init_state, int) else init_state
        self.reachable, self.count = init_state == 0, -settle_steps
        return self.observe()

    def step_chunk(self, actions, render):
        for steps, action in enumerate(actions, start=1):
            self.joints = self.joints + action
            self.count += 1
            if success := self.reachable and self.count == 5:  # 7 actions after 2 steps of rest
                break
        frames = np.stack([self.image()] * steps) if render in ("all", "all_views") else None
        return StepResult(self.observe(), success, steps, frames)

    def observe(self):
        states = {"left": self.joints[:7], "right": self.joints[7:]}
        return Observation({"front": self.image()}, states, "reach for nothing")

    def image(self):
        return np.full((self.size, self.size, 3), 100 + self.count, np.uint8)


if __name__ == "__main__":
    serve(Arms)
    sys.exit()

from prismo.embodiment import Embodiment
from prismo.sim.interface import Task
from prismo.sim.worker import SimWorker


class ArmsBenchmark:
    robot = Embodiment(
        "arms", 14, 14, 25, "bounds", 10.0, gripper_dims=(6, 13), cameras=("front",), states=("left", "right")
    )
    flags = ("env_img_res",)

    def validate(self, cfg):
        if cfg.task_suite_name != "aloha_reach":
            raise ValueError(f"--task_suite_name is {cfg.task_suite_name}; the arms have aloha_reach")

    def tasks(self, cfg):
        return [Task("aloha_reach", i, f"reach_{i}", "reach for nothing") for i in range(2)]

    def trials(self, cfg, task):
        return dict.fromkeys(range(cfg.num_trials_per_task))

    def max_steps(self, cfg):
        return 30

    def settings(self, cfg):
        return {"size": cfg.env_img_res}

    def open(self, cfg, cuda_device):
        return SimWorker("arms_benchmark", {"size": cfg.env_img_res}, action_dim=14, python=sys.executable)

    def warnings(self, versions):
        return [f"arms {versions['arms']} are not those of the paper"]


BENCHMARK = ArmsBenchmark()
'''


@pytest.fixture
def arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, and the line."""
    (tmp_path / "arms_benchmark.py").write_text(MODULE)
    monkeypatch.setitem(BENCHMARKS, "arms", "arms_benchmark")
    monkeypatch.syspath_prepend(tmp_path)
    root = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")  # the interpreter that the benchmark names finds both


@pytest.mark.usefixtures("arms")
def test_a_benchmark_is_one_file_and_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    policy = make_tiny_policy(tmp_path / "policy", dataset="aloha_reach", layers=2)
    logs = tmp_path / "logs"
    flags = {
        "benchmark": "arms",
        "task_suite_name": "aloha_reach",
        "task_ids": [1],
        "num_trials_per_task": 2,
        "num_steps_wait": 2,
        "num_images_in_input": 1,
        "num_open_loop_steps": 4,
        "env_img_res": 32,
        "pretrained_checkpoint": policy,
        "device": "cpu",
        "local_log_dir": logs,
        "rollout_dir": tmp_path / "rollouts",
        "annotate_videos": True,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(words) == 0
    (folder,) = logs.glob("EVAL-aloha_reach-openvla-*/")
    found = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    assert [(line["outcome"], line["steps"], line["queries"]) for line in found] == [
        ("success", 7, 2),
        ("failure", 30, 8),
    ]
    assert [(line["task_id"], line["init_state"], line["task"]) for line in found] == [
        (1, 0, "reach for nothing"),
        (1, 1, "reach for nothing"),
    ]
    assert {line["versions"]["arms"] for line in found} == {"1.2"}
    results = json.loads((folder / "results.json").read_text())
    assert results["warnings"] == ["arms 1.2 are not those of the paper"]
    assert not results["smoke_run"]
    assert results["settings"]["size"] == 32
    assert len(list((folder / "videos").iterdir())) == 2
    assert "Overall success rate: 0.5000" in folder.with_name(folder.name + ".txt").read_text()


@pytest.mark.usefixtures("arms")
def test_flags_of_other_benchmarks_are_refused() -> None:
    cfg = EvalConfig(benchmark="arms", task_suite_name="aloha_reach", libero_assets="stand-ins")
    with pytest.raises(ValueError, match="--libero_assets means nothing with --benchmark arms"):
        benchmark_of(cfg)
    with pytest.raises(ValueError, match="--task_suite_name is libero_spatial; the arms have aloha_reach"):
        benchmark_of(EvalConfig(benchmark="arms"))
    with pytest.raises(ValueError, match=r"unknown benchmark 'librio'\. Did you mean 'libero'"):
        benchmark_of(EvalConfig(benchmark="librio"))


def test_flags_are_checked_without_heavy_packages() -> None:
    program = (
        "import sys\n"
        "from prismo.eval.benchmark import benchmark_of\n"
        "from prismo.eval.config import EvalConfig\n"
        "benchmark_of(EvalConfig())\n"
        "assert not {'torch', 'mujoco', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
