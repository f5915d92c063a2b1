"""What is verified, and with which flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prismo.verify.facts import Facts, Published


@dataclass(frozen=True)
class Options:
    """The user's choices.

    Attributes:
        base_checkpoint: base model of an unmerged checkpoint.
        unnorm_key: statistics to predict with.
        device: to predict on; None takes the first GPU, else the CPU.
        forward: load the model and predict.
    """

    base_checkpoint: str | None = None
    unnorm_key: str | None = None
    device: str | None = None
    forward: bool = True


@dataclass(frozen=True)
class Subject:
    """A checkpoint or dataset.

    Attributes:
        source: as the user named it.
        path: its folder, or its file.
        name: the published id that it is compared with, None = what its own files say.
        alone: the user wants no published id.
        facts: what is known.
        options: the user's choices.
    """

    source: str
    path: Path
    name: str | None
    facts: Facts
    options: Options
    alone: bool = False

    @property
    def known(self) -> Published | None:
        return None if self.name is None else self.facts.get(self.name)
