"""The page, and the command that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prismo.commands.verify import main
from prismo.verify import Options, Report, page, verify
from prismo.verify.checks import Answer, Check, Finding, SkippedError, judge, run_checks
from tests.verify.conftest import DATASET, NO_FORWARD, Copy


def report_of(*rows: Answer) -> Report:
    return Report("ckpts/a|b", "OpenVLA policy", ("openvla/openvla-7b", "a copy"), rows, ("torch 2.11.0",), 3.2)


def test_the_page_of_a_checkpoint() -> None:
    long = "`x`" * 60
    text = page(
        report_of(
            Answer("files", Finding("ok", "12 files | 5 MB"), 0.1),
            Answer("counts", Finding("not known", long), 0.1),
            Answer("tensor names", judge("", ["missing: expected `a`, found nothing", "unknown: more"]), 0.1),
            Answer("prediction", Finding("skipped", "--no_forward"), 0.1),
        ),
        ("prismo", "verify", "ckpts/a b"),
    )
    lines = text.splitlines()
    assert lines[0] == "## OpenVLA policy `ckpts/a|b`: 1 ok, 1 differs, 1 not known, 1 skipped"
    assert lines[2] == "Compared with what is known of `openvla/openvla-7b` (from: a copy). Took 3 s."
    assert "| files | ok | 12 files \\| 5 MB |" in lines
    assert "| tensor names | **differs** | missing: expected `a`, found nothing |" in lines
    assert lines[lines.index("### What differs") + 2 :][:2] == [
        "- **tensor names**: missing: expected `a`, found nothing",
        "- **tensor names**: unknown: more",
    ]
    assert lines[-1] == "`prismo verify 'ckpts/a b'`"
    (counts,) = (line for line in lines if line.startswith("| counts"))
    assert len(counts) < 180
    assert counts.count("`") % 2 == 0


@pytest.mark.parametrize("checks", [3, 25])
def test_a_page_is_at_most_80_lines(checks: int) -> None:
    wrong = judge("", [f"number {i}: expected a, found b" for i in range(50)])
    text = page(report_of(*(Answer(f"check {i}", wrong, 0.1) for i in range(checks))), ("command",))
    assert len(text.splitlines()) <= 80
    assert text.count("more)") == checks


def test_a_check_that_fails_stops_no_other() -> None:
    def broken() -> Finding:
        raise KeyError("surprise")

    def impossible() -> Finding:
        raise SkippedError("no GPU")

    def wrong() -> Finding:
        raise ValueError("model.safetensors is truncated\nsecond line")

    rows = list(
        run_checks(
            [
                Check("broken", broken),
                Check("impossible", impossible),
                Check("wrong", wrong),
                Check("behind it", lambda: judge("fine", []), ("wrong",)),
                Check("last", lambda: judge("fine", []), ("unheard of",)),
            ]
        )
    )
    assert [(row.finding.status, row.finding.text) for row in rows] == [
        ("differs", "could not be judged: KeyError: 'surprise'"),
        ("skipped", "no GPU"),
        ("differs", "model.safetensors is truncated"),
        ("skipped", "see 'wrong'"),
        ("ok", "fine"),
    ]


def test_the_command(tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.md"
    assert main([str(tiny_policy), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown == output.read_text()
    assert f"`prismo verify {tiny_policy} --output {output}`" in shown
    assert "| black image | ok |" in shown


def test_the_exit_code(tiny_policy: Path, copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tiny_policy)
    assert main([str(folder), "--no_forward"]) == 0
    capsys.readouterr()
    (folder / "tokenizer_config.json").unlink()
    assert main(["--source", str(folder), "--no_forward"]) == 1
    shown = capsys.readouterr().out
    assert "| files | **differs** | `tokenizer_config.json`: expected a file, found none |" in shown
    assert f"`prismo verify {folder} --no_forward True`" in shown
    assert main(["nowhere/at/all"]) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere/at/all",), "neither a checkpoint folder nor a hub id"),
        (("openvla/modified_libero_rlds",), "hf download openvla/modified_libero_rlds --repo-type dataset"),
        ((".", "--id", "openvla/openvla-7"), "Did you mean 'openvla/openvla-7b'"),
        ((".", "--id", "facebook/VGGT-1B"), "holds neither model.safetensors nor model.pt"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], text: str) -> None:
    source, *rest = arguments
    with pytest.raises((ValueError, OSError), match=text):
        verify(source, Options(), rest[1] if rest else None)


def test_what_is_nothing_is_refused(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"is nothing that can be verified.*found an empty folder"):
        verify(str(tmp_path), NO_FORWARD)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "metrics.jsonl").touch()
    (tmp_path / "run--10_chkpt").mkdir()
    with pytest.raises(ValueError, match=r"found metrics.jsonl. The checkpoints of this run .*: run--10_chkpt"):
        verify(str(run_folder), NO_FORWARD)
    with pytest.raises(ValueError, match="is of the kind 'RLDS dataset', the id that it is compared with of"):
        verify(str(dataset / DATASET), NO_FORWARD, "openvla/openvla-7b")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is nothing that can be verified"):
        verify(str(tmp_path), NO_FORWARD)
