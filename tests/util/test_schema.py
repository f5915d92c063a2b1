"""Files of JSON and YAML: what is wrong in them is one sentence, what is right comes back with its types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, MinLen
from pydantic import FiniteFloat

from prismo.util.schema import JsonObject, check, own_keys, read_json, read_json_lines, read_yaml


@dataclass(frozen=True)
class Inner:
    rates: Annotated[list[FiniteFloat], MinLen(1)]


@dataclass(frozen=True)
class Kind:
    count: Annotated[int, Ge(1)]
    name: str = "x"
    truth: bool | None = None
    inner: Inner | None = None


@own_keys
@dataclass(frozen=True)
class Own:
    count: int
    control_hz: FiniteFloat = 20.0


def written(folder: Path, content: str | bytes, name: str = "x.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_types_come_back(tmp_path: Path) -> None:
    path = written(tmp_path, '{"count": 2, "inner": {"rates": [1, 0.5]}, "more": "ignored"}')
    assert read_json(path, Kind) == Kind(2, inner=Inner([1.0, 0.5]))
    assert read_json(path, JsonObject)["more"] == "ignored"
    assert read_yaml(written(tmp_path, "count: 2\ntruth: yes\n", "x.yaml"), Kind) == Kind(2, truth=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        (b'{"name": "\xff"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "its content should be"),
        ("null", "its content should be"),
        ("{}", "count is missing"),
        ('{"count": 0}', "count should be greater than or equal to 1, found 0"),
        ('{"count": "2"}', "count should be a valid integer, found '2'"),
        ('{"count": 1.5}', r"count should be a valid integer.*, found 1\.5"),
        ('{"count": true}', "count should be a valid integer, found True"),
        ('{"count": 1, "truth": "False"}', "truth should be a valid boolean, found 'False'"),
        ('{"count": 1, "inner": {"rates": [1, NaN]}}', r"inner\.rates\[1\] should be a finite number, found nan"),
        ('{"count": 1, "inner": {"rates": []}}', r"inner\.rates should have at least 1 item .*, found \[\]"),
        ('{"count": 0, "name": 1}', r"count .*\(and 1 more\)"),
        ('{"count": "' + "9" * 1000 + '"}', r"found '9{59}\.\.\.; "),
    ],
)
def test_wrong_json_is_one_sentence(content: str | bytes, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=says) as error:
        read_json(path, Kind)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("; restore it or fetch it again")
    assert "\n" not in text
    assert len(text) < 400


def test_keys_of_our_own_files_are_known() -> None:
    with pytest.raises(ValueError, match=r"here: unknown key 'control_hertz'\. Did you mean 'control_hz'"):
        check({"count": 1, "control_hertz": 5.0}, Own, "here")
    assert check({"count": 1, "control_hz": 5}, Own, "here") == Own(1, 5.0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("count: [4", "not valid YAML"),
        ("!!python/object/apply:os.mkdir [executed]", "not valid YAML"),
        ("base: !include other.yaml", "not valid YAML"),
        (b"name: \xff", "not valid YAML"),
        ("- 1\n- 2\n", "its content should be"),
        ("", "its content should be"),
        ("count: yes", "count should be a valid integer"),
        ("count: 2024-01-01", "count should be a valid integer"),
        ("a: &a [1, 2]\ncount: *a\n", "count should be a valid integer"),
        ("count: 1\ninner: {rates: [.nan]}", r"inner\.rates\[0\] should be a finite number"),
        ("a: &a {b: *a}\ncount: 1", "not valid YAML"),
    ],
)
def test_wrong_yaml_is_one_sentence(
    content: str | bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, content, "x.yaml")
    with pytest.raises(ValueError, match=says) as error:
        read_yaml(path, Kind)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_yaml_that_grows_is_refused(tmp_path: Path) -> None:
    """Each line ten times the one before: twenty lines of more words than any memory holds. And a long file."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    with pytest.raises(ValueError, match="aliases make it too long"):
        read_yaml(written(tmp_path, "\n".join(lines), "x.yaml"), dict[str, Any])
    with pytest.raises(ValueError, match="a description has at most"):
        read_yaml(written(tmp_path, "x: " + "y" * (1 << 20), "x.yaml"), dict[str, Any])


def test_lines_are_numbered(tmp_path: Path) -> None:
    path = written(tmp_path, '{"count": 1}\n\n{"count": 2, "name": "one\u2028two"}\n', "x.jsonl")
    assert [line.count for line in read_json_lines(path, Kind)] == [1, 2]
    path = written(tmp_path, '{"count": 1}\n\n{"count": -1}\n', "x.jsonl")
    with pytest.raises(ValueError, match=r"x\.jsonl line 3: count should be .*; throw it away"):
        read_json_lines(path, Kind, advice="throw it away")
