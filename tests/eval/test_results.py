"""The memory of a run: lines that survive a killed process, and rates that do not count errors as failures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from prismo.eval.results import EpisodeLog, EpisodeResult, format_table, summarize

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
    continued = EpisodeLog(path)
    assert list(continued.results) == [1]
    assert path.read_bytes() == whole
    continued.append(replace(RESULT, episode=2))
    assert list(EpisodeLog(path).results) == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text("nonsense\n" + json.dumps(asdict(RESULT)) + "\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        EpisodeLog(path)


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
    assert summary.total.interval == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's for 8 of 10
    assert summary.tasks[1][1].success_rate is None
    stored = json.loads(json.dumps(summary.to_json()))
    assert stored["tasks"][0]["wilson_95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    table = format_table(summary)
    assert "80.0 %" in table
    assert table.splitlines()[-1].split()[-1] == "6"
