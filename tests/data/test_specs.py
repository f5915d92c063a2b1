"""Conventions of the known datasets against slow, obvious implementations; own data by YAML; helpful errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prismo.data.dataset import open_dataset
from prismo.data.resolve import resolve
from prismo.data.specs import MIXTURES, SPECS, Feature, find_feature, split_slice, standardize
from prismo.data.synthetic import write_synthetic_libero
from tests.data.conftest import read_episode

YAML = """
name: my_robot
path: libero_spatial_no_noops
cameras: {primary: observation/image, wrist: observation/wrist_image}
action: ["action[:6]", "action[-1]"]
proprio: [observation/joint_state, "observation/state[6:7]"]
gripper: open_low
control_hz: 10
chunk: 4
"""


def gripper(convention: str, command: list[float]) -> list[float]:
    spec = replace(SPECS["libero_spatial_no_noops"], gripper=convention)
    action = np.zeros((len(command), 7), np.float32)
    action[:, 6] = command
    return standardize(spec, action, np.zeros((len(command), 8), np.float32)).action[:, 6].tolist()


def test_gripper_conventions() -> None:
    assert gripper("open_low", [-1, 1, 0, 0.25]) == [1, 0, 1, 0.75]
    assert gripper("open_high", [-1, 1, 0, 0.25]) == [0, 1, 0, 0.25]
    assert gripper("as_stored", [-1, 0.3]) == [-1, pytest.approx(0.3)]
    # Values on the way belong to where the gripper is going.
    assert gripper("binarize", [0.5, 1, 0.7, 0.3, 0, 0.2, 0.99]) == [1, 1, 0, 0, 0, 1, 1]
    # Before its first command a relative gripper is in the opposite state; without any it is open.
    assert gripper("relative", [0, 1, 0, 0, -1, 0]) == [1, 0, 0, 0, 1, 1]
    assert gripper("relative", [0, -1, 0]) == [0, 1, 1]
    assert gripper("relative", [0, 0.05, 0]) == [1, 1, 1]


def test_binarize_equals_a_backward_scan() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        command = np.where(rng.random(12) < 0.5, rng.random(12), rng.integers(0, 2, 12))
        carry, expected = command[-1], []
        for value in command[::-1]:
            carry = carry if 0.05 <= value <= 0.95 else float(value > 0.95)
            expected.append(carry)
        np.testing.assert_allclose(gripper("binarize", command.tolist()), expected[::-1], rtol=1e-6)


def test_bridge_derives_movements_from_states() -> None:
    rng = np.random.default_rng(1)
    action, state = rng.normal(size=(6, 7)).astype(np.float32), rng.normal(size=(6, 7)).astype(np.float32)
    action[:, 6] = [1, 1, 0, 0, 1, 1]
    result = standardize(SPECS["bridge_orig"], action, state)
    assert result.start == 1
    assert result.action.shape == (4, 7)
    for t in range(4):
        np.testing.assert_array_equal(result.action[t, :6], state[t + 2, :6] - state[t + 1, :6])
    np.testing.assert_array_equal(result.action[:, 6], [1, 0, 0, 1])
    np.testing.assert_array_equal(result.proprio, state[1:5])


def test_a_gripper_that_is_not_a_number_stays_one() -> None:
    """So that it is refused; carrying the next clear value over it would hide a broken recording."""
    for convention in ("open_low", "open_high", "binarize", "relative", "as_stored"):
        for value in (np.nan, np.inf):
            result = gripper(convention, [1, value, 0, 1])
            assert np.isfinite(result).tolist() == [True, False, True, True], convention
            assert np.delete(result, 1).tolist() == np.delete(gripper(convention, [1, 0.5, 0, 1]), 1).tolist()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_spec_has_a_robot_and_cameras(name: str) -> None:
    spec = SPECS[name]
    assert spec.name == name
    assert spec.cameras
    assert spec.action_mask().sum() == spec.embodiment.action_dim - len(spec.embodiment.gripper_dims)


def test_the_mixture_holds_the_four_suites() -> None:
    suites = MIXTURES["libero_4_task_suites_no_noops"]
    assert suites == {f"libero_{s}_no_noops": 1.0 for s in ("spatial", "object", "goal", "10")}


def test_slices() -> None:
    values = np.arange(8)
    for name, expected in {"a/b": values, "a/b[:3]": values[:3], "a/b[2:5]": values[2:5], "a/b[-2:]": values[-2:],
                           "a/b[3]": values[3:4], "a/b[-1]": values[-1:]}.items():  # fmt: skip
        key, part = split_slice(name)
        assert key == "a/b"
        np.testing.assert_array_equal(values[part], expected)


def test_a_yaml_file_describes_own_data(synthetic: Path, tmp_path: Path) -> None:
    description = tmp_path / "robot.yaml"
    description.write_text(YAML)
    dataset = open_dataset(synthetic, description)
    robot = dataset.embodiment
    assert (robot.name, robot.action_dim, robot.proprio_dim, robot.chunk, robot.control_hz) == ("my_robot", 7, 8, 4, 10)
    assert list(dataset.statistics) == ["my_robot"]
    source = dataset.sources[0]
    episode = read_episode(source.store, 0)
    rows = source.store.rows(0, 0, 100)
    np.testing.assert_array_equal(rows["proprio"][:, :7], episode["steps/observation/joint_state"])
    np.testing.assert_array_equal(rows["proprio"][:, 7], episode["steps/observation/state"][:, 6])
    np.testing.assert_array_equal(rows["action"][:, :6], episode["steps/action"][:, :6])


def test_a_yaml_file_may_be_a_mixture(synthetic: Path, tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text(YAML.replace("chunk: 4", "chunk: 8"))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("datasets: {libero_spatial_no_noops: 1, robot.yaml: 0.5}")
    entries = resolve(synthetic, mixture)
    assert [(entry.spec.name, entry.weight) for entry in entries] == [("libero_spatial_no_noops", 1), ("my_robot", 0.5)]
    dataset = open_dataset(synthetic, mixture)
    assert set(dataset.statistics) == {"libero_spatial_no_noops", "my_robot"}
    assert {dataset[0].dataset_name, dataset[len(dataset) - 1].dataset_name} == set(dataset.statistics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gripper: open_low", "gripper: open_lo"), "gripper should be 'open_low', .*found 'open_lo'"),
        (("control_hz: 10", ""), "control_hz is missing"),
        (("chunk: 4", "normalization: q99"), "normalization should be 'bounds_q99', 'bounds' or 'normal', found 'q99'"),
        (("chunk: 4", "embodiment: libreo"), "unknown embodiment 'libreo'. Did you mean 'libero'"),
        (("chunk: 4", "gripper_dims: [7]"), "gripper_dims lie outside the 7 numbers"),
        (("chunk: 4", "chunks: 4"), "unknown key 'chunks'. Did you mean 'chunk'"),
        (("observation/image", "observation/imag"), "unknown image feature 'observation/imag'. Did you mean"),
        (("observation/joint_state", "observation/joints"), r"robot.yaml: .*/1\.0\.0: unknown tensor feature"),
        (("path: libero_spatial_no_noops", "path: nothing"), "no dataset folder .*nothing.*libero_spatial_no_noops"),
        (
            ("state[6:7]", "state[6:12]"),
            r"'observation/state\[6:12\]' reaches beyond the 8 numbers of obs",
        ),
        (("state[6:7]", "state[-9:]"), "reaches beyond the 8 numbers"),
        (("state[6:7]", "state[99]"), "reaches beyond the 8 numbers"),
        (("state[6:7]", "state[5:5]"), "takes none of the 8 numbers"),
        (("state[6:7]", "state[]"), "unknown tensor feature 'observation/state\\[\\]'. Did you mean"),
        (("state[6:7]", "state[6-7]"), "unknown tensor feature 'observation/state\\[6-7\\]'. Did you mean"),
        (("chunk: 4", "chunk: 0"), "chunk should be greater than or equal to 1, found 0"),
        (("chunk: 4", "chunk: 1.5"), "chunk should be a valid integer, found 1.5"),
        (("chunk: 4", "chunk: '4'"), "chunk should be a valid integer, found '4'"),
        (("chunk: 4", "skip_first: -1"), "skip_first should be greater than or equal to 0, found -1"),
        (("chunk: 4", "actions_from_state: 'False'"), "actions_from_state should be a valid boolean, found 'False'"),
        (("chunk: 4", "gripper_env_sign: 7"), "gripper_env_sign should be -1 or 1, found 7"),
        (("chunk: 4", "gripper_env_sign: 0"), "gripper_env_sign should be -1 or 1, found 0"),
        (("chunk: 4", "gripper_dims: [6, -1]"), "gripper_dims name a number of the action twice"),
        (("chunk: 4", "gripper_dims: 6"), "gripper_dims should be a valid array"),
        (("control_hz: 10", "control_hz: 0"), "control_hz should be greater than 0, found 0"),
        (("control_hz: 10", "control_hz: -1"), "control_hz should be greater than 0"),
        (("control_hz: 10", "control_hz: .nan"), "control_hz should be less than or equal to 10000, found nan"),
        (("control_hz: 10", "control_hz: .inf"), "control_hz should be less than or equal to"),
        (("name: my_robot", "name: 5"), "name should be a valid string, found 5"),
        (("name: my_robot", "name: ''"), "name should have at least 1 character"),
        (("instruction:", "instructoin:"), "unknown key 'instructoin'. Did you mean 'instruction'"),
        ((": language_instruction", ": [a]"), r"instruction should be a valid string, found \['a'\]"),
        (("chunk: 4", "embodiment: [libero]"), "embodiment should be a valid string"),
        (("action: [", "action: []  # ["), "action should have at least 1 item"),
        (("action: [", "action: 5  # ["), "action should be a valid array, found 5"),
        (("action: [", "action: [[a]]  # ["), r"action\[0\] should be a valid string"),
        (("path: libero", "path: [1]  # libero"), "path should be a valid string"),
        (("name: my_robot", "- 1"), "not valid YAML"),
    ],
)
def test_mistakes_in_a_yaml_file(synthetic: Path, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    description = tmp_path / "robot.yaml"
    description.write_text((YAML + "instruction: language_instruction\n").replace(*change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(synthetic, description)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: {}", "datasets should have at least 1 item"),
        ("datasets: [libero_spatial_no_noops]", "datasets should be an object"),
        (
            "datasets: {libero_spatial_no_noops: 0}",
            "datasets.libero_spatial_no_noops should be greater than 0, found 0",
        ),
        ("datasets: {libero_spatial_no_noops: -1}", "should be greater than 0, found -1"),
        ("datasets: {libero_spatial_no_noops: .nan}", "should be less than or equal to 10000, found nan"),
        ("datasets: {libero_spatial_no_noops: .inf}", "should be less than or equal to"),
        ("datasets: {libero_spatial_no_noops: '1'}", "should be a valid number, found '1'"),
        ("datasets: {libero_spatial_no_noops: 1}\nname: x", "unknown key 'name'"),
        ("datasets: {mixture.yaml: 1}", r"mixture.yaml includes itself: .*mixture.yaml -> .*mixture.yaml"),
        (
            "datasets: {other.yaml: 1}",
            r"mixture.yaml includes itself: .*mixture.yaml -> .*other.yaml -> .*mixture.yaml",
        ),
        ("[1, 2]", "should be an object"),
        ("", "should be an object"),
        ("datasets: {libero_spatial_no_noops: 1", "is not valid YAML"),
        ("datasets: !!python/object/apply:os.system [exit 1]", "is not valid YAML"),
    ],
)
def test_mistakes_in_a_mixture(synthetic: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mixture.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("datasets: {libero_spatial_no_noops: 1, mixture.yaml: 1}")
    with pytest.raises(ValueError, match=rf"mixture\.yaml.*{message}|{message}"):
        resolve(synthetic, tmp_path / "mixture.yaml")


def test_a_dataset_is_not_taken_for_another(synthetic: Path, tmp_path: Path) -> None:
    """A data root that is one dataset's own folder does not stand for every name."""
    own = synthetic / "libero_spatial_no_noops"
    assert resolve(own, "libero_spatial_no_noops")
    with pytest.raises(FileNotFoundError, match=r"no dataset folder .*libero_goal_no_noops"):
        resolve(own, "libero_goal_no_noops")
    (tmp_path / "mixture.yaml").write_text("datasets: {libero_spatial_no_noops: 1, again.yaml: 1}")
    (tmp_path / "again.yaml").write_text(YAML.replace("name: my_robot", "name: libero_spatial_no_noops"))
    with pytest.raises(ValueError, match="holds libero_spatial_no_noops more than once"):
        resolve(synthetic, tmp_path / "mixture.yaml")


def test_movements_from_states_need_six_numbers(synthetic: Path, tmp_path: Path) -> None:
    description = tmp_path / "robot.yaml"
    text = YAML.replace("chunk: 4", "actions_from_state: true")
    description.write_text(text)
    assert open_dataset(synthetic, description)
    description.write_text(text.replace("observation/joint_state, ", ""))
    with pytest.raises(ValueError, match=r"actions_from_state needs at least 6 numbers .*found 7 and 1"):
        open_dataset(synthetic, description)


def test_unknown_names(synthetic: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'libero_spacial_no_noops'.*Did you mean.*YAML"):
        open_dataset(synthetic, "libero_spacial_no_noops")
    with pytest.raises(FileNotFoundError, match="no dataset description"):
        open_dataset(synthetic, tmp_path / "none.yaml")
    features = {"steps/action": Feature("tensor", (7,), "float32")}
    with pytest.raises(ValueError, match=r"unknown tensor feature 'actoin'. Did you mean 'action'"):
        find_feature("actoin", "tensor", features)


def test_robots_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_synthetic_libero(tmp_path, "bridge_orig", episodes=1, steps=12, image_size=16)
    with pytest.raises(ValueError, match="unknown image feature 'observation/image_0'"):
        open_dataset(tmp_path, "bridge_orig")
    write_synthetic_libero(tmp_path, episodes=1, steps=12, image_size=16)
    (tmp_path / "small.yaml").write_text(YAML.replace("observation/joint_state, ", ""))
    (tmp_path / "mixture.yaml").write_text("datasets: {libero_spatial_no_noops: 1, small.yaml: 1}")
    with pytest.raises(
        ValueError, match=r"libero_spatial_no_noops and my_robot cannot be mixed.*\(7, 8, 8\).*\(7, 1, 4\)"
    ):
        open_dataset(tmp_path, tmp_path / "mixture.yaml")
