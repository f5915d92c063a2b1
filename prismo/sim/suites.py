"""LIBERO's suites, tasks and initial states, read from the installed package without importing it.

Importing LIBERO asks questions on stdin and pulls in robosuite; listing tasks needs neither. Used by the evaluation,
the scripted expert and the dataset scripts.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from pydantic import Field, FiniteFloat

from prismo.sim.interface import Task
from prismo.util.extras import install_hint
from prismo.util.schema import read_json
from prismo.util.text import did_you_mean, instruction_of

# Policy steps before an episode counts as failed, after the longest human demonstration of each suite: 193, 254, 270,
# 505 and 373 steps (OpenVLA's protocol; the settle steps come on top).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SUITES = tuple(MAX_STEPS)


@dataclass(frozen=True)
class InitialState:
    """Of one demonstration in an `--initial_states_path` file: whether it succeeded, and [1 + nq + nv] numbers."""

    success: bool
    initial_state: Annotated[list[FiniteFloat], MinLen(1)]


InitialStates = dict[str, dict[Annotated[str, Field(pattern=r"^demo_\d+$")], InitialState]]


@dataclass(frozen=True)
class LiberoTask(Task):
    """One task of a suite, in the benchmark's task order 0.

    The instruction is from the file name, as in the training data, not from the BDDL file, whose wording differs ("Pick
    the milk ..." there, "pick up the milk ..." here).

    Attributes:
        bddl_file: scene and goal.
        init_states_file: the benchmark's 50 initial states.
    """

    bddl_file: Path
    init_states_file: Path


def package_folder() -> Path:
    """The folder `libero/libero` of the installed hf-libero (or a LIBERO checkout on the path).

    Raises:
        ModuleNotFoundError: LIBERO is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "libero"
        if (folder / "bddl_files").is_dir():
            return folder
    raise ModuleNotFoundError(
        f"LIBERO is not installed: `make setup` installs it; by hand, {install_hint('libero')}, "
        "then `pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1`"
    )


def module_of_file(name: str, path: Path) -> ModuleType:
    """A module from its file, without importing the package that it lies in."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load_tasks(suite: str) -> tuple[LiberoTask, ...]:
    """The tasks of a suite in benchmark order.

    Raises:
        ValueError: unknown suite; the message lists them.
    """
    if suite not in SUITES:
        raise ValueError(did_you_mean("task_suite_name (LIBERO suite)", suite, SUITES))
    root = package_folder()
    # A bare table; its package's __init__, which asks questions, is not run.
    module = module_of_file("_libero_tasks", root / "benchmark" / "libero_suite_task_map.py")
    return tuple(
        LiberoTask(
            suite=suite,
            index=index,
            name=name,
            language=instruction_of(name),
            bddl_file=root / "bddl_files" / suite / f"{name}.bddl",
            init_states_file=root / "init_files" / suite / f"{name}.pruned_init",
        )
        for index, name in enumerate(module.libero_task_map[suite])
    )


def load_task(suite: str, task_id: int) -> LiberoTask:
    """Task `task_id` (0-based) of a suite.

    Raises:
        ValueError: unknown suite, or an index outside of it.
    """
    tasks = load_tasks(suite)
    if not 0 <= task_id < len(tasks):
        raise ValueError(f"{suite} has tasks 0 to {len(tasks) - 1}; found task {task_id}")
    return tasks[task_id]


def check_task_ids(suite: str, task_ids: Sequence[int] | None) -> None:
    """Refuse a choice of tasks (None: all) that a suite does not have.

    Raises:
        ValueError: unknown suite, no task, or one outside of it.
    """
    count = len(load_tasks(suite))
    if task_ids is not None and not task_ids:
        raise ValueError(f"--task_ids is empty; leave it out for all tasks of {suite} (0 to {count - 1})")
    wrong = [index for index in task_ids or () if not 0 <= index < count]
    if wrong:
        raise ValueError(f"--task_ids holds {wrong}; {suite} has tasks 0 to {count - 1}")


class _NumpyUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and nothing else: initial states are data, whoever made the file."""

    ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def read_init_states(path: str | Path) -> np.ndarray:
    """A LIBERO `.init` / `.pruned_init` file as float64 [N, 1 + nq + nv] (time, positions, velocities).

    The files are torch archives around one pickled numpy array; torch is not needed, and no code in them is run.

    Raises:
        ValueError: the file is not such an archive, or holds anything but an array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl")
            states = np.asarray(_NumpyUnpickler(io.BytesIO(archive.read(name))).load(), dtype=np.float64)
    except (OSError, StopIteration, TypeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no LIBERO initial-state file ({error}); reinstall hf-libero") from error
    if states.ndim != 2:
        raise ValueError(f"{path}: expected an array [states, numbers], found shape {states.shape}")
    return states


@functools.cache
def load_init_states(suite: str, task_id: int) -> np.ndarray:
    """The benchmark's initial states of a task, float64 [50, 1 + nq + nv], read-only."""
    states = read_init_states(load_task(suite, task_id).init_states_file)
    states.setflags(write=False)
    return states


def read_custom_init_states(path: str | Path, task: Task) -> dict[int, np.ndarray]:
    """Initial states of `task` from an `--initial_states_path` JSON file, by demonstration index.

    The file maps task (instruction with underscores) to `demo_<i>` to `{"success": bool, "initial_state": [...]}`, as
    `prismo data regenerate` writes it. Failed demonstrations are left out, as in the original protocol,
    so indices may have gaps.

    Raises:
        ValueError: the file is damaged, the task is not in it, or none of its demonstrations succeeded.
    """
    content = read_json(path, InitialStates, advice="write it again with `prismo data regenerate`")
    key = task.language.replace(" ", "_")
    if key not in content:
        raise ValueError(f"{path}: {did_you_mean('task', key, content)}")
    states = {
        int(name.removeprefix("demo_")): np.asarray(demo.initial_state, dtype=np.float64)
        for name, demo in content[key].items()
        if demo.success
    }
    if not states:
        raise ValueError(f"{path}: no demonstration of {key!r} succeeded, so there is no state to start from")
    return dict(sorted(states.items()))
