"""What a command says when it is given something wrong, and when it is wrong itself."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from prismo.data.specs import resolve
from prismo.eval.config import EvalConfig
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.util.cli import parse_flags, run_command

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


def test_a_command_that_works(monkeypatch, caplog):
    seen = []
    assert run(seen.append, monkeypatch, "--number", "5") == 0
    assert seen == [Flags(5)]
    assert not caplog.records


def test_a_missing_flag_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing --output; --help lists all flags"):
        parse_flags(Needs, [])
    file = tmp_path / "flags.yaml"
    file.write_text("output: there\n")
    assert parse_flags(Needs, ["--config_path", str(file)]) == Needs(Path("there"))


SCRIPTS = [path for path in REPOSITORY.glob("*scripts/*.py") if "sys.exit(run_command(" in path.read_text()]


def flags_of(script: Path) -> type:
    """The dataclass of a script's flags."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    return getattr(module, re.search(r"run_command\(main, (\w+)\)", script.read_text()).group(1))


@pytest.mark.parametrize("kind", [FinetuneAlignConfig, FinetuneConfig, EvalConfig, *SCRIPTS])
def test_every_command_has_help(kind, capsys):
    """argparse takes a percent sign in a flag's comment for a format."""
    kind = flags_of(kind) if isinstance(kind, Path) else kind
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as stopped:
            parse_flags(kind, [flag])
        assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name} " in shown for field in fields(kind))
