"""CONTRIBUTING's table of seams is true: its files, registries and tests are there, and each test counts the places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    if "tests/seams/" in line and line.startswith("| a")
]


def test_every_seam_has_a_row() -> None:
    tests = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert {Path(row[3].strip("`")).name for row in ROWS} == tests


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_what_is_there(row: list[str]) -> None:
    _, file, line, test = row
    paths = re.findall(r"`((?:prismo|tests)/[\w/.]+)`", f"{file} {line} {test}") + re.findall(r"\]\(([\w/.]+)", file)
    assert paths
    for path in paths:
        assert (REPOSITORY / path).exists(), path
    registry = re.search(r"^in `([A-Z]+)`, `([\w/.]+)`", line)
    if registry is None:
        return  # a dataset's file needs no line, and a player is a line of code
    name, path = registry.groups()
    assert re.search(rf"^{name}\b.* = {{", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE)
    # The dummy of the test is one line: one entry in that table, and nothing else of the package is changed for it.
    text = (REPOSITORY / test.strip("`")).read_text(encoding="utf-8")
    changes = re.findall(r"monkeypatch\.(?:setitem|setattr)\((?:\w+\.)*(\w+),", text)
    assert changes == [name]
