"""What a command says when it is given something wrong, and when it is wrong itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from prismo.data.specs import resolve
from prismo.util.cli import parse_flags, run_command


@dataclass
class Flags:
    # A number
    number: int = 0
    # A file
    path: Path | None = None


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
