"""The scripts as users run them: HDF5 to RLDS, the statistics, the viewer, the benchmark."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismo.commands import data_build, data_show, data_stats, main
from prismo.data.dataset import open_dataset
from prismo.data.hdf5 import Demonstration
from prismo.data.images import jpeg_round_trip
from prismo.data.index import open_store
from prismo.data.resolve import resolve
from tests.data.conftest import read_episode, run_script

pytestmark = pytest.mark.processes

NAME = "libero_spatial_no_noops"


# --- HDF5 to RLDS -----------------------------------------------------------------------------------------------------


def test_built_datasets_hold_the_demonstrations(rebuilt: Path, demonstrations: Path) -> None:
    import h5py  # noqa: PLC0415

    entry = resolve(rebuilt, "libero_90_no_noops")[0]
    index = open_store(entry.folder, entry.spec)
    assert len(index.episodes) == 5
    assert set(index.instructions) == {"pick up the bowl", "turn on the stove"}
    left = {
        (path, f"data/{name}") for path in sorted(demonstrations.glob("*.hdf5")) for name in h5py.File(path)["data"]
    }
    for number in range(5):
        episode = read_episode(index, number)
        path = demonstrations / episode["episode_metadata/file_path"]
        with h5py.File(path) as file:
            steps = len(episode["steps/action"])
            group = next(
                g
                for p, g in left
                if p == path and np.allclose(file[g]["actions"][0, :6], episode["steps/action"][0, :6])
            )
            left.remove((path, group))
            demo = file[group]
            np.testing.assert_array_equal(episode["steps/action"], demo["actions"][:].astype(np.float32))
            state = np.concatenate([demo["obs/ee_states"], demo["obs/gripper_states"]], axis=1).astype(np.float32)
            np.testing.assert_array_equal(episode["steps/observation/state"], state)
            np.testing.assert_array_equal(
                episode["steps/observation/joint_state"], demo["obs/joint_states"][:].astype(np.float32)
            )
            for ours, theirs in (("image", "agentview_rgb"), ("wrist_image", "eye_in_hand_rgb")):
                upright = demo[f"obs/{theirs}"][steps - 1][::-1, ::-1]
                np.testing.assert_array_equal(
                    episode[f"steps/observation/{ours}"][steps - 1], jpeg_round_trip(np.ascontiguousarray(upright))
                )
        last = np.arange(steps) == steps - 1
        np.testing.assert_array_equal(episode["steps/reward"], last)
        np.testing.assert_array_equal(episode["steps/is_terminal"], last)
        np.testing.assert_array_equal(episode["steps/is_first"], np.arange(steps) == 0)
        assert (episode["steps/discount"] == 1).all()
    assert not left


@pytest.mark.parametrize(("number", "name"), [(0, "libero_90_no_noops"), (1, NAME)])
def test_tfds_reads_what_we_write(number: int, name: str, rebuilt: Path, synthetic: Path, tensorflow: Path) -> None:
    """`builder_from_directory` loads both datasets of our writer and gives equal values, pixels included."""
    entry = resolve(rebuilt if number == 0 else synthetic, name)[0]
    index = open_store(entry.folder, entry.spec)
    read = np.load(tensorflow / f"read_{number}.npz")
    compared = 0
    for episode in range(len(index.episodes)):
        for entry_name, value in read_episode(index, episode).items():
            theirs = read[f"train/{episode}/{entry_name}"]
            if isinstance(value, str):
                assert theirs.item().decode() == value
            elif isinstance(value, list):
                assert [text.decode() for text in theirs.tolist()] == value
            else:
                assert theirs.dtype == value.dtype
                np.testing.assert_array_equal(theirs, value)
            compared += 1
    assert compared == len(read.files) == len(index.episodes) * 12


def test_building_again_asks_for_overwrite(rebuilt: Path, demonstrations: Path) -> None:
    arguments = ("--hdf5_dir", demonstrations, "--dataset_name", "libero_90_no_noops", "--data_root_dir", rebuilt)
    done = run_script("build_rlds_dataset.py", *arguments, check=False)
    assert done.returncode != 0
    assert "ERROR" in done.stderr
    assert "--overwrite true" in done.stderr


def test_bad_demonstrations_are_named(demonstrations: Path, tmp_path: Path) -> None:
    import h5py  # noqa: PLC0415

    options = ("--dataset_name", "x", "--data_root_dir", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_script("build_rlds_dataset.py", "--hdf5_dir", empty, *options, check=False)
    assert f"no *.hdf5 files in {empty}" in done.stderr
    copy = tmp_path / "copy"
    shutil.copytree(demonstrations, copy)
    with h5py.File(copy / "pick_up_the_bowl_demo.hdf5", "a") as file:
        del file["data/demo_2/obs/ee_states"]
    done = run_script("build_rlds_dataset.py", "--hdf5_dir", copy, *options, check=False)
    assert "pick_up_the_bowl_demo.hdf5 has no data/demo_2/obs/ee_states" in done.stderr
    assert not (tmp_path / "x" / "1.0.0").exists()


@pytest.mark.parametrize(
    ("file", "instruction"),
    [
        ("pick_up_the_black_bowl_on_the_stove_demo.hdf5", "pick up the black bowl on the stove"),
        ("KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", "turn on the stove"),
        ("LIVING_ROOM_SCENE10_stack_the_bowls_demo.hdf5", "stack the bowls"),
    ],
)
def test_instructions_come_from_file_names(file: str, instruction: str) -> None:
    assert Demonstration(Path(file), "data/demo_0").instruction == instruction


# --- looking at data --------------------------------------------------------------------------------------------------


def test_statistics_script(synthetic: Path, tmp_path: Path) -> None:
    path = tmp_path / "dataset_statistics.json"
    path.write_text(json.dumps({NAME: STATISTICS}))
    done = run_script("compute_norm_stats.py", "--data_root_dir", synthetic, "--dataset_name", NAME, "--output_dir",
                      tmp_path / "out", "--compare", path)  # fmt: skip
    stats = open_dataset(synthetic, NAME).statistics[NAME]
    assert f"{stats.num_trajectories} episodes, {stats.num_transitions} steps" in done.stdout
    assert f"{stats.action.q99[2]:.5f}" in done.stdout
    assert "largest difference" in done.stdout
    written = json.loads((tmp_path / "out" / "dataset_statistics.json").read_text())
    assert written[NAME]["proprio"]["q01"] == stats.proprio.q01.tolist()
    assert colors(tmp_path / "out" / f"{NAME}.png") > 20


_VECTOR = {name: [0.0] * 7 for name in ("mean", "std", "max", "min", "q01", "q99")}
STATISTICS = {"action": _VECTOR | {"max": [1.0] * 7, "q99": [1.0] * 7}, "num_transitions": 1, "num_trajectories": 1}


def colors(path: Path) -> int:
    """Number of different colours in a picture; an empty plot has two."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(maxcolors=10**6))


def test_contact_sheet_and_film(synthetic: Path, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2", reason="imageio (extra data) is not installed")
    options = ("--data_root_dir", synthetic, "--dataset_name", NAME, "--episode", 2)
    done = run_script("show_dataset.py", *options, "--output", tmp_path / "sheet.png")
    dataset = open_dataset(synthetic, NAME)
    index = dataset.sources[0].store
    assert "6 episodes" in done.stdout
    assert index.instructions[index.rows(2, 0, 1)["instruction"][0]] in done.stdout
    assert colors(tmp_path / "sheet.png") > 1000
    run_script("show_dataset.py", *options, "--output", tmp_path / "film.mp4")
    film = imageio.get_reader(tmp_path / "film.mp4")
    assert film.count_frames() == index.episodes["steps"][2]
    assert film.get_meta_data()["fps"] == 20
    done = run_script("show_dataset.py", *options[:-1], 6, check=False)
    assert "episode 6 asked for, the dataset has 6 (0 to 5)" in done.stderr


def test_flags_that_show_nothing(tmp_path: Path) -> None:
    """Before anything is opened or looked for."""
    for flags, message in (
        ({"frames": 0}, "--frames is 0; expected at least 1"),
        ({"episode": -1}, "--episode is -1; expected at least 0"),
        ({"output": Path("x.txt")}, r"--output is x.txt; expected a name that ends in .png, .pdf, .svg or .mp4"),
    ):
        with pytest.raises(ValueError, match=message):
            data_show.run(data_show.ShowConfig(NAME, tmp_path / "nowhere", **flags))


@pytest.mark.parametrize("name", ["../x", "a/b", "a-b", ""])
def test_names_that_a_dataset_cannot_have(name: str, demonstrations: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a dataset cannot be called {name!r}"):
        data_build.run(data_build.BuildConfig(demonstrations, name, tmp_path / "root"))
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an installation without extras; a script that imports one at its top ends in a traceback."""
    for package in ("h5py", "imageio_ffmpeg", "matplotlib"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('missing', name={package!r})")
        for module in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "x_demo.hdf5").touch()
    for command, kind, flags, package in (
        (data_show, data_show.ShowConfig, {}, "matplotlib"),
        (data_stats, data_stats.StatsConfig, {}, "matplotlib"),
        (data_build, data_build.BuildConfig, {"hdf5_dir": tmp_path}, "h5py"),
    ):
        with pytest.raises(ValueError, match=rf'package {package} is missing: type `pip install -e "\.\[data\]"`'):
            command.run(kind(dataset_name="x", **flags))


@pytest.mark.slow
def test_benchmark_prints_its_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets: make setup-compare")
    done = run_script("bench_data.py", "--work_dir", tmp_path, "--generate_gb", 0.02, "--seconds", 0.3, "--repeats", 1,
                      "--shuffle_buffer_size", 64, "--batch_size", 4, "--modes", "augmented")  # fmt: skip
    for row in ("index built at", "samples/s, augmented", "first batch (s)", "memory (MB)"):
        assert row in done.stdout


def test_synthetic_command_never_replaces_a_dataset(tmp_path, capsys, caplog):
    words = ["data", "synthetic", "--data_root_dir", str(tmp_path), "--episodes", "2", "--steps", "8"]
    assert main([*words, "--image_size", "32"]) == 0
    assert "libero_spatial_no_noops/1.0.0: 2 episodes" in capsys.readouterr().out
    assert len(open_dataset(tmp_path, "libero_spatial_no_noops").sources[0].episodes) == 2
    assert main(words) == 2
    assert "exists; name another --data_root_dir" in caplog.text
