"""Flags of every command: a value that cannot be is one sentence that names the flag, before anything is done."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from hypothesis import strategies as st

import prismo.benchmarks.libero
import prismo.eval.run
import prismo.sim.libero_worker
from prismo.commands import data_collect, data_gaussians, data_show, data_stats, merge, tiny
from prismo.commands.train import train
from prismo.eval.config import EvalConfig
from prismo.testing.tiny import make_tiny_policy, make_tiny_vggt
from prismo.training.config import FinetuneAlignConfig
from prismo.util.flags import parse_flags
from tests.fuzz.conftest import DATASET, training_flags
from tests.fuzz.harness import CommandFailedError, Fuzzer, attempt
from tests.fuzz.mutate import Draw, Mutation

REPOSITORY = Path(__file__).resolve().parents[2]
_LONG, _TEXT_FILE = "x" * 300, "text.txt"
# Values that no flag of a type may take, and values that only some may; "" is no value.
_NEVER = {
    "int": ("x", "1.5", "nan", "inf", "[1]", "1e400", "0x10", "-"),
    "float": ("x", "nan", "inf", "-inf", "1e400", "[1.0]", "1,5"),
    "bool": ("maybe", "2", "-1", "tru", "[True]"),
    "list": ("[", "[0", "[a]", "[1.5]", "[-1]", "[999]", "[]", "{}", "[[0]]", "nan"),
    "name": ("../outside/x", "a/b", "..", ".", "a\0b", "a\tb", "/x", _LONG),
    "choice": ("x", "None of these", "../x", "a\0b", _LONG, "1"),
    "input": ("missing/x", _TEXT_FILE, f"{_TEXT_FILE}/x", "a\0b", _LONG),
    "output": (_TEXT_FILE, f"{_TEXT_FILE}/x", "a\0b"),
}
_SOMETIMES = {"int": ("-1", "0", "99999999999999999999"), "float": ("-1", "0", "1e300")}
_KINDS = {
    "name": {"run_id_note", "run_id_override"},
    "choice": {
        "scheduler", "device", "dtype", "intrinsics", "align_loss_type", "pooling_func", "teacher", "vggt_dtype",
        "model_family", "attention", "task_suite_name", "save_videos", "unnorm_key", "dataset", "resume",
    },
    "input": {
        "vla_path", "data_root_dir", "dataset_name", "vggt_path", "adapt_emb", "pretrained_checkpoint", "hdf5_dir",
        "base_checkpoint", "initial_states_path", "lora_finetuned_checkpoint_dir", "compare", "libero_assets",
    },
    "output": {"run_root_dir", "output_dir", "output"},
}  # fmt: skip
_LEFT_OUT = {"wandb_entity", "wandb_project", "use_wandb", "use_tensorboard", "compile", "compile_vggt", "max_steps"}
_ZERO = {
    "seed", "resume_step", "num_workers", "max_grad_norm", "lr_warmup_steps", "num_steps_before_decay", "weight_decay",
    "min_sigma", "lora_dropout", "val_fraction", "align_loss_coeff", "align_map_freq", "vla_layers_align", "noise",
    "vggt_layers_align", "num_steps_wait", "ensemble_alpha", "episode", "shuffle_buffer_size", "max_errors",
}  # fmt: skip
_NAMES = ("finetune_align", "run_libero_eval", "merge", "collect", "statistics", "show", "gaussians", "tiny")
_MINUS_ONE = {"vla_layers_align", "vggt_layers_align"}


class _ReachedSimulatorError(Exception):
    """All flags were accepted."""


@dataclass(frozen=True)
class Command:
    """A command that works with `valid`.

    Attributes:
        flags: its dataclass.
        valid: flag -> value.
        call: runs it with arguments.
    """

    flags: type
    valid: dict[str, str]
    call: Callable[[list[str]], object]


def _train(arguments: list[str]) -> None:
    if train(FinetuneAlignConfig, arguments):
        raise CommandFailedError


def _evaluate(arguments: list[str]) -> None:
    config = parse_flags(EvalConfig, arguments)
    prismo.benchmarks.libero.LiberoWorker = _stop_here
    try:
        with prismo.eval.run.prepare(config):
            pass
    except _ReachedSimulatorError:
        prismo.eval.run.seed_everything(config.seed)


def _stop_here(*arguments: object, **options: object) -> None:
    raise _ReachedSimulatorError


def _command(module: ModuleType, kind: type, **valid: str) -> Command:
    def call(arguments: list[str]) -> None:
        prismo.sim.libero_worker.LiberoWorker = _stop_here
        with contextlib.suppress(_ReachedSimulatorError):
            module.run(parse_flags(kind, arguments))

    return Command(kind, valid, call)


def _commands() -> dict[str, Command]:
    training = dict(zip(*[iter(training_flags(run_id_override="new", vggt_path="vggt.pt"))] * 2, strict=True))
    training = {name.removeprefix("--"): value for name, value in training.items()} | {"align_map_freq": "0"}
    data = {"data_root_dir": "root", "dataset_name": DATASET}
    evaluation = {"pretrained_checkpoint": "policy", "device": "cpu", "libero_assets": "stand-ins",
                  "save_videos": "none", "local_log_dir": "logs", "rollout_dir": "rollouts"}  # fmt: skip
    return {
        "finetune_align": Command(FinetuneAlignConfig, training, _train),
        "run_libero_eval": Command(EvalConfig, evaluation, _evaluate),
        "merge": _command(merge, merge.MergeConfig, base_checkpoint="base", output="merged",
                         lora_finetuned_checkpoint_dir="runs/run--1_chkpt"),
        "collect": _command(data_collect, data_collect.CollectConfig, output_dir="demos", libero_assets="stand-ins"),
        "statistics": _command(data_stats, data_stats.StatsConfig, **data, output_dir="out"),
        "show": _command(data_show, data_show.ShowConfig, **data, output="out/sheet.png", frames="2"),
        "gaussians": _command(data_gaussians, data_gaussians.FitConfig, **data, output="gaussians.json"),
        "tiny": _command(tiny, tiny.TinyConfig, output="tiny"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def commands() -> dict[str, Command]:
    return _commands()


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command works."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("fuzz") / "place"))
    make_tiny_policy(folder / "policy", layers=2)
    make_tiny_vggt(folder / "vggt.pt", image_size=56)
    (folder / _TEXT_FILE).write_text("nothing but text\n")
    return folder


def _kind(field: Field[Any], hint: Any) -> str:
    for kind, names in _KINDS.items():
        if field.name in names:
            return kind
    text = str(hint)
    if "list" in text or "tuple" in text:
        return "list"
    return next((kind for kind in ("bool", "float", "int") if kind in text), "")


@st.composite
def wrong_flags(draw: Draw, commands: dict[str, Command]) -> Mutation:
    """One flag with a value that cannot be, misspelt, twice, without a value, or a file of flags that is none."""
    name = draw(st.sampled_from(sorted([*commands, "finetune_align", "finetune_align", "run_libero_eval"])))
    command = commands[name]
    hints = get_type_hints(command.flags)
    known = [(field, _kind(field, hints[field.name])) for field in fields(command.flags)]
    field, kind = draw(st.sampled_from([(f, kind) for f, kind in known if kind and f.name not in _LEFT_OUT]))
    flag, values = field.name, dict(command.valid)
    how = draw(st.sampled_from(["never", "never", "sometimes", "never", "sometimes", "shape"]))
    if how == "sometimes" and kind in _SOMETIMES:
        value = draw(st.sampled_from(_SOMETIMES[kind]))
        allowed = {"0": flag in _ZERO, "-1": flag in _MINUS_ONE}.get(value, True)
        values[flag] = value
        return _mutation(name, flag, f"--{flag} {value}", _joined(values), must_fail=not allowed)
    if how != "shape":
        value = values[flag] = draw(st.sampled_from(_NEVER[kind]))
        return _mutation(name, flag, f"--{flag} {value[:40]!r}", _joined(values), must_fail=True)
    arguments = _joined(values)
    extra = {"misspelt": [f"--{flag}x", "1"], "stray": ["stray"], "no value": [f"--{flag}"], "dashes": ["---", "x"],
             "empty name": ["--=1"], "a file that is not there": ["--config_path", "missing.yaml"],
             "a file of text": ["--config_path", _TEXT_FILE], "a folder": ["--config_path", "root"]}  # fmt: skip
    required = [f.name for f in fields(command.flags) if f.default is f.default_factory is MISSING]
    shape = draw(st.sampled_from([*extra, *(["missing"] if required else [])]))
    if shape == "missing":
        gone = draw(st.sampled_from(required))
        return _mutation(name, gone, f"no --{gone}", _joined({k: v for k, v in values.items() if k != gone}), True)
    must_fail = not (shape == "no value" and kind in ("bool", "choice"))
    named = {"stray": "stray", "dashes": "---", "empty name": "--", "misspelt": f"{flag}x"}
    named |= dict.fromkeys(("a file that is not there", "a file of text", "a folder"), "config_path")
    said = named.get(shape, flag)
    return _mutation(name, said, f"{shape}: {' '.join(extra[shape])}", [*arguments, *extra[shape]], must_fail)


def _joined(values: dict[str, str]) -> list[str]:
    return [part for flag, value in values.items() for part in (f"--{flag}", value)]


def _mutation(command: str, flag: str, what: str, arguments: list[str], must_fail: bool) -> Mutation:
    content = json.dumps([command, arguments])
    return Mutation(flag, command, f"{command} {what}", lambda folder: (folder / "call").write_text(content),
                    must_fail=must_fail)  # fmt: skip


def _call(commands: dict[str, Command]) -> Callable[[Path], str]:
    """Runs what the mutation wrote down."""

    def read(folder: Path) -> str:
        os.chdir(folder)
        if (folder / "call").exists():
            name, arguments = json.loads((folder / "call").read_text())
            commands[name].call(arguments)
        return "done"

    return read


@pytest.mark.parametrize("name", _NAMES)
def test_commands_work(place: Path, commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    """With right flags, or all others would prove nothing."""
    folder = Path(shutil.copytree(place, tmp_path / "case" / "data"))
    (folder / "call").write_text(json.dumps([name, _joined(commands[name].valid)]))
    outcome = attempt(_call(commands), folder)
    assert outcome.kind == "works", outcome


def test_wrong_flags(fuzz: Fuzzer, place: Path, commands: dict[str, Command]) -> None:
    also = (_TEXT_FILE, "missing/x", _LONG[:50])
    fuzz(place, wrong_flags(commands), _call(commands), percent=19, also=also)
