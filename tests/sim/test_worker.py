"""The simulator process: observations, conventions, repeatability, and what happens when it dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from prismo.sim.assets import Assets
from prismo.sim.interface import Observation, SimulatorCrashed, SimulatorError, SimulatorTimeout
from prismo.sim.libero import AGENT_CAMERA, CAMERAS, STATES
from prismo.sim.libero_worker import LiberoWorker
from prismo.sim.suites import LiberoTask, load_init_states, load_tasks

pytestmark = pytest.mark.processes

SUITE = "libero_object"
OPEN, CLOSE = -1.0, 1.0


def actions(count: int, gripper: float = OPEN, **deltas: float) -> np.ndarray:
    chunk = np.zeros((count, 7))
    chunk[:, 6] = gripper
    for name, value in deltas.items():
        chunk[:, "xyz".index(name)] = value
    return chunk


def same(a: Observation, b: Observation) -> bool:
    images = all(map(np.array_equal, a.pictures(CAMERAS), b.pictures(CAMERAS)))
    return images and np.array_equal(a.state(STATES), b.state(STATES)) and a.instruction == b.instruction


def test_observation_has_the_documented_shapes(worker: LiberoWorker) -> None:
    observation = worker.reset(SUITE, 7, 3)
    assert observation.instruction == "pick up the milk and place it in the basket"
    for image in observation.pictures(CAMERAS):
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert image.std() > 10
    assert observation.state(STATES).shape == (8,)
    assert observation.state(STATES).dtype == np.float64
    # The arm's home pose: half a metre in front of the base, pointing down (axis-angle near (pi, 0, 0)), gripper open.
    assert np.allclose(observation.state(STATES)[:3], (-0.16, 0.0, 0.25), atol=0.03)
    assert np.allclose(observation.state(STATES)[3:6], (np.pi, 0.0, -0.09), atol=0.05)
    assert np.allclose(observation.state(STATES)[6:], (0.039, -0.039), atol=0.002)
    info = worker.info
    assert (info.assets, info.gl) == ("stand-ins", str(worker.backend))
    assert info.versions["mujoco"] == version("mujoco")


def test_pictures_are_drawn_only_when_wanted(worker: LiberoWorker) -> None:
    worker.reset(SUITE, 0, 0)
    nothing = worker.step_chunk(actions(3), render="none")
    assert (nothing.observation.images, nothing.frames) == ({}, None)
    last = worker.step_chunk(actions(2), render="last")
    assert list(last.observation.images) == list(CAMERAS)
    assert last.frames is None
    film = worker.step_chunk(actions(2), render="all")
    assert film.frames.shape == (2, 64, 64, 3)
    assert np.array_equal(film.frames[-1], film.observation.images[AGENT_CAMERA])
    assert (film.steps, film.success) == (2, False)


def test_drawing_does_not_change_the_episode(worker: LiberoWorker) -> None:
    rng = np.random.RandomState(0)
    chunk = rng.uniform(-1, 1, (6, 7))
    results = []
    for render in ("none", "last", "all", "all_views"):
        worker.reset(SUITE, 2, 5)
        results.append(worker.step_chunk(chunk, render=render).observation)
    assert np.array_equal(results[0].state(STATES), results[1].state(STATES))
    assert same(results[1], results[2])
    assert same(results[1], results[3])


def test_picture_is_turned_by_180_degrees(worker: LiberoWorker) -> None:
    """Basket on the left and robot at the top: as in the training data. OpenGL delivers it upside down."""
    image = worker.reset(SUITE, 0, 0).images[AGENT_CAMERA].astype(int)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    rows, columns = np.nonzero((red - blue > 40) & (red - green > 10) & (green - blue > 10))  # the basket's brown
    assert columns.mean() < 20
    assert 24 < rows.mean() < 48
    robot = np.nonzero((np.ptp(image, axis=2) < 10) & (red > 110))[0]  # light grey; the wall behind it is darker
    assert np.median(robot) < 40


@pytest.mark.usefixtures("drawing")
def test_picture_agrees_with_a_published_observation(libero_assets: Assets) -> None:
    """OpenVLA-OFT's sample observation against our picture of the same scene, upright and in all wrong ways."""
    path = Path(__file__).resolve().parents[3] / "shared" / "sample_libero_spatial_observation.npz"
    if not path.is_file():
        pytest.skip("needs the sample observation beside the repository")
    sample = dict(np.load(path, allow_pickle=False))
    with LiberoWorker(libero_assets, image_size=224) as worker:
        observation = worker.reset("libero_spatial", 0, 0)
    for name, ours in zip(("full_image", "wrist_image"), observation.pictures(CAMERAS), strict=True):
        views = [ours, ours[::-1], ours[:, ::-1], ours[::-1, ::-1]]
        scores = [np.corrcoef(sample[name].ravel(), view.ravel())[0, 1] for view in views]
        assert np.argmax(scores) == 0
        assert scores[0] > 0.75
    assert np.allclose(observation.state(STATES), sample["state"], atol=0.05)


def test_gripper_closes_at_plus_one_and_opens_at_minus_one(blind_worker: LiberoWorker) -> None:
    blind_worker.reset(SUITE, 0, 0)
    closed = blind_worker.step_chunk(actions(12, CLOSE), render="none").observation.state(STATES)[6:]
    assert np.abs(closed).max() < 0.005
    opened = blind_worker.step_chunk(actions(12, OPEN), render="none").observation.state(STATES)[6:]
    assert opened[0] > 0.035
    assert opened[1] < -0.035


@pytest.mark.parametrize(("axis", "index"), [("x", 0), ("y", 1), ("z", 2)])
def test_positive_delta_moves_along_the_positive_axis(axis: str, index: int, blind_worker: LiberoWorker) -> None:
    before = blind_worker.reset(SUITE, 0, 0).state(STATES)
    moved = blind_worker.step_chunk(actions(5, **{axis: 0.5}), render="none").observation.state(STATES) - before
    assert 0.01 < moved[index] < 0.08
    assert np.abs(np.delete(moved[:3], index)).max() < 0.01


@pytest.mark.parametrize("index", [0, 1, 49])
def test_episode_k_starts_from_state_k_and_comes_to_rest(index: int, blind_worker: LiberoWorker) -> None:
    blind_worker.reset(SUITE, 3, index, settle_steps=0)
    assert np.array_equal(blind_worker.sim_state(), load_init_states(SUITE, 3)[index])
    blind_worker.reset(SUITE, 3, index)
    before = blind_worker.object_poses()
    blind_worker.step_chunk(actions(10), render="none")
    after = blind_worker.object_poses()
    assert set(before) >= {"bbq_sauce_1", "basket_1"}
    assert max(np.abs(after[name][0] - before[name][0]).max() for name in before) < 1e-3


def test_episode_depends_on_nothing_that_ran_before(stand_ins: Assets, worker: LiberoWorker) -> None:
    """Same bits: in a used simulator, after another task, in a new process; so a lost episode can be repeated."""
    chunk = np.random.RandomState(1).uniform(-1, 1, (8, 7))

    def episode(simulator: LiberoWorker) -> Observation:
        simulator.reset(SUITE, 1, 7, seed=4)
        return simulator.step_chunk(chunk).observation

    worker.reset(SUITE, 1, 2, seed=1)
    worker.step_chunk(actions(6, CLOSE, x=1.0), render="none")
    used = episode(worker)
    worker.reset(SUITE, 9, 0)
    worker.step_chunk(actions(2))
    after_another_task = episode(worker)
    with LiberoWorker(stand_ins, image_size=64) as fresh:
        assert same(used, episode(fresh))
    assert same(used, after_another_task)


def test_dead_simulator_is_an_error_and_comes_back(stand_ins: Assets) -> None:
    with LiberoWorker(stand_ins, cameras=False) as worker:
        before = worker.reset(SUITE, 0, 0)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(SimulatorCrashed, match=r"died during 'step_chunk' \(SIGKILL\)"):
            worker.step_chunk(actions(1))
        assert worker.pid is None
        with pytest.raises(SimulatorError, match="call reset first"):
            worker.step_chunk(actions(1))
        assert np.array_equal(worker.reset(SUITE, 0, 0).state(STATES), before.state(STATES))


def test_hung_simulator_is_killed_and_comes_back(stand_ins: Assets) -> None:
    with LiberoWorker(stand_ins, cameras=False) as worker:
        worker.step_timeout = 2.0
        worker.reset(SUITE, 0, 0)
        hung = worker.pid
        os.kill(hung, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(SimulatorTimeout, match="did not answer 'step_chunk' within 2 s"):
            worker.step_chunk(actions(1))
        assert time.monotonic() - start < 10
        with pytest.raises(ProcessLookupError):
            os.kill(hung, 0)
        worker.reset(SUITE, 0, 0)
        assert worker.pid not in (None, hung)


def test_simulator_leaves_with_its_parent(stand_ins: Assets) -> None:
    program = (
        "import sys, os\n"
        "from prismo.sim.libero_worker import LiberoWorker\n"
        "from prismo.sim.assets import resolve_assets\n"
        "worker = LiberoWorker(resolve_assets('stand-ins'), cameras=False)\n"
        "worker.start()\n"
        "print(worker.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(7), r"expected finite actions of shape \[n, 7\], found shape \(7,\)"),
        (np.zeros((0, 7)), r"found shape \(0, 7\)"),
        (np.full((1, 7), np.nan), "with NaN"),
    ],
)
def test_bad_actions_are_refused(bad: np.ndarray, message: str, blind_worker: LiberoWorker) -> None:
    blind_worker.reset(SUITE, 0, 0)
    with pytest.raises(ValueError, match=message):
        blind_worker.step_chunk(bad)
    assert blind_worker.step_chunk(actions(1), render="none").steps == 1


def test_bad_states_are_refused_and_the_worker_goes_on(blind_worker: LiberoWorker) -> None:
    with pytest.raises(SimulatorError, match="initial states 0 to 49; found 50"):
        blind_worker.reset(SUITE, 0, 50)
    with pytest.raises(SimulatorError, match="belongs to another task"):
        blind_worker.reset(SUITE, 0, load_init_states("libero_goal", 0)[0])
    state = load_init_states(SUITE, 0)[2]
    by_array, by_index = blind_worker.reset(SUITE, 0, state), blind_worker.reset(SUITE, 0, 2)
    assert np.array_equal(by_array.state(STATES), by_index.state(STATES))


@pytest.mark.usefixtures("drawing")
def test_nothing_is_asked_or_written_at_home(
    tmp_path: Path, stand_ins: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # robosuite alone would take this for an invalid EGL device
    with LiberoWorker(stand_ins, image_size=64) as worker:
        worker.reset(SUITE, 0, 0)
        open_files = [os.readlink(link) for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
    assert list(tmp_path.iterdir()) == []
    assert not [name for name in open_files if "robosuite" in name]  # its log in /tmp belongs to whoever came first


def test_simulator_without_cameras_needs_no_opengl(blind_worker: LiberoWorker) -> None:
    blind_worker.reset(SUITE, 0, 0)
    assert blind_worker.info.gl == "none"
    libraries = Path(f"/proc/{blind_worker.pid}/maps").read_text()
    assert "mujoco" in libraries
    assert not [name for name in ("libEGL", "libOSMesa", "libGL.") if name in libraries]


@pytest.mark.usefixtures("osmesa")
def test_osmesa_draws_the_same_picture(
    stand_ins: Assets, worker: LiberoWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if worker.backend.name != "egl" or not worker.backend.software:
        pytest.skip("compares the two software renderers")
    reference = worker.reset(SUITE, 0, 1)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with LiberoWorker(stand_ins, image_size=64) as other:
        assert other.backend.name == "osmesa"
        assert same(other.reset(SUITE, 0, 1), reference)


@pytest.mark.parametrize("task", load_tasks(SUITE), ids=lambda task: task.name[8:-24])
def test_every_object_task_runs_with_the_stand_ins(task: LiberoTask, blind_worker: LiberoWorker) -> None:
    blind_worker.reset(SUITE, task.index, task.index * 5)
    result = blind_worker.step_chunk(actions(3), render="none")
    assert (result.steps, result.success) == (3, False)
    poses = blind_worker.object_poses()
    assert len(poses) == 7
    for name, (position, _) in poses.items():
        assert -0.01 < position[2] < 0.08, name  # standing on the floor
    item = next(
        name for name in poses if name.startswith(task.language.split("the ")[1].split(" and")[0].replace(" ", "_"))
    )
    assert np.linalg.norm(poses[item][0][:2] - poses["basket_1"][0][:2]) > 0.2
