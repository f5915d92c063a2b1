"""Kinds of checkpoints and datasets, by what lies in a folder: every family's policies, and those of `_OTHERS`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prismo.families import FAMILIES, all_families
from prismo.verify.checks import Check
from prismo.verify.kinds.policy import PolicyKind
from prismo.verify.kinds.rlds import RLDS
from prismo.verify.kinds.vggt import VGGT
from prismo.verify.subject import Subject


class Kind(Protocol):
    """How one kind is recognised and what is asked of it.

    Attributes:
        title: for the page.
    """

    @property
    def title(self) -> str: ...

    def recognises(self, path: Path) -> bool:
        """Whether a folder or file is of this kind; ValueError where a file that would say so is damaged."""
        ...

    def checks(self, subject: Subject) -> list[Check]:
        """The questions, in order; nothing is read before they are run."""
        ...


_OTHERS: dict[str, Kind] = {"rlds": RLDS(), "vggt": VGGT()}


def kinds() -> dict[str, Kind]:
    """All of them by name."""
    return {family.model_type: PolicyKind(family) for family in all_families()} | _OTHERS


def find_kind(path: Path, claimed: str | None) -> Kind:
    """The kind of a folder or file.

    Args:
        claimed: name of the kind of the published id that it is compared with.

    Raises:
        ValueError: it is none of them, or another one than claimed.
    """
    known = kinds()
    try:
        found = [name for name, kind in known.items() if kind.recognises(path)]
    except ValueError:
        if claimed is None:
            raise
        found = [claimed]
    if not found and claimed is None:
        beside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else "a file"
        own = path.resolve()
        runs = sorted(run.name for run in own.parent.glob("*_chkpt") if run.name.startswith(f"{own.name}--"))
        raise ValueError(
            f"{path} is nothing that can be verified: expected config.json of model_type {' or '.join(FAMILIES)}, "
            f"lora_adapter/, VGGT's model.pt, or dataset_info.json; found {beside or 'an empty folder'}"
            + (f". The checkpoints of this run lie beside it: {', '.join(runs)}" if runs else "")
        )
    if found and claimed is not None and claimed not in found:
        raise ValueError(
            f"{path} is of the kind {known[found[0]].title!r}, the id that it is compared with of "
            f"{known[claimed].title!r}; --id none compares it with no id"
        )
    return known[claimed or found[0]]
