"""Verify a checkpoint or dataset: find it, find out what it is, ask every question, keep the answers."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from prismo.policies.checkpoint import checkpoint_folder
from prismo.policies.flags import PolicyFlags
from prismo.util.hub import local_folder
from prismo.verify.checks import Answer, Status, run_checks
from prismo.verify.environment import environment
from prismo.verify.facts import Facts, read_facts
from prismo.verify.kinds import find_kind
from prismo.verify.subject import Options, Subject

_LOG = logging.getLogger(__name__)
NO_ID = "none"


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        source: as the user named it.
        title: its kind in words.
        compared_with: the published id, and where the facts about it come from; None = what its own files say.
        rows: the checks.
        environment: packages and machine.
        seconds: that all of it took.
    """

    source: str
    title: str
    compared_with: tuple[str, str] | None
    rows: tuple[Answer, ...]
    environment: tuple[str, ...]
    seconds: float

    @property
    def differs(self) -> bool:
        return self.count("differs") > 0

    def count(self, status: Status) -> int:
        return sum(row.finding.status == status for row in self.rows)


def verify(source: str, options: Options, name: str | None = None, facts: Facts | None = None) -> Report:
    """Run every check that fits.

    Args:
        source: folder or file; a hub id is fetched into the hub's cache.
        name: published id to compare with; "none" for none, None = the hub id, or the one that the folder is named
            after.
        facts: other facts than those that ship with the project.

    Raises:
        FileNotFoundError, ValueError: nothing that could be verified.
    """
    start = time.perf_counter()
    PolicyFlags(pretrained_checkpoint=source, device=options.device).validate()
    facts = facts or read_facts()
    if name is None:
        name = source if source in facts.published and not Path(source).exists() else None
    elif name != NO_ID:
        facts.get(name)
    path = _locate(source, name, facts)
    alone = name == NO_ID
    name = None if alone else name or facts.identify(path.resolve())
    subject = Subject(source, path, name, facts, options, alone)
    known = subject.known
    kind = find_kind(path, known.kind if known else None)
    rows = []
    for row in run_checks(kind.checks(subject)):
        _LOG.info("%-10s %s: %s", row.finding.status, row.name, row.finding.text)
        rows.append(row)
    compared = (subject.name, known.source) if subject.name and known else None
    seconds = time.perf_counter() - start
    return Report(source, kind.title, compared, tuple(rows), tuple(environment()), seconds)


def _locate(source: str, name: str | None, facts: Facts) -> Path:
    """Where it lies; only a hub id that the user gave is ever fetched."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    kind = facts.published[name].kind if name in facts.published else None
    repository = "/".join(source.split("/")[:2])
    if any(known.startswith(f"{repository}/") for known in facts.published):
        raise ValueError(
            f"{repository} is a repository of datasets; type: hf download {repository} --repo-type dataset "
            f"--local-dir data/{repository.split('/')[1]}, and give that folder"
        )
    if kind == "vggt":
        return local_folder(source, ("model.pt",), missing=lambda folder: f"{folder} has no model.pt")
    return checkpoint_folder(source)
