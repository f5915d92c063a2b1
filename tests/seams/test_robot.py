"""A robot of one's own is described once, beside its data; every later command reads it from the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prismo.commands import main
from prismo.data.dataset import open_dataset
from prismo.embodiment import LIBERO, Embodiment
from prismo.eval.benchmark import BENCHMARKS
from prismo.eval.config import EvalConfig
from prismo.eval.run import prepare
from prismo.models.folder import TRAINING_CONFIG
from prismo.policies.base import PolicyInput
from prismo.policies.checkpoint import open_checkpoint
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from tests.training.conftest import DATASET, Flags, train

YAML = f"""
name: my_robot
path: {DATASET}
cameras: {{wrist: observation/wrist_image, front: observation/image}}
action: action
proprio: {{joints: observation/joint_state, finger: "observation/state[6:7]"}}
gripper: open_low
gripper_env_sign: 1
control_hz: 15
chunk: 4
normalization: bounds
"""
OWN = Embodiment(
    *("my_robot", 7, 8, 4, "bounds", 15.0),
    gripper_env_sign=1,
    cameras=("wrist", "front"),
    states=("joints", "finger"),
)
LAB = '''
"""Three cameras and two state vectors, in another order than the policy takes them."""

import sys

import numpy as np

from prismo.sim.interface import Observation, SimInfo, StepResult
from prismo.sim.server import serve

CAMERAS = ("top", "front", "wrist")


class Scene:
    def info(self):
        return SimInfo(assets="none", gl="none")

    def reset(self, suite, task_id, init_state, seed, settle_steps):
        images = {camera: np.full((32, 32, 3), 80 * i, np.uint8) for i, camera in enumerate(CAMERAS)}
        return Observation(images, {"finger": np.zeros(1), "joints": np.ones(7)}, "wait")

    def step_chunk(self, actions, render):
        return StepResult(self.reset(*[None] * 5), bool((actions[-1, 6:] == 1).all()), len(actions))


if __name__ == "__main__":
    serve(Scene)
    sys.exit()

from dataclasses import replace

from prismo.benchmarks.libero import LiberoBenchmark
from prismo.embodiment import LIBERO
from prismo.sim.worker import SimWorker


class Lab(LiberoBenchmark):
    robot = replace(LIBERO, name="lab", control_hz=15.0, cameras=CAMERAS, states=("finger", "joints"))

    def open(self, cfg, cuda_device):
        return SimWorker("lab", {}, action_dim=7, python=sys.executable)

    def warnings(self, versions):
        return []


BENCHMARK = Lab()
'''


@pytest.fixture(scope="module")
def merged(flags: Flags, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates on a dataset that a file describes, then merged into another folder; both by the commands."""
    root = tmp_path_factory.mktemp("robot")
    (root / "robot.yaml").write_text(YAML)
    assert train(flags(root / "runs", dataset_name=root / "robot.yaml", max_steps=2)) == 0
    words = ["--lora_finetuned_checkpoint_dir", root / "runs" / "run--2_chkpt", "--output", root / "merged"]
    assert main(["merge", "--base_checkpoint", str(tiny_base), *map(str, words)]) == 0
    return root / "merged"


def test_everything_is_read_back_from_the_merged_folder(merged: Path) -> None:
    assert open_checkpoint(merged).record.embodiment == OWN
    spec = prepare_policy(PolicyFlags(pretrained_checkpoint=str(merged)))
    assert (spec.robot, spec.settings.chunk, spec.settings.unnorm_key) == (OWN, 4, "my_robot")
    policy = spec.load()
    policy.start_episode(0, seed=0)
    pictures = tuple(np.full((64, 64, 3), grey, np.uint8) for grey in (50, 200))
    assert policy.predict([PolicyInput(pictures, np.zeros(8), "wait")], [0]).shape == (1, 4, 7)
    card = (merged / "README.md").read_text()
    for row in ("`robot` | my_robot", "`cameras` | wrist, front", "`control_hz` | 15.0", "`gripper_env_sign` | 1"):
        assert f"| {row} |" in card


def test_mixed_robots_have_no_names_in_common(libero: Path, tmp_path: Path) -> None:
    """Views then go by position, as ever."""
    (tmp_path / "robot.yaml").write_text(YAML)
    (tmp_path / "mixture.yaml").write_text(f"datasets: {{{DATASET}: 1, robot.yaml: 1}}")
    assert open_dataset(libero, tmp_path / "mixture.yaml", chunk=8).embodiment == replace(LIBERO, cameras=(), states=())
    assert open_dataset(libero, tmp_path / "robot.yaml", num_images=1).embodiment == replace(OWN, cameras=("wrist",))
    (tmp_path / "robot.yaml").write_text(f"embodiment: libero{YAML}")  # it is that robot
    assert open_dataset(libero, tmp_path / "robot.yaml").embodiment.cameras == LIBERO.cameras
    assert open_dataset(libero, tmp_path / "robot.yaml").embodiment.states == LIBERO.states


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], EvalConfig]:
    """`lab(policy)`: one short episode in the other benchmark."""
    (tmp_path / "lab.py").write_text(LAB)
    monkeypatch.setitem(BENCHMARKS, "lab", "lab")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[2]}")
    flags = {"benchmark": "lab", "max_steps": 8, "task_ids": [0], "num_trials_per_task": 1, "save_videos": "none"}
    flags |= {"unnorm_key": "my_robot", "local_log_dir": str(tmp_path / "logs"), "device": "cpu"}
    return lambda policy: EvalConfig(**flags, pretrained_checkpoint=str(policy))


@pytest.mark.processes
def test_views_and_states_are_chosen_by_their_names(merged: Path, lab: Callable[[Path], EvalConfig]) -> None:
    with prepare(lab(merged)) as evaluation:
        settings, policy = evaluation.settings, evaluation.policy
        assert (settings.cameras, settings.states) == (("wrist", "front"), ("joints", "finger"))
        assert policy is not None
        # The gripper is the scene's, the numbers mean what they meant in training.
        assert policy.robot == replace(OWN, name="lab", gripper_env_sign=-1)
        assert evaluation.run().total.errors == 0


@pytest.mark.processes
def test_an_older_folder_goes_by_position(merged: Path, tmp_path: Path, lab: Callable[[Path], EvalConfig]) -> None:
    with prepare(lab(edited(merged, tmp_path / "copy", cameras=None, states=None))) as evaluation:
        settings = evaluation.settings
        assert (settings.cameras, settings.states) == (("top", "front"), ("finger", "joints"))


def edited(merged: Path, target: Path, **changes: object) -> Path:
    """A copy whose file says something else of the robot; None takes a key away."""
    folder = Path(shutil.copytree(merged, target))
    record = json.loads((folder / TRAINING_CONFIG).read_text())
    robot = record["embodiment"] | changes
    record["embodiment"] = {name: value for name, value in robot.items() if value is not None}
    (folder / TRAINING_CONFIG).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "was trained with the cameras wrist, front, but --benchmark libero has agentview, robot0_eye_in_hand"),
        ({"cameras": None}, "was trained with the states joints, finger, but --benchmark libero has eef_pos, eef_axis"),
        (
            {"action_dim": 14, "gripper_dims": [6, 13]},
            "has actions of 14 numbers with grippers at [6, 13], but libero takes actions of 7 numbers with grippers "
            "at [6]: it was trained for another robot, my_robot",
        ),
    ],
)
def test_libero_refuses_what_it_cannot_drive(
    merged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, object], says: str
) -> None:
    folder = edited(merged, tmp_path / "copy", **changes)
    words = ["--pretrained_checkpoint", str(folder), "--unnorm_key", "my_robot", "--local_log_dir", str(tmp_path / "l")]
    assert main(["eval", *words, "--save_videos", "none"]) == 2
    assert says in caplog.text
    assert not (tmp_path / "l").exists()
