"""The expert's demonstrations: schema, resuming, and replays that reproduce them bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from prismo.commands import data_collect
from prismo.data.hdf5 import convert_episodes, find_demonstrations
from prismo.sim.assets import Assets
from prismo.sim.collect import (
    EXPERT_TASKS,
    expert_items,
    raw_items,
    regenerate,
    run_expert,
    success_table,
    write_metainfo,
)
from prismo.sim.collection import Collection
from prismo.sim.demos import Demo, assemble, demo_file_name, demo_indices, is_noop, read_demo, write_demo
from prismo.sim.gl import GLBackend
from prismo.sim.interface import SimInfo, SimulatorError
from prismo.sim.libero_worker import LiberoWorker
from prismo.sim.rates import Rate
from prismo.sim.suites import load_task, read_custom_init_states

ROOT = Path(__file__).resolve().parents[2]
BUTTER, CREAM_CHEESE = 6, 1
INFO = SimInfo("stand-ins", "none", {"mujoco": "3.3.2"})


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, drawing: GLBackend) -> Path:
    """One demonstration of one task, as the script writes it."""
    folder = tmp_path_factory.mktemp("demos") / "scripted"
    flags = ("--libero_assets", "stand-ins", "--task_ids", f"[{BUTTER}]", "--num_demos_per_task", 1)
    done = run_script("collect_scripted_demos.py", *flags, "--output_dir", folder, "--image_size", 32)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1/1 = 100.0% [20.7%, 100.0%]" in done.stdout
    return folder


@pytest.fixture
def make_blind(stand_ins: Assets) -> Callable[[], LiberoWorker]:
    return lambda: LiberoWorker(stand_ins, cameras=False)


def butter_file(folder: Path) -> Path:
    return folder / demo_file_name(load_task("libero_object", BUTTER))


def arrays(demo: Demo, change: Callable[[np.ndarray], np.ndarray]) -> Demo:
    """The demonstration with `change` applied to all its arrays."""
    values = {field.name: getattr(demo, field.name) for field in fields(Demo) if field.name != "seed"}
    return replace(demo, **{name: change(value) for name, value in values.items() if value is not None})


def assert_equal(a: Demo, b: Demo) -> None:
    for field in fields(Demo):
        assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


@pytest.mark.processes
def test_files_have_libero_s_schema(collected: Path) -> None:
    with h5py.File(butter_file(collected)) as file:
        data = file["data"]
        assert data.attrs["num_demos"] == 1
        assert data.attrs["assets"] == "stand-ins"
        assert json.loads(data.attrs["versions"])["mujoco"] == "3.3.2"
        problem = json.loads(data.attrs["problem_info"])
        assert problem["language_instruction"] == "pick up the butter and place it in the basket"
        demo = data["demo_0"]
        steps = demo.attrs["num_samples"]
        assert data.attrs["total"] == steps
        shapes = {name: demo[name].shape[1:] for name in ("actions", "robot_states", "rewards", "dones")}
        assert shapes == {"actions": (7,), "robot_states": (9,), "rewards": (), "dones": ()}
        shapes = {name: demo["obs"][name].shape for name in demo["obs"]}
        widths = {"gripper_states": 2, "joint_states": 7, "ee_states": 6, "ee_pos": 3, "ee_ori": 3}
        images = dict.fromkeys(("agentview_rgb", "eye_in_hand_rgb"), (steps, 32, 32, 3))
        assert shapes == {name: (steps, width) for name, width in widths.items()} | images
        assert demo["dones"][:].tolist() == [0] * (steps - 1) + [1]
        assert demo["rewards"].dtype == np.uint8


@pytest.mark.processes
def test_demonstration_looks_like_a_human_one(collected: Path) -> None:
    demo = read_demo(butter_file(collected), 0)
    assert len(demo) < 280
    assert np.abs(demo.actions).max() <= 1.0
    assert set(demo.actions[:, 6]) == {-1.0, 1.0}
    assert np.abs(np.diff(demo.actions[:, :6], axis=0)).max() < 0.3  # no jerks
    noops = [is_noop(a, b) for a, b in zip(demo.actions[1:], demo.actions[:-1], strict=True)]
    assert sum(noops) == 0
    # The gripper opens, closes on the object and opens again; the fingers follow.
    width = demo.gripper_states[:, 0] - demo.gripper_states[:, 1]
    closed = demo.actions[:, 6] > 0
    assert width[0] > 0.07
    assert 0.03 < width[closed][-1] < 0.05  # the butter is 4 cm wide
    assert not closed[-1]


@pytest.mark.processes
def test_dataset_builder_reads_the_files(collected: Path) -> None:
    demonstrations = find_demonstrations(collected)
    assert [d.instruction for d in demonstrations] == ["pick up the butter and place it in the basket"]
    assert len(list(convert_episodes(demonstrations))) == 1


@pytest.mark.processes
def test_regenerating_reproduces_states_and_pictures(collected: Path, tmp_path: Path) -> None:
    target = tmp_path / "no_noops"
    flags = ("--libero_task_suite", "libero_object", "--libero_raw_data_dir", collected, "--libero_target_dir", target)
    options = ("--task_ids", BUTTER, "--libero_assets", "stand-ins", "--image_size", 32)
    done = run_script("regenerate_libero_dataset.py", *flags, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kept 1 of 1 demonstrations, left out 0 no-ops" in done.stdout
    assert_equal(read_demo(butter_file(target), 0), read_demo(butter_file(collected), 0))
    states = read_custom_init_states(target / "libero_object_metainfo.json", load_task("libero_object", BUTTER))
    assert np.array_equal(states[0], read_demo(butter_file(collected), 0).states[0])
    again = run_script("regenerate_libero_dataset.py", *flags, *options)  # stdin is closed: nothing may be asked
    assert again.returncode == 2
    assert "is finished; give --overwrite" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.processes
def test_missing_raw_files_are_named(tmp_path: Path) -> None:
    flags = ("--libero_task_suite", "libero_goal", "--libero_raw_data_dir", tmp_path, "--libero_target_dir", tmp_path)
    done = run_script("regenerate_libero_dataset.py", *flags)
    assert done.returncode == 2
    assert "lacks 10 of 10 demonstration files of libero_goal, e.g. open_the_middle_drawer" in done.stderr
    assert "Traceback" not in done.stderr


def small_file(folder: Path) -> Path:
    """Two demonstrations of three steps in a task's file."""
    widths = {"actions": 7, "states": 11, "robot_states": 9, "gripper_states": 2, "joint_states": 7, "ee_states": 6}
    pictures = dict.fromkeys(("agentview_rgb", "eye_in_hand_rgb"), np.zeros((3, 8, 8, 3), np.uint8))
    demo = Demo(**{name: np.ones((3, width)) for name, width in widths.items()}, **pictures)
    write_demo(folder / "part.hdf5", demo)
    task = load_task("libero_object", BUTTER)
    assemble(folder / demo_file_name(task), dict.fromkeys((0, 1), folder / "part.hdf5"), task, INFO)
    return folder / demo_file_name(task)


def put(name: str, value: np.ndarray | None) -> Callable[[h5py.File], None]:
    """Puts an array (None: a group) in the place of what has that name."""

    def change(file: h5py.File) -> None:
        del file[name]
        if value is None:
            file.create_group(name)
        else:
            file[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("data", np.zeros(3)), "no group data with demonstrations"),
        (lambda file: file.move("data", "other"), "no group data with demonstrations"),
        (lambda file: file.move("data/demo_1", "data/first"), "'first' where demo_<number> was expected"),
        (put("data/demo_1", np.zeros(3)), "data/demo_1 is no group"),
        (put("data/demo_1/obs", np.zeros(3)), "data/demo_1/obs is no group"),
        (put("data/demo_1/actions", None), r"data/demo_1/actions is a group; expected numbers \[T, 7\]"),
        (put("data/demo_1/actions", np.zeros((3, 6))), r"data/demo_1/actions is float64 \[3, 6\]; expected .*\[T, 7\]"),
        (put("data/demo_1/actions", np.array([["a"] * 7] * 3, "S1")), r"data/demo_1/actions is .*; expected numbers"),
        (put("data/demo_1/states", np.zeros(3)), "data/demo_1/states is float64"),
        (put("data/demo_1/states", np.zeros((2, 11))), "data/demo_1 has arrays of 2 and 3 steps"),
        (put("data/demo_1/actions", np.full((3, 7), np.nan)), "data/demo_1/actions holds NaN or infinity"),
        (put("data/demo_1/states", np.full((3, 11), np.inf)), "data/demo_1/states holds NaN or infinity"),
        (
            put("data/demo_1/obs/agentview_rgb", np.zeros((3, 8, 8, 3), np.float32)),
            r"float32 .*; expected uint8 \[T, H",
        ),
        (put("data/demo_1/obs/agentview_rgb", np.zeros((3, 8, 8, 3), np.uint16)), "is uint16"),
        (put("data/demo_1/obs/eye_in_hand_rgb", np.zeros((3, 8, 8), np.uint8)), r"is uint8 \[3, 8, 8\]"),
        (lambda file: file["data/demo_1"].attrs.update(seed="x"), "data/demo_1 has the seed 'x'"),
    ],
)
def test_a_damaged_demonstration_is_one_sentence(
    change: Callable[[h5py.File], None], says: str, tmp_path: Path
) -> None:
    path = small_file(tmp_path)
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(ValueError, match=says) as error:
        [read_demo(path, index) for index in demo_indices(path)]
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("kept", [0, 10, 2000, 0.9])
def test_a_truncated_file_is_one_sentence(kept: float, tmp_path: Path) -> None:
    path = small_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"_demo\.hdf5 is no readable HDF5 file \(.*\); make or fetch it again"):
        demo_indices(path)


@pytest.mark.processes
def test_regenerating_looks_at_the_files_first(tmp_path: Path) -> None:
    """Before a simulator is started, and without a traceback."""
    with h5py.File(small_file(tmp_path), "a") as file:
        put("data/demo_1/actions", None)(file)
    flags = ("--libero_task_suite", "libero_object", "--libero_raw_data_dir", tmp_path, "--task_ids", BUTTER)
    target = tmp_path / "target"
    done = run_script("regenerate_libero_dataset.py", *flags, "--libero_target_dir", target)
    assert done.returncode == 2
    assert "data/demo_1/actions is a group" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()


@pytest.mark.processes
def test_damage_in_the_data_is_one_sentence(tmp_path: Path, blind_worker: LiberoWorker) -> None:
    """Found by the simulator process, which reads the numbers."""
    path = small_file(tmp_path)
    with h5py.File(path, "a") as file:
        put("data/demo_1/actions", np.full((3, 7), np.nan))(file)
    where = {"suite": "libero_object", "task_id": BUTTER, "source": path, "index": 1, "target": tmp_path / "x.hdf5"}
    with pytest.raises(SimulatorError) as error:
        blind_worker.request("replay_demo", 60.0, **where, seed=0, drop_noops=True)
    assert str(error.value) == f"{path}: data/demo_1/actions holds NaN or infinity"


@pytest.mark.processes
def test_noops_and_failures_are_left_out(
    collected: Path, tmp_path: Path, make_blind: Callable[[], LiberoWorker]
) -> None:
    """Demonstration 0 gets idle steps, demonstration 3 ends before the goal is reached."""
    demo = read_demo(butter_file(collected), 0, images=False)
    idle = demo.actions[::20].copy()
    idle[:, :6] = 0.0
    positions = np.arange(0, len(demo), 20) + 1  # behind the action whose gripper command they repeat
    raw = tmp_path / "raw"
    task = load_task("libero_object", BUTTER)
    longer = arrays(demo, lambda array: np.insert(array, positions, array[positions - 1], axis=0))
    write_demo(tmp_path / "0.hdf5", replace(longer, actions=np.insert(demo.actions, positions, idle, axis=0)))
    write_demo(tmp_path / "3.hdf5", arrays(demo, lambda array: array[:50]))
    assemble(raw / demo_file_name(task), {0: tmp_path / "0.hdf5", 3: tmp_path / "3.hdf5"}, task, INFO)

    items = raw_items("libero_object", raw, [BUTTER])
    collection = Collection(tmp_path / "target", {}, {task}, overwrite=False)
    finished = list(regenerate(items, raw, make_blind, num_workers=1, seed=0, collection=collection))
    outcomes = {done.item.index: done.outcome for done in finished}
    assert (outcomes[0].success, outcomes[0].noops, outcomes[0].steps) == (True, len(idle), len(demo))
    assert (outcomes[3].success, outcomes[3].steps) == (False, 50)
    assert collection.join(finished, INFO) == {task: 1}
    assert demo_indices(butter_file(tmp_path / "target")) == [0]
    assert_equal(read_demo(butter_file(tmp_path / "target"), 0), demo)
    write_metainfo(tmp_path / "info.json", finished, raw)
    assert list(read_custom_init_states(tmp_path / "info.json", task)) == [0]


@pytest.mark.processes
def test_interrupted_collection_continues(tmp_path: Path, make_blind: Callable[[], LiberoWorker]) -> None:
    items = expert_items("libero_object", [CREAM_CHEESE], 2)
    settings = {"noise": 0.05}

    def collection() -> Collection:
        return Collection(tmp_path, settings, {item.task for item in items}, overwrite=False)

    started = run_expert(items, make_blind, num_workers=1, noise=0.05, seed=0, collection=collection())
    first = next(started)
    started.close()  # as Ctrl-C does
    part = collection().demo_file(first.item)
    stamp = part.stat().st_mtime_ns
    finished = list(run_expert(items, make_blind, num_workers=1, noise=0.05, seed=0, collection=collection()))
    assert finished[0] == first
    assert part.stat().st_mtime_ns == stamp
    assert [done.outcome.success for done in finished] == [True, True]
    assert "| 2/2 = 100.0%" in success_table(finished)
    with pytest.raises(ValueError, match=r"was made with .*0\.05.*; the flags now say .*0\.1"):
        Collection(tmp_path, {"noise": 0.1}, (), overwrite=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"success": "yes", "steps": 3}', '{"success": true, "steps": -3}'])
def test_a_damaged_note_is_one_sentence(content: str, tmp_path: Path) -> None:
    item = expert_items("libero_object", [CREAM_CHEESE], 1)[0]
    collection = Collection(tmp_path, {}, {item.task}, overwrite=False)
    note = collection.demo_file(item).with_suffix(".json")
    note.parent.mkdir()
    note.write_text(content)
    with pytest.raises(ValueError, match=rf"{note}: .*; remove it, and its demonstration is made again"):
        collection.finished([item])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_workers": 0}, "--num_workers is 0; expected at least 1"),
        ({"num_demos_per_task": 0}, "--num_demos_per_task is 0"),
        ({"noise": float("nan")}, "--noise is nan"),
        ({"seed": -1}, "--seed is -1"),
        ({"task_ids": []}, "--task_ids is empty"),
        ({"task_ids": [10]}, r"--task_ids holds \[10\]; libero_object has tasks 0 to 9"),
    ],
)
def test_flags_of_the_collection_have_bounds(flags: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        data_collect.run(data_collect.CollectConfig(output_dir=tmp_path / "demos", **flags))
    assert not (tmp_path / "demos").exists()


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="holds files of others"):
        Collection(tmp_path, {}, (), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_tasks_beyond_the_expert_are_refused() -> None:
    assert len(EXPERT_TASKS["libero_object"]) == 10
    assert len(EXPERT_TASKS["libero_spatial"]) >= 3
    with pytest.raises(ValueError, match=r"does not know libero_spatial \[4\]"):
        expert_items("libero_spatial", [0, 4], 1)
    with pytest.raises(ValueError, match="does not know libero_10"):
        expert_items("libero_10", None, 1)


@pytest.mark.parametrize(
    ("action", "previous", "noop"),
    [
        ([0, 0, 0, 0, 0, 0, -1], None, True),  # first action: only the norm counts
        ([0, 0, 0, 0, 0, 0, 1], [0.5, 0, 0, 0, 0, 0, 1], True),
        ([0, 0, 0, 0, 0, 0, 1], [0.5, 0, 0, 0, 0, 0, -1], False),  # the gripper starts to close
        ([9e-5, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], True),
        ([8e-5, 8e-5, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], False),  # norm 1.13e-4
    ],
)
def test_noop_rule(action: list[float], previous: list[float] | None, noop: bool) -> None:
    assert is_noop(np.array(action, float), None if previous is None else np.array(previous, float)) is noop


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(95, 100, 0.8882, 0.9785), (0, 50, 0.0, 0.0713), (50, 50, 0.9287, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_interval(successes: int, episodes: int, low: float, high: float) -> None:
    """At 0 of n the upper bound is z^2 / (n + z^2)."""
    assert Rate(successes, episodes).wilson() == pytest.approx((low, high), abs=1e-4)
    assert Rate(0, 0).wilson() == (0.0, 1.0)
