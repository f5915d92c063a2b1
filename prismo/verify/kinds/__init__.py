"""Kinds of checkpoints and datasets, by what lies in a folder. A new kind is one file and one line here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prismo.verify.checks import Check
from prismo.verify.kinds.openvla import OpenVLA
from prismo.verify.kinds.rlds import RLDS
from prismo.verify.kinds.spatialvla import SpatialVLA
from prismo.verify.kinds.vggt import VGGT
from prismo.verify.subject import Subject


class Kind(Protocol):
    """How one kind is recognised and what is asked of it.

    Attributes:
        title: for the page.
    """

    title: str

    def recognises(self, path: Path) -> bool:
        """Whether a folder or file is of this kind; ValueError where a file that would say so is damaged."""
        ...

    def checks(self, subject: Subject) -> list[Check]:
        """The questions, in order; nothing is read before they are run."""
        ...


KINDS: dict[str, Kind] = {
    "openvla": OpenVLA(),
    "spatialvla": SpatialVLA(),
    "rlds": RLDS(),
    "vggt": VGGT(),
}


def find_kind(path: Path, claimed: str | None) -> str:
    """Key of the kind of a folder or file.

    Args:
        claimed: kind of the published id that it is compared with.

    Raises:
        ValueError: it is none of them, or another one than claimed.
    """
    try:
        found = [name for name, kind in KINDS.items() if kind.recognises(path)]
    except ValueError:
        if claimed is None:
            raise
        found = [claimed]
    if not found and claimed is None:
        beside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else "a file"
        own = path.resolve()
        runs = sorted(run.name for run in own.parent.glob("*_chkpt") if run.name.startswith(f"{own.name}--"))
        raise ValueError(
            f"{path} is nothing that can be verified: expected config.json of model_type openvla or spatialvla, "
            f"lora_adapter/, VGGT's model.pt, or dataset_info.json; found {beside or 'an empty folder'}"
            + (f". The checkpoints of this run lie beside it: {', '.join(runs)}" if runs else "")
        )
    if found and claimed is not None and claimed not in found:
        raise ValueError(
            f"{path} is of the kind {KINDS[found[0]].title!r}, the id that it is compared with of "
            f"{KINDS[claimed].title!r}; --id none compares it with no id"
        )
    return claimed or found[0]
