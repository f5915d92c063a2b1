"""Check a checkpoint or dataset and write one page about it that can be pasted into an issue.

    prismo verify openvla/openvla-7b
    prismo verify runs/my_run--10000_chkpt --output page.md
    prismo verify ckpts/vggt/model.pt --id facebook/VGGT-1B --no_forward

Files, tensors, statistics and tokens against what is known of the published id or demanded by the architecture, then
a prediction on a real observation and on a black one. Policies of OpenVLA, OFT, Spatial-Forcing and SpatialVLA (merged
or as adapters), VGGT and RLDS datasets. Exit code: 0 nothing differs, 1 something does, 2 wrong input.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command


@dataclass
class VerifyConfig:
    # Folder, file or Hugging Face hub id (fetched if need be); may stand first, without the flag
    source: str
    # Published id to compare with, "none" for none. Default: the hub id, or the one that the folder is named after
    id: str | None = None
    # Base model of an unmerged checkpoint (folder with lora_adapter/). Default: the one its adapter names
    base_checkpoint: str | None = None
    # Statistics to predict with. Default: those of the published id, else LIBERO's
    unnorm_key: str | None = None
    # Device to predict on, e.g. "cuda:1". Default: the first GPU, else the CPU
    device: str | None = None
    # Look at the files only, load no model
    no_forward: bool = False
    # File for the page, which is printed anyway
    output: Path | None = None


def run(cfg: VerifyConfig) -> int:
    from prismo.util.files import atomic_write
    from prismo.verify import Options, page, verify

    options = Options(cfg.base_checkpoint, cfg.unnorm_key, cfg.device, forward=not cfg.no_forward)
    report = verify(cfg.source, options, cfg.id)
    given = {f"--{name}": str(value) for name, value in vars(cfg).items() if name != "source" and value}
    text = page(report, ("prismo", "verify", cfg.source, *itertools.chain(*given.items())))
    if cfg.output is not None:
        with atomic_write(cfg.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return int(report.differs)


main = partial(run_command, run, VerifyConfig, first="source")
