"""A restarted command finds its run, and no other."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from prismo.eval.config import EvalConfig
from prismo.eval.results import EpisodeResult
from prismo.eval.run_folder import EvalFolder, RunIdentity, open_run

IDENTITY = RunIdentity("libero_object", "openvla", None, {"checkpoint_hash": "ab", "max_steps": 280})
RESULT = EpisodeResult(1, "libero_object", 0, "pick up the milk", 0, 0, 7, "success", 93, 12, 4.2, 0.5, "0" * 16)


def opened(root: Path, identity: RunIdentity = IDENTITY, **flags: bool) -> tuple[EvalFolder, bool]:
    return open_run(EvalConfig(pretrained_checkpoint="runs/x", local_log_dir=str(root), **flags), identity, {})


def test_an_unfinished_run_is_continued(tmp_path: Path) -> None:
    first, resumed = opened(tmp_path)
    assert not resumed
    first.log.append(RESULT)
    first.close()
    again, resumed = opened(tmp_path)
    assert resumed
    assert (again.path, again.about) == (first.path, first.about)
    assert list(again.log.results) == [1]
    assert again.text_log.name == f"EVAL-libero_object-openvla-{again.about.timestamp}.txt"


def test_other_settings_finished_runs_and_resume_false(tmp_path: Path) -> None:
    first, _ = opened(tmp_path)
    first.close()
    for identity in (
        replace(IDENTITY, settings={**IDENTITY.settings, "checkpoint_hash": "cd"}),
        replace(IDENTITY, note="second seed"),
        replace(IDENTITY, suite="libero_goal"),
    ):
        run, resumed = opened(tmp_path, identity)
        assert not resumed
        run.close()
    run, resumed = opened(tmp_path, resume=False)
    assert not resumed
    assert run.path != first.path
    run.results_file.write_text("{}")
    run.close()
    run, resumed = opened(tmp_path)
    assert (run.path, resumed) == (first.path, True)  # the newer one is finished
    run.close()


def test_retry_errors_reopens_a_finished_run(tmp_path: Path) -> None:
    first, _ = opened(tmp_path)
    first.log.append(RESULT)
    first.results_file.write_text("{}")
    first.close()
    run, resumed = opened(tmp_path, retry_errors=True)
    assert not resumed  # nothing to retry
    run.results_file.write_text("{}")
    run.log.append(replace(RESULT, outcome="error", error="x"))
    run.close()
    again, resumed = opened(tmp_path, retry_errors=True)
    assert (again.path, resumed) == (run.path, True)


def hold(root: Path, pipe: Connection) -> None:
    """What another process does that is at work on a run."""
    run, _ = opened(root)
    pipe.send(str(run.path))
    time.sleep(60)


def test_a_run_at_work_is_left_alone_until_its_process_dies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(tmp_path, theirs), daemon=True)
    other.start()
    path = Path(ours.recv())
    run, resumed = opened(tmp_path)
    assert not resumed
    assert run.path != path
    run.results_file.write_text("{}")
    run.close()
    other.kill()
    other.join()
    run, resumed = opened(tmp_path)
    assert (run.path, resumed) == (path, True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "its content"),
        ({"settings": None}, "settings should be"),
        ({"timestamp": "../../x"}, "timestamp should match pattern"),
        ({"timestamp": None}, "timestamp"),
    ],
)
def test_a_damaged_run_is_passed_over(
    change: str | dict[str, Any], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = opened(tmp_path)
    first.close()
    damaged, _ = opened(tmp_path, resume=False)
    damaged.close()
    file = damaged.path / "run.json"
    file.write_text(change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change}))
    with caplog.at_level(logging.WARNING):
        run, resumed = opened(tmp_path)
    assert (run.path, resumed) == (first.path, True)
    assert f"{damaged.path.name} is passed over: {file}: {says}" in caplog.text


def test_only_the_run_that_goes_on_is_read(tmp_path: Path) -> None:
    """A damaged episode line: of a finished run it is nobody's business, of one to be continued an error."""
    finished, _ = opened(tmp_path)
    (finished.path / "episodes.jsonl").write_text("damaged\n")
    finished.results_file.write_text("{}")
    finished.close()
    unfinished, resumed = opened(tmp_path)
    assert not resumed
    unfinished.log.append(RESULT)
    unfinished.close()
    (unfinished.path / "episodes.jsonl").write_text("damaged\n")
    with pytest.raises(ValueError, match=r"episodes\.jsonl line 1: not valid JSON .*--resume False"):
        opened(tmp_path)
    run, _ = opened(tmp_path, resume=False)
    assert run.path != unfinished.path


def test_a_run_says_who_is_at_work_on_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = opened(tmp_path)
    with caplog.at_level(logging.INFO):
        opened(tmp_path)[0].close()
    assert f"is at work on {run.path}" in caplog.text
    assert "process " in caplog.text
