"""A report as one page of Markdown that can be pasted into an issue."""

from __future__ import annotations

import shlex

from prismo.verify.checks import Answer, Status
from prismo.verify.report import Report

_LONGEST = 150  # characters of a table cell
_LISTED = 6  # differences per check, where the page has room
_LINES, _REST = 80, 10  # of the page, and without the differences
_ADVICE = "Fetch or copy what is damaged again. What still differs then is worth an issue: paste this page there."
_WORDS: dict[Status, str] = {"ok": "ok", "differs": "**differs**", "not known": "not known", "skipped": "skipped"}


def page(report: Report, command: tuple[str, ...] = ()) -> str:
    """The page; `command` is what was typed."""
    if report.compared_with is None:
        compared = "No published id (`--id` names one): compared with what its own files say."
    else:
        compared = f"Compared with what is known of `{report.compared_with[0]}` (from: {report.compared_with[1]})."
    lines = [
        f"## {report.title} `{report.source}`: {_verdict(report)}",
        "",
        f"{compared} Took {report.seconds:.0f} s.",
        "",
        "| check | result | found |",
        "|---|---|---|",
        *(_row(row) for row in report.rows),
        "",
    ]
    wrong = [row for row in report.rows if row.finding.status == "differs"]
    if wrong:
        each = max(1, (_LINES - len(lines) - _REST) // len(wrong))
        lines += ["### What differs", "", *(line for row in wrong for line in _differences(row, each)), "", _ADVICE, ""]
    lines += ["### Machine", "", f"{', '.join(report.environment)}."]
    if command:
        lines += ["", f"`{shlex.join(command)}`"]
    return "\n".join(lines) + "\n"


def _verdict(report: Report) -> str:
    counts = [(status, report.count(status)) for status in _WORDS]
    return ", ".join(f"{count} {status}" for status, count in counts if count)


def _row(row: Answer) -> str:
    text = row.finding.text.replace("|", "\\|").replace("\n", " ")
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + " ..."
        text += "`" * (text.count("`") % 2)
    return f"| {row.name} | {_WORDS[row.finding.status]} | {text} |"


def _differences(row: Answer, room: int) -> list[str]:
    shown = row.finding.details[: min(room, _LISTED)]
    lines = [f"- **{row.name}**: {line}" for line in shown]
    if more := len(row.finding.details) - len(shown):
        lines[-1] += f" (and {more} more)"
    return lines
