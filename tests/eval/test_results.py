"""The memory of a run: lines that survive a killed process, and rates that do not count errors as failures."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from prismo.eval.results import EpisodeLog, EpisodeResult, format_table, read_episodes, summarize

RESULT = EpisodeResult(1, "libero_object", 0, "pick up the milk", 0, 0, 7, "success", 93, 12, 4.2, 0.5, "0" * 16)


def test_lines_are_kept(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "episodes.jsonl")
    log.append(RESULT)
    log.append(replace(RESULT, episode=2, outcome="error", error="Traceback\nValueError: grüße"))
    assert EpisodeLog(tmp_path / "episodes.jsonl").results == log.results
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 2


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    log = EpisodeLog(path)
    log.append(RESULT)
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(asdict(replace(RESULT, episode=2))).encode()[:40])
    assert list(read_episodes(path)) == [1]
    assert path.stat().st_size == len(whole) + 40  # somebody may be writing the rest of it
    continued = EpisodeLog(path)
    assert list(continued.results) == [1]
    assert path.read_bytes() == whole
    continued.append(replace(RESULT, episode=2))
    assert list(EpisodeLog(path).results) == [1, 2]


def test_a_line_that_the_disk_has_no_room_for_is_taken_back(tmp_path: Path) -> None:
    """The kernel writes what fits and says so by a smaller number, here as on a disk that fills up."""
    path = tmp_path / "episodes.jsonl"
    log = EpisodeLog(path)
    log.append(RESULT)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.append(replace(RESULT, episode=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    assert list(log.results) == [1]
    log.append(replace(RESULT, episode=3))
    assert list(EpisodeLog(path).results) == [1, 3]


def test_line_ends_of_other_alphabets_are_kept(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "episodes.jsonl")
    log.append(replace(RESULT, outcome="error", error="one\u2028two\x85three"))
    assert EpisodeLog(tmp_path / "episodes.jsonl").results == log.results


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "line 1: not valid JSON"),
        ("[1]", "line 1: its content should be"),
        (json.dumps({**asdict(RESULT), "steps": "93"}), "line 1: steps should be a valid integer"),
        (json.dumps({**asdict(RESULT), "episode": 0}), "line 1: episode should be greater than or equal to 1"),
        (json.dumps({**asdict(RESULT), "outcome": "won"}), "line 1: outcome should be 'success', 'failure' or 'error'"),
        (json.dumps({**asdict(RESULT), "seconds": float("nan")}), "line 1: seconds should be a finite number"),
        (json.dumps({"episode": 1}), "line 1: suite is missing"),
    ],
)
def test_a_damaged_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text(line + "\n" + json.dumps(asdict(RESULT)) + "\n")
    with pytest.raises(ValueError, match=rf"{path} {says}.*; remove the line .*--resume False"):
        EpisodeLog(path)


def test_a_line_with_more_than_we_know_is_read(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text(json.dumps({**asdict(RESULT), "later": True}) + "\n")
    assert EpisodeLog(path).results == {1: RESULT}


def test_the_last_line_of_an_episode_counts(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "episodes.jsonl")
    log.append(replace(RESULT, outcome="error", error="x"))
    log.append(RESULT)
    assert EpisodeLog(tmp_path / "episodes.jsonl").results[1].outcome == "success"


def test_errors_are_in_neither_number_of_a_rate() -> None:
    outcomes = ["success"] * 8 + ["failure"] * 2 + ["error"] * 5
    results = [replace(RESULT, episode=i, outcome=outcome) for i, outcome in enumerate(outcomes, start=1)]
    results += [replace(RESULT, episode=16, task_id=1, task="pick up the ketchup", outcome="error")]
    summary = summarize(results, planned=20)
    assert not summary.complete
    assert (summary.total.episodes, summary.total.errors) == (16, 6)
    assert summary.total.success_rate == 0.8
    assert summary.total.wilson_95 == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's for 8 of 10
    assert summary.tasks[1][1].success_rate is None
    stored = json.loads(json.dumps(summary.to_json()))
    assert stored["tasks"][0]["wilson_95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    table = format_table(summary)
    assert "80.0 %" in table
    assert table.splitlines()[-1].split()[-1] == "6"
