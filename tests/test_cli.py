"""What a command says when it is given something wrong, and when it is wrong itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from prismo.commands import COMMANDS, main
from prismo.data.resolve import resolve
from prismo.sim.assets import Assets
from prismo.sim.libero_worker import LiberoWorker
from prismo.util.cli import run_command
from prismo.util.flags import parse_flags

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Flags:
    # A number
    number: int = 0
    # A file
    path: Path | None = None


@dataclass
class Needs:
    # A folder
    output: Path


def run(main, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    return run_command(main, Flags)


def test_flags(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("number: 3\n")
    assert parse_flags(Flags, ["--config_path", str(file), "--path=a b"]) == Flags(3, Path("a b"))
    with pytest.raises(ValueError, match=r"unknown flag '--nubmer'\. Did you mean '--number'"):
        parse_flags(Flags, ["--nubmer", "3"])
    with pytest.raises(ValueError, match="another type"):
        parse_flags(Flags, ["--number", "three"])


def test_wrong_input_is_one_sentence(monkeypatch, caplog, tmp_path):
    def unknown_dataset(flags: Flags) -> None:
        resolve(tmp_path, "libero_spatal_no_noops")

    assert run(unknown_dataset, monkeypatch) == 2
    assert run(lambda flags: flags.path.read_text(), monkeypatch, "--path", str(tmp_path / "missing")) == 2
    assert run(lambda flags: None, monkeypatch, "--numbr", "1") == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    for text, expected in zip(said, ("Did you mean 'libero_spatial_no_noops'", "missing", "'--number'"), strict=True):
        assert expected in text
    assert "Traceback" not in caplog.text


def test_a_bug_shows_where_it_is(monkeypatch, caplog):
    assert run(lambda flags: json.loads("{"), monkeypatch) == 2
    assert "Traceback" in caplog.text
    assert "raw_decode" in caplog.text


def test_errors_of_other_classes_are_told_apart_alike(monkeypatch, caplog):
    """A simulator that cannot do what was asked is one sentence, too; a slip of ours keeps its traceback."""
    worker = LiberoWorker(Assets(Path(), "folder"), cameras=False)
    assert run(lambda flags: worker.step_chunk(np.zeros((1, 7))), monkeypatch) == 2
    assert "no episode is running" in caplog.text
    assert "Traceback" not in caplog.text
    assert run(lambda flags: flags.nothing, monkeypatch) == 2
    assert "Traceback" in caplog.text
    assert "AttributeError" in caplog.text


def test_a_command_that_works(monkeypatch, caplog):
    seen = []

    def remember(flags: Flags) -> None:
        seen.append(flags)

    assert run(remember, monkeypatch, "--number", "5") == 0
    assert seen == [Flags(5)]
    assert not caplog.records


def test_a_missing_flag_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing --output; --help lists all flags"):
        parse_flags(Needs, [])
    file = tmp_path / "flags.yaml"
    file.write_text("output: there\n")
    assert parse_flags(Needs, ["--config_path", str(file)]) == Needs(Path("there"))


HEAVY = "import sys; from prismo.commands import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.processes
def test_every_command_has_help_at_once(name):
    """What it does, an example, its flags; and nothing that takes seconds to import is needed for it, or for a typo."""
    words = name.split()
    for arguments in ([*words, "--help"], [*words, "-h"]):
        shown = subprocess.run([sys.executable, "-m", "prismo", *arguments], capture_output=True, text=True, check=True)
        assert f"prismo {name} " in shown.stdout
        assert "\n  --" in shown.stdout
        assert not re.search(r"\S {4,}--", shown.stdout), "lines of the example have run together"
        assert shown.stderr == ""
    typo = subprocess.run([sys.executable, "-c", HEAVY, *words, "--halp"], capture_output=True, text=True, check=True)
    assert typo.stdout.split() == ["False", "2"]
    assert typo.stderr.startswith("ERROR unknown flag '--halp'")


def test_the_console_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["data"]) == 0
    assert "  data show" in capsys.readouterr().out
    for wrong in (["trian"], ["data", "shw"]):
        assert main(wrong) == 2
        assert "Did you mean" in capsys.readouterr().err


SCRIPTS = [
    path
    for folder in ("scripts", "vla-scripts", "experiments/robot/libero")
    for path in (REPOSITORY / folder).glob("*.py")
    if not path.name.startswith("bench_")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_their_commands(script):
    """The original's paths, and nothing in them but a call."""
    command = re.search(r"from prismo.commands.(\w+) import main", script.read_text()).group(1)
    assert command in {module for module, _ in COMMANDS.values()}
    assert len(script.read_text().splitlines()) < 10


def test_a_scripts_file_runs():
    script = REPOSITORY / "vla-scripts" / "merge_lora_weights_and_save.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR missing --base_checkpoint, --lora_finetuned_checkpoint_dir;")


@dataclass(frozen=True)
class Kinds:
    # Truth
    switch: bool = False
    # --- more
    # Tasks
    tasks: list[int] | None = None
    # A rate
    rate: float = 1.0
    # How
    how: bool | Literal["auto"] = False
    # Words
    text: str = "x"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--switch"], Kinds(switch=True)),
        (["--switch", "True", "--rate", "5e-4"], Kinds(switch=True, rate=5e-4)),
        (["--switch=false"], Kinds()),
        (["--tasks", "0"], Kinds(tasks=[0])),
        (["--tasks", "[0, 5]"], Kinds(tasks=[0, 5])),
        (["--tasks", "[0,", "5]"], Kinds(tasks=[0, 5])),
        (["--tasks", "0", "5"], Kinds(tasks=[0, 5])),
        (["--tasks", "None"], Kinds()),
        (["--rate", "-1"], Kinds(rate=-1.0)),
        (["--how", "auto"], Kinds(how="auto")),
        (["--how", "True"], Kinds(how=True)),
        (["--text", "a b", "--text", "c"], Kinds(text="c")),
    ],
)
def test_values(arguments, expected):
    assert parse_flags(Kinds, arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--switch", "maybe"], "--switch maybe: another type than bool"),
        (["--tasks", "[0"], "--tasks"),
        (["--tasks", "[a]"], "--tasks"),
        (["--rate"], "--rate needs a value"),
        (["--rate", "1", "2"], "--rate takes one value, found '1 2'"),
        (["rate", "1"], "found 'rate' where a flag was expected"),
        (["--how", "perhaps"], "--how perhaps"),
        (["--swich"], r"unknown flag '--swich'\. Did you mean '--switch'\? --help lists all flags"),
    ],
)
def test_wrong_values_name_their_flag(arguments, said):
    with pytest.raises(ValueError, match=said) as raised:
        parse_flags(Kinds, arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "rate: [4\n",
        "- a\n- b\n",
        "just a string\n",
        "base: !include other.yaml\n",
        "rate: [1]\n",
        "rate: null\n",
        "\xff",
    ],
)
def test_a_broken_file_of_flags_is_one_sentence(text, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"flags\.yaml") as raised:
        parse_flags(Kinds, ["--config_path", str(file)])
    assert "\n" not in str(raised.value)


def test_help_has_groups(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Kinds, ["--help"])
    shown = capsys.readouterr().out
    assert (
        shown.index("flags:") < shown.index("--switch bool") < shown.index("more:") < shown.index("--tasks [int, ...]")
    )


def test_flags_of_a_training_stand_in_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for group in ("data", "model", "alignment", "logging", "SpatialVLA"):
        assert shown.count(f"\n{group}:\n") == 1
