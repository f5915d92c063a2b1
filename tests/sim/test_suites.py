"""Tasks and initial states are read without LIBERO, and nothing in their files is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from prismo.sim.suites import (
    MAX_STEPS,
    SUITES,
    load_init_states,
    load_task,
    load_tasks,
    read_custom_init_states,
    read_init_states,
)


def test_suites_have_the_benchmark_s_tasks_and_fifty_states_each() -> None:
    assert {suite: len(load_tasks(suite)) for suite in SUITES} == dict.fromkeys(SUITES, 10) | {"libero_90": 90}
    assert MAX_STEPS["libero_10"] == 520
    for suite in SUITES:
        for task in load_tasks(suite):
            assert task.bddl_file.is_file()
            assert load_init_states(suite, task.index).shape[0] == 50


@pytest.mark.parametrize(
    ("suite", "index", "language"),
    [
        ("libero_object", 7, "pick up the milk and place it in the basket"),
        ("libero_spatial", 5, "pick up the black bowl on the ramekin and place it on the plate"),
        ("libero_10", 2, "turn on the stove and put the moka pot on it"),
        ("libero_90", 0, "close the top drawer of the cabinet"),  # KITCHEN_SCENE10: two digits
    ],
)
def test_instruction_comes_from_the_file_name(suite: str, index: int, language: str) -> None:
    assert load_task(suite, index).language == language


def test_init_states_equal_torch_load() -> None:
    path = load_task("libero_goal", 3).init_states_file
    assert np.array_equal(load_init_states("libero_goal", 3), torch.load(path, weights_only=False))
    assert not load_init_states("libero_goal", 3).flags.writeable


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [_Evil(), {"not": "an array"}, None])
def test_file_of_init_states_is_not_executed(content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "states.pruned_init"
    if content is None:
        path.write_bytes(b"no archive")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content))
    with pytest.raises(ValueError, match=r"states\.pruned_init is no LIBERO initial-state file"):
        read_init_states(path)
    assert not (tmp_path / "executed").exists()


def test_unknown_suite_and_task_name_what_exists() -> None:
    with pytest.raises(ValueError, match="Did you mean 'libero_object'"):
        load_tasks("libero_objct")
    with pytest.raises(ValueError, match="tasks 0 to 9"):
        load_task("libero_object", 10)


def test_custom_init_states_leave_out_failed_demonstrations(tmp_path: Path) -> None:
    task = load_task("libero_object", 0)
    key = task.language.replace(" ", "_")
    demos = {
        f"demo_{i}": {"success": i != 2, "initial_state": [float(i), 0.5]}
        for i in (10, 0, 2)  # read in numeric order
    }
    path = tmp_path / "states.json"
    path.write_text(json.dumps({key: demos}))
    states = read_custom_init_states(path, task)
    assert list(states) == [0, 10]
    assert states[10].tolist() == [10.0, 0.5]
    with pytest.raises(ValueError, match="unknown task"):
        read_custom_init_states(path, load_task("libero_object", 1))
    path.write_text(json.dumps({key: {"demo_2": demos["demo_2"]}}))
    with pytest.raises(ValueError, match="no demonstration"):
        read_custom_init_states(path, task)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ([1], "its content should be"),
        ({"KEY": {"demo_0": {"success": "False", "initial_state": [0.0]}}}, "success should be a valid boolean"),
        ({"KEY": {"demo_0": {"success": True}}}, "initial_state is missing"),
        ({"KEY": {"demo_0": {"success": True, "initial_state": [float("nan")]}}}, "should be a finite number"),
        ({"KEY": {"demo_0": {"success": True, "initial_state": []}}}, "initial_state"),
        ({"KEY": {"first": {"success": True, "initial_state": [0.0]}}}, "first"),
        ({"KEY": []}, "should be an object"),
    ],
)
def test_damaged_custom_init_states_are_one_sentence(content: object, says: str, tmp_path: Path) -> None:
    task = load_task("libero_object", 0)
    path = tmp_path / "states.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text.replace("KEY", task.language.replace(" ", "_")))
    with pytest.raises(ValueError, match=says) as error:
        read_custom_init_states(path, task)
    assert str(error.value).startswith(str(path))


def test_model_process_stays_free_of_the_simulator() -> None:
    program = (
        "import sys, io; sys.stdin = io.StringIO('')\n"
        "from prismo.sim.libero_worker import LiberoWorker\n"
        "from prismo.sim.suites import load_tasks, load_init_states\n"
        "load_init_states('libero_object', 0)\n"
        "print(sorted({'mujoco', 'robosuite', 'libero', 'OpenGL', 'torch', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numpy_arrays_in_fortran_order_and_scalars_still_load(tmp_path: Path) -> None:
    states = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path = tmp_path / "x.init"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(states, protocol=2))
    path.write_bytes(buffer.getvalue())
    assert np.array_equal(read_init_states(path), states)
