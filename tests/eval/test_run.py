"""Whole evaluations: results, resume after kill -9, errors, videos, and what stops before the first episode."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import imageio
import numpy as np
import pytest
from PIL import Image

from prismo.commands.report import main as report
from prismo.eval.config import EvalConfig
from prismo.eval.run import RepeatedError, evaluate, prepare
from prismo.policies.base import Policy, PolicyInput
from prismo.sim.assets import STAND_INS
from prismo.sim.interface import SimulatorError
from prismo.util.flags import parse_flags
from tests.eval.conftest import ASSETS, identity, lines, make_config
from tests.processes import MARK, left_after

GPU_ERROR = "the GPU fell off the bus"
SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "robot" / "libero" / "run_libero_eval.py"
pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("simulator")]  # skips where none can run


def command(cfg: EvalConfig) -> list[str]:
    """The command line of a configuration."""
    flags = [
        (field.name, getattr(cfg, field.name)) for field in fields(cfg) if getattr(cfg, field.name) != field.default
    ]
    return [sys.executable, str(SCRIPT), *(part for name, value in flags for part in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def finished(object_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    """An uninterrupted run with videos and W&B (on the disk only), in this process."""
    cfg = make_config(object_policy, tmp_path_factory.mktemp("finished"), save_videos="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        evaluate(replace(cfg, use_wandb=importlib.util.find_spec("wandb") is not None))
    return cfg


def test_files_of_a_run(finished: EvalConfig) -> None:
    logs = Path(finished.local_log_dir)
    (folder,) = logs.glob("EVAL-*/")
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"]
    assert results["total"]["episodes"] == results["total"]["failures"] == 4
    assert results["total"]["wilson_95"] == pytest.approx([0, 0.4899], abs=1e-4)
    assert [task["episodes"] for task in results["tasks"]] == [2, 2]
    assert results["policy"]["unnorm_key"] == "libero_object_no_noops"
    assert len(results["settings"]["checkpoint_hash"]) == 64
    versions = results["versions"]
    assert (versions["mujoco"], versions["torch"]) == (version("mujoco"), version("torch"))
    assert versions["gl"].startswith(("EGL", "OSMesa"))
    stand_ins = versions["assets"] == "stand-ins"
    assert any("smoke run" in warning for warning in results["warnings"]) == stand_ins
    assert (next(iter(results)), results["smoke_run"]) == ("smoke_run", stand_ins)
    assert results["mixed_versions"] == {}
    assert all(line["versions"]["mujoco"] == version("mujoco") for line in lines(logs))
    assert lines(logs)[0]["versions"]["renderer"].startswith(("egl (", "osmesa ("))
    assert [(line["episode"], line["task_id"], line["init_state"]) for line in lines(logs)] == [
        (1, 0, 0),
        (2, 0, 1),
        (3, 3, 0),
        (4, 3, 1),
    ]
    for line in lines(logs):
        assert (line["outcome"], line["steps"], line["queries"]) == ("failure", 10, 2)
        assert line["seconds"] > line["policy_seconds"] > 0


def test_the_originals_text_log_and_videos(finished: EvalConfig) -> None:
    logs = Path(finished.local_log_dir)
    (text,) = logs.glob("EVAL-libero_object-openvla-*.txt")
    content = text.read_text()
    assert ("Warning: the scenes are built-in stand-ins" in content) == (ASSETS == STAND_INS)
    assert content.count("\nTask: pick up the alphabet soup and place it in the basket\n") == 2
    assert "# successes: 0 (0.0%)\nCurrent task success rate: 0.0\nCurrent total success rate: 0.0\n" in content
    assert content.endswith(
        "Final results:\nTotal episodes: 4\nTotal successes: 0\nOverall success rate: 0.0000 (0.0%)\n"
    )
    stamp = text.stem.removeprefix("EVAL-libero_object-openvla-")
    videos = sorted(Path(finished.rollout_dir).rglob("*.mp4"))
    name = f"{stamp}--openvla_oft--episode=1--success=False--task=pick_up_the_alphabet_soup_and_place_it_in_the_bask"
    assert videos[0] == Path(finished.rollout_dir) / stamp[:10] / f"{name}.mp4"
    assert len(videos) == 4
    assert [line["video"] for line in lines(logs)] == [str(video) for video in videos]
    assert len(imageio.mimread(videos[0])) == 11  # the first observation and one frame per step


def test_what_a_run_leaves_is_found(finished: EvalConfig, capsys: pytest.CaptureFixture[str]) -> None:
    logs = Path(finished.local_log_dir)
    (folder,) = logs.glob("EVAL-*/")
    assert os.readlink(logs / "latest") == folder.name
    names = sorted(path.name for path in (folder / "videos").iterdir())
    task = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    assert names[:2] == [f"libero_object--task_00--trial_0{trial}--failure--{task}.mp4" for trial in (0, 1)]
    leads_to = [str((folder / "videos" / name).resolve()) for name in names]
    assert leads_to == [line["video"] for line in lines(logs)]
    assert not any(Path(os.readlink(folder / "videos" / name)).is_absolute() for name in names)
    with Image.open(folder / "overview.png") as picture:
        assert picture.width > 800
    (folder / "overview.png").unlink()
    assert report(["/".join((finished.local_log_dir, "latest"))]) == 0
    said = capsys.readouterr().out
    assert f"{folder.name}: 4 of 4 episodes, finished" in said
    for there in (folder / "results.json", f"{folder}.txt", folder / "overview.png", folder / "videos"):
        assert str(there) in said
        assert Path(there).exists()
    _, _, *words = shlex.split(said.splitlines()[-1])
    other = replace(finished, pretrained_checkpoint="OTHER_CHECKPOINT")
    assert replace(parse_flags(EvalConfig, words), use_wandb=False) == other


def test_wandb_keys(finished: EvalConfig) -> None:
    pytest.importorskip("wandb")
    (file,) = Path(finished.local_log_dir).glob("EVAL-*/wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for key in (b"success_rate/total", b"num_episodes/pick up the alphabet soup and place it in the basket"):
        assert key in content


def stopped(cfg: EvalConfig, number: signal.Signals) -> subprocess.Popen[str]:
    """The command, ended by a signal after two episodes; none of its processes is left."""
    mark, logs = uuid.uuid4().hex, Path(cfg.local_log_dir)
    environment = os.environ | {MARK: mark}
    process = subprocess.Popen(command(cfg), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if list(logs.glob("EVAL-*/episodes.jsonl")) and len(lines(logs)) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(60)
    assert not left_after(20, mark)
    assert len(lines(logs)) in (2, 3)
    assert not list(logs.glob("EVAL-*/results.json"))
    return process


def test_kill_and_continue(finished: EvalConfig, tmp_path: Path) -> None:
    """kill -9 after two episodes: the same command does the other two, and all four are those of the whole run."""
    cfg = replace(finished, local_log_dir=str(tmp_path / "logs"), save_videos="none")
    logs = Path(cfg.local_log_dir)
    stopped(cfg, signal.SIGKILL)
    before = lines(logs)
    (file,) = logs.glob("EVAL-*/episodes.jsonl")
    with file.open("a") as half:
        half.write('{"episode": ')  # as if it had died while it wrote

    done = subprocess.run(command(cfg), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 4 episodes are done" in done.stderr
    warned = [line for line in done.stderr.splitlines() if line.startswith("WARNING") and "stand-ins" in line]
    assert len(warned) == (ASSETS == STAND_INS)
    after = lines(logs)
    assert after[: len(before)] == before
    assert [identity(line) for line in after] == [identity(line) for line in lines(Path(finished.local_log_dir))]
    assert list(logs.glob("EVAL-*/results.json"))


def test_sigterm_and_continue(finished: EvalConfig, tmp_path: Path) -> None:
    """What a scheduler sends before it kills: every line is whole, and the run goes on."""
    cfg = replace(finished, local_log_dir=str(tmp_path / "logs"), save_videos="none")
    logs = Path(cfg.local_log_dir)
    assert stopped(cfg, signal.SIGTERM).returncode == 128 + signal.SIGTERM
    before = lines(logs)
    (file,) = logs.glob("EVAL-*/episodes.jsonl")
    assert file.read_bytes().endswith(b"}\n")
    assert (file.parent / "overview.png").is_file()
    assert evaluate(cfg).complete
    assert lines(logs)[: len(before)] == before
    assert [identity(line) for line in lines(logs)] == [identity(line) for line in lines(Path(finished.local_log_dir))]


FULL_DISK = """
import contextlib, resource, sys
from prismo.commands.eval import main
from prismo.eval import run
settle = run.prepare
@contextlib.contextmanager
def prepare(cfg):
    with settle(cfg) as evaluation:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # the second line does not fit
        yield evaluation
run.prepare = prepare
sys.exit(main())
"""


def test_a_full_disk_is_one_sentence_and_costs_no_episode(config: EvalConfig) -> None:
    cfg = replace(config, task_ids=[0])
    call = [sys.executable, "-c", FULL_DISK, *command(cfg)[2:]]
    done = subprocess.run(call, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done.stderr
    assert "ERROR stopped after 1 of 2 episodes: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line["episode"] for line in lines(Path(cfg.local_log_dir))] == [1]
    with prepare(cfg) as evaluation:
        assert [episode.number for episode in evaluation.todo] == [2]


class FailingPolicy:
    """A real policy that breaks in one episode, or in several."""

    def __init__(
        self, policy: Policy, *episodes: int, error: Callable[[int], BaseException] = lambda _: RuntimeError(GPU_ERROR)
    ) -> None:
        self._policy, self._failing, self._started, self._error = policy, episodes, 0, error
        self.robot, self.num_images, self.describe = policy.robot, policy.num_images, policy.describe

    def start_episode(self, slot: int, seed: int) -> None:
        self._started += 1
        self._policy.start_episode(slot, seed)

    def predict(self, inputs: Sequence[PolicyInput], slots: Sequence[int]) -> np.ndarray:
        if self._started in self._failing:
            raise self._error(self._started)
        return self._policy.predict(inputs, slots)


def test_an_error_is_a_third_outcome_and_can_be_retried(
    finished: EvalConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cfg = replace(
        finished, local_log_dir=str(tmp_path / "logs"), rollout_dir=str(tmp_path / "videos"), save_videos="failures"
    )
    logs = Path(cfg.local_log_dir)
    with prepare(cfg) as evaluation:
        summary = replace(evaluation, policy=FailingPolicy(evaluation.policy, 3)).run()
    assert (summary.total.failures, summary.total.errors, summary.total.success_rate) == (3, 1, 0.0)
    reference = [identity(line) for line in lines(Path(finished.local_log_dir))]
    found = lines(logs)
    assert [line["outcome"] for line in found] == ["failure", "failure", "error", "failure"]
    assert "the GPU fell off the bus" in found[2]["error"]
    assert [identity(line) for line in found if line["outcome"] != "error"] == [*reference[:2], reference[3]]
    assert "Total errors: 1" in next(logs.glob("*.txt")).read_text()
    videos = evaluation.run_folder.path / "videos"
    assert [path.name.split("--")[3] for path in sorted(videos.iterdir())] == ["failure", "failure", "error", "failure"]
    assert "--retry_errors True" in caplog.text
    assert imageio.mimread(found[1]["video"])[0].shape == (64, 64, 3)

    summary = evaluate(replace(cfg, retry_errors=True, annotate_videos=True))
    assert (summary.total.failures, summary.total.errors) == (4, 0)
    assert [path.name.split("--")[3] for path in sorted(videos.iterdir())] == ["failure"] * 4
    height, width, _ = imageio.mimread(lines(logs)[4]["video"])[0].shape
    assert (height > 80, width) == (True, 128)
    assert [line["episode"] for line in lines(logs)] == [1, 2, 3, 4, 3]
    assert identity(lines(logs)[4]) == reference[2]


def interrupted(cfg: EvalConfig, episode: int) -> Path:
    """Start an evaluation and stop it with Ctrl-C in an episode; returns its folder."""
    with prepare(cfg) as evaluation, pytest.raises(KeyboardInterrupt):
        replace(evaluation, policy=FailingPolicy(evaluation.policy, episode, error=lambda _: KeyboardInterrupt())).run()
    return evaluation.run_folder.path


def test_a_run_goes_on_with_the_versions_that_it_began_with(
    finished: EvalConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of two episodes was played with another MuJoCo and renderer: one rate of both would be nobody's."""
    caplog.set_level("INFO")
    cfg = replace(finished, local_log_dir=str(tmp_path / "logs"), save_videos="none", task_ids=[0])
    folder = interrupted(cfg, 2)
    assert (folder / "overview.png").is_file()
    assert f"{folder.name}: 1 of 2 episodes, not finished" in caplog.text
    assert "\ngo on with this run:\n  prismo eval " in caplog.text
    other = {"mujoco": "3.9.0", "renderer": "osmesa (softpipe)"}
    done = [{**line, "versions": line["versions"] | other} for line in lines(folder.parent)]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in done))
    ours = version("mujoco")
    says = rf"1 episode.*mujoco 3\.9\.0, now {re.escape(ours)}; renderer osmesa"
    with pytest.raises(ValueError, match=says) as error, prepare(cfg):
        pass
    assert "--resume False" in str(error.value)
    assert "--allow_mixed True" in str(error.value)
    assert len(lines(folder.parent)) == 1

    summary = evaluate(replace(cfg, allow_mixed=True))
    assert summary.complete
    results = json.loads((folder / "results.json").read_text())
    assert results["mixed_versions"]["mujoco"] == ["3.9.0", ours]
    assert set(results["mixed_versions"]) == {"mujoco", "renderer"}
    assert any(f"mujoco 3.9.0, {ours}" in warning for warning in results["warnings"])


def test_errors_of_other_versions_are_retried(finished: EvalConfig, tmp_path: Path) -> None:
    """Different errors stop nothing. Nothing is mixed where all that the other version left are errors."""
    cfg = replace(
        finished, local_log_dir=str(tmp_path / "logs"), save_videos="none", task_ids=[0], num_trials_per_task=3
    )
    with prepare(cfg) as evaluation:
        policy = FailingPolicy(evaluation.policy, 1, 2, 3, error=lambda n: [OSError, ValueError][n % 2]("x"))
        assert replace(evaluation, policy=policy).run().total.errors == 3
    file = evaluation.run_folder.path / "episodes.jsonl"
    file.write_text(file.read_text().replace('"torch": "', '"torch": "0.'))
    summary = evaluate(replace(cfg, retry_errors=True))
    assert (summary.total.failures, summary.total.errors) == (3, 0)
    assert json.loads((file.parent / "results.json").read_text())["mixed_versions"] == {}


def test_an_error_of_every_episode_ends_the_evaluation(finished: EvalConfig, tmp_path: Path) -> None:
    """Out of memory in all 500 episodes: three are enough, whatever the numbers in the message."""
    cfg = replace(
        finished, local_log_dir=str(tmp_path / "logs"), save_videos="none", task_ids=[0], num_trials_per_task=4
    )
    logs = Path(cfg.local_log_dir)

    def out_of_memory(episode: int) -> Exception:
        return RuntimeError(f"CUDA out of memory. Tried to allocate {episode}.5 MiB")

    with prepare(cfg) as evaluation, pytest.raises(RepeatedError, match=r"3 episodes in a row .*CUDA out of"):
        replace(evaluation, policy=FailingPolicy(evaluation.policy, 1, 2, 3, error=out_of_memory)).run()
    assert [line["outcome"] for line in lines(logs)] == ["error"] * 3
    assert not list(logs.glob("*/results.json"))
    with prepare(replace(cfg, retry_errors=True)) as evaluation:
        assert [episode.number for episode in evaluation.todo] == [1, 2, 3, 4]


def test_the_same_command_after_the_end_is_a_new_run(finished: EvalConfig) -> None:
    with prepare(replace(finished, save_videos="none")) as again:
        assert len(again.todo) == 4
        fresh = again.run_folder.path
    for file in fresh.iterdir():
        file.unlink()
    fresh.rmdir()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"unnorm_key": "libero_gaol"}, "unknown unnorm_key 'libero_gaol'. Available: libero_object_no_noops"),
        ({"task_suite_name": "libero_goal"}, "was trained on libero_object_no_noops, asked for libero_goal"),
        ({"use_diffusion": True}, "flags contradict the checkpoint"),
        ({"num_open_loop_steps": 9}, "predicts chunks of 8 actions"),
        ({"pretrained_checkpoint": "/nowhere"}, "neither a checkpoint folder nor a hub id"),
        ({"libero_assets": "/nowhere"}, "is not LIBERO's assets folder"),
        (
            {"libero_assets": "stand-ins", "task_suite_name": "libero_10", "unnorm_key": "libero_object"},
            "needs LIBERO's own assets",
        ),
    ],
)
def test_wrong_input_stops_before_the_first_episode(config: EvalConfig, flags: dict, says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError, SimulatorError)) as error, prepare(replace(config, **flags)):
        pass
    assert says in str(error.value)
    assert not Path(config.local_log_dir).exists()


def test_the_command_says_it_in_one_line(config: EvalConfig) -> None:
    call = command(replace(config, unnorm_key="libero_gaol"))
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("Available: libero_object_no_noops")
    assert "Traceback" not in done.stderr
    assert not Path(config.local_log_dir).exists()
