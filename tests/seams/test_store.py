"""A format of datasets is one file and one line: episodes as .npz files train a policy and are shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from prismo.commands import main
from prismo.data import store as formats
from prismo.data.dataset import open_dataset
from prismo.data.normalize import load_statistics

# The file to write.
MODULE = '''
"""Datasets of .npz files, one per episode, listed in npz.json."""

import json
import zlib

import numpy as np

from prismo.data.specs import Feature, split_slice, standardize


def read_features(folder):
    with np.load(sorted(folder.glob("*.npz"))[0]) as episode:
        return {name: feature(values) for name, values in episode.items()}


def feature(values):
    kind = {1: "text", 2: "tensor", 4: "image"}[values.ndim]
    return Feature(kind, values.shape[1:], "" if kind == "text" else str(values.dtype))


def open_store(folder, spec):
    return NpzStore(folder, spec)


class NpzStore:
    def __init__(self, folder, spec):
        self.spec, self.root, self.cache, self.instructions = spec, folder, folder, []
        listed = json.loads((folder / "npz.json").read_text())
        self.splits = tuple(listed)
        self.files = [folder / name for names in listed.values() for name in names]
        self.tables = [self._read(file) for file in self.files]
        self.episodes = np.zeros(
            len(self.files), [("split", "u1"), ("steps", "u4"), ("named", "?"), ("crc", "u4")]
        )
        self.episodes["split"] = [number for number, names in enumerate(listed.values()) for _ in names]
        self.episodes["steps"] = [len(table) for table in self.tables]
        self.episodes["named"] = True
        self.episodes["crc"] = [zlib.crc32(table.tobytes()) for table in self.tables]

    def _read(self, file):
        robot = self.spec.embodiment
        with np.load(file) as episode:
            action, proprio = (
                np.concatenate([episode[key][:, part] for key, part in map(split_slice, names)], axis=1)
                for names in (self.spec.action, self.spec.proprio)
            )
            text = str(episode[self.spec.instruction][0])
        done = standardize(self.spec, action, proprio)
        if text not in self.instructions:
            self.instructions.append(text)
        rows = np.zeros(
            len(done.action),
            [
                ("action", "f4", (robot.action_dim,)),
                ("proprio", "f4", (robot.proprio_dim,)),
                ("instruction", "u4"),
                ("step", "u4"),
            ],
        )
        rows["action"], rows["proprio"] = done.action, done.proprio
        rows["instruction"], rows["step"] = self.instructions.index(text), done.start + np.arange(len(rows))
        return rows

    def rows(self, episode, start, stop):
        return self.tables[episode][start:stop]

    def column(self, name, dims=slice(None)):
        return np.concatenate([table[name] for table in self.tables])[:, dims].astype(np.float64)

    def image_size(self, camera):
        return read_features(self.root)[self.spec.cameras[camera]].shape[:2]

    def image(self, episode, row, camera, out=None):
        with np.load(self.files[episode]) as stored:
            image = stored[self.spec.cameras[camera]][row["step"]]
        if out is None:
            return image
        out[...] = image
        return out
'''

DESCRIPTION = """
name: kitchen
cameras: [front, hand]
action: [command]
proprio: ["joints[:6]", gripper]
instruction: task
gripper: open_high
control_hz: 10
"""


def write_kitchen(folder: Path) -> None:
    """Four episodes, the last of the split "val"."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, steps in enumerate((12, 15, 11, 10)):
        np.savez(
            folder / f"{number}.npz",
            front=rng.integers(0, 256, (steps, 48, 64, 3), np.uint8),
            hand=rng.integers(0, 256, (steps, 48, 64, 3), np.uint8),
            command=np.column_stack([rng.normal(size=(steps, 6)), rng.integers(0, 2, steps)]).astype(np.float32),
            joints=rng.normal(size=(steps, 7)).astype(np.float32),
            gripper=rng.normal(size=(steps, 2)).astype(np.float32),
            task=np.full(steps, ["open the oven", "close the oven"][number % 2]),
        )
    (folder / "npz.json").write_text(json.dumps({"train": ["0.npz", "1.npz", "2.npz"], "val": ["3.npz"]}))


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags that name the dataset; its format is known during the test."""
    (tmp_path / "npz_format.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "npz_format", raising=False)
    monkeypatch.setitem(formats.FORMATS, "npz.json", "npz_format")  # the line to add
    write_kitchen(tmp_path / "kitchen")
    (tmp_path / "kitchen.yaml").write_text(DESCRIPTION)
    return ["--data_root_dir", str(tmp_path), "--dataset_name", str(tmp_path / "kitchen.yaml")]


def test_it_trains(kitchen: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """Two updates, read by a worker process, and a validation on its own split."""
    run = ["--vla_path", str(tiny_base), "--run_root_dir", str(tmp_path), "--run_id_override", "run"]
    size = {"batch_size": 2, "num_workers": 1, "num_images_in_input": 2, "use_proprio": True, "lora_rank": 4}
    until = {"max_steps": 2, "wandb_log_freq": 1, "merge_lora_during_training": False}
    validation = {"use_val_set": True, "val_freq": 2}
    settings = [part for name, value in (size | until | validation).items() for part in (f"--{name}", str(value))]
    assert main(["finetune", *kitchen, *run, *settings]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["split"], entry["step"]) for entry in logged] == [("train", 1), ("train", 2), ("val", 2)]
    (checkpoint,) = tmp_path.glob("run--2_chkpt")
    statistics = load_statistics(checkpoint / "dataset_statistics.json")["kitchen"]
    assert (statistics.num_trajectories, statistics.num_transitions) == (4, 48)


def test_it_is_shown(kitchen: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", *kitchen, "--episode", "1", "--frames", "3", "--output", str(tmp_path / "a.png")]) == 0
    assert "4 episodes of 10 to 15 steps" in (shown := capsys.readouterr().out)
    assert "15 steps, 'close the oven'" in shown
    assert main(["data", "stats", *kitchen, "--output_dir", str(tmp_path / "statistics")]) == 0
    assert "4 episodes, 48 steps" in capsys.readouterr().out
    assert main(["data", "gaussians", *kitchen, "--output", str(tmp_path / "gaussians.json")]) == 0
    assert capsys.readouterr().out.startswith("48 actions of")


def test_samples_are_the_stored_frames(kitchen: list[str], tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path, kitchen[-1], num_images=2, split="val")
    sample, stored = dataset[2], np.load(tmp_path / "kitchen" / "3.npz")
    for view, camera in enumerate(("front", "hand")):
        np.testing.assert_array_equal(sample.images[view].permute(1, 2, 0), stored[camera][2])
    np.testing.assert_array_equal(sample.actions[:, 6], stored["command"][2:10, 6])
    assert (sample.instruction, len(dataset)) == ("close the oven", 3)


def test_what_does_not_fit_is_one_sentence(
    kitchen: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kitchen.yaml").write_text(DESCRIPTION.replace("command", "comand"))
    with pytest.raises(ValueError, match=r"kitchen.yaml: .*/kitchen: unknown tensor feature 'comand'. Did you mean"):
        open_dataset(tmp_path, kitchen[-1])
    (tmp_path / "kitchen" / "npz.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"kitchen is no dataset: .*holds dataset_info.json or npz.json"):
        open_dataset(tmp_path, kitchen[-1])
