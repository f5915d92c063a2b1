"""What a run folder tells of itself, without a simulator: overview, links, next command; and captions of videos."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prismo.benchmarks.libero import BENCHMARK
from prismo.eval.config import EvalConfig
from prismo.eval.episode import Episode, plan_episodes
from prismo.eval.overview import OVERVIEW
from prismo.eval.results import EpisodeResult
from prismo.eval.run_folder import EvalFolder, RunIdentity, open_run
from prismo.eval.summary import report
from prismo.eval.video import COLORS, annotated
from prismo.util.flags import parse_flags

OUTCOMES = ("success", "error", "failure")


@pytest.fixture
def cfg(tmp_path: Path) -> EvalConfig:
    return EvalConfig(
        pretrained_checkpoint="runs/x",
        task_suite_name="libero_object",
        task_ids=[3, 1],
        num_trials_per_task=3,
        unnorm_key="libero_object",
        local_log_dir=str(tmp_path / "logs"),
        run_id_note="a",
        retry_errors=True,
    )


@pytest.fixture
def run(cfg: EvalConfig, tmp_path: Path) -> EvalFolder:
    """The first task is played: a success, an error and a failure, with videos."""
    episodes = plan_episodes(cfg, BENCHMARK)
    identity = RunIdentity(cfg.task_suite_name, "openvla", "a", {"assets": "folder"})
    folder, _ = open_run(replace(cfg, retry_errors=False), identity, {})
    folder.begin(cfg, episodes)
    for episode, outcome in zip(episodes, OUTCOMES, strict=False):
        video = tmp_path / "rollouts" / f"{episode.number}.mp4"
        video.parent.mkdir(exist_ok=True)
        video.touch()
        folder.log.append(result(episode, outcome, str(video)))
    return folder


def result(episode: Episode, outcome: str, video: str | None = None) -> EpisodeResult:
    task = episode.task
    values = (episode.number, task.suite, task.index, task.language, episode.init_state, 0, 0, outcome)
    return EpisodeResult(*values, 3, 1, 1.0, 0.5, "0" * 16, video=video)


def typed(text: str) -> EvalConfig:
    """What the command in the last line would run."""
    console, command, *words = shlex.split(text.splitlines()[-1])
    assert (console, command) == ("prismo", "eval")
    return parse_flags(EvalConfig, words)


def test_the_next_command(run: EvalFolder, cfg: EvalConfig) -> None:
    text = report(run.path)
    assert "3 of 6 episodes, not finished" in text
    assert "ended in an error, and go on with this run" in text
    assert typed(text) == cfg
    episodes = plan_episodes(cfg, BENCHMARK)
    run.log.append(result(episodes[1], "success"))
    text = report(run.path.with_name("latest"))
    assert "\ngo on with this run:\n" in text
    assert typed(text) == replace(cfg, retry_errors=False)
    for episode in episodes[3:]:
        run.log.append(result(episode, "failure"))
    assert "results.json follows at the end" in report(run.path)
    run.results_file.write_text("{}")
    text = report(run.path)
    assert "6 of 6 episodes, finished" in text
    other = {"pretrained_checkpoint": "OTHER_CHECKPOINT", "unnorm_key": None, "run_id_note": None}
    assert typed(text) == replace(cfg, **other, retry_errors=False)


def test_links_follow_the_episodes(run: EvalFolder, cfg: EvalConfig, tmp_path: Path) -> None:
    def names() -> list[str]:
        return [path.name.removeprefix("libero_object--task_01--") for path in sorted(run.path.glob("videos/*"))]

    report(run.path)
    task = "pick_up_the_cream_cheese_and_place_it_in_the_basket"
    assert names() == [f"trial_0{trial}--{outcome}--{task}.mp4" for trial, outcome in enumerate(OUTCOMES)]
    assert os.readlink(next(run.path.glob("videos/*--error--*"))) == "../../../rollouts/2.mp4"
    (run.path / "videos" / "mine.mp4").write_bytes(b"")
    run.log.append(result(plan_episodes(cfg, BENCHMARK)[1], "success", str(tmp_path / "rollouts" / "2.mp4")))
    report(run.path)
    assert [name.split("--")[1] for name in names()[:3]] == ["success", "success", "failure"]
    assert (run.path / "videos" / "mine.mp4").is_file()


def test_where_nothing_can_be_linked_or_drawn(run: EvalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (run.path / "videos").write_text("a file")
    text = report(run.path)
    assert "overview   not drawn: the package matplotlib" in text
    assert str(run.path.parents[1] / "rollouts") in text
    assert not (run.path / OVERVIEW).exists()


def test_the_overview_shows_every_trial(run: EvalFolder) -> None:
    report(run.path)
    with Image.open(run.path / OVERVIEW) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    assert {tuple(bytes.fromhex(color[1:])) for color in COLORS.values()} <= colors


def test_a_folder_without_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no evaluation that was begun: it has no run\.json"):
        report(tmp_path)


@pytest.mark.parametrize(("size", "width"), [(256, 512), (64, 128), (63, 126)])
def test_captions(cfg: EvalConfig, size: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, size, width, 3), np.uint8)
    pictures = np.stack(list(annotated(frames, plan_episodes(cfg, BENCHMARK)[0], "failure", 280)))
    assert np.array_equal(pictures[:, :size], frames)
    bands = pictures[:, size:]
    assert (pictures.shape[1] % 2, bands.shape[1] < size) == (0, True)
    assert not np.array_equal(bands[0], bands[1])  # the step
    changed = np.nonzero((bands[0] != bands[1]).any(axis=(0, 2)))[0]
    assert changed.max() < width // 2  # and nothing else
    assert (bands == 255).mean() > 0.7


def test_annotated_without_videos(cfg: EvalConfig) -> None:
    with pytest.raises(ValueError, match="--annotate_videos True, but --save_videos none"):
        replace(cfg, annotate_videos=True, save_videos="none").validate()
