"""Check a checkpoint or dataset and write one page about it that can be pasted into an issue.

    python scripts/verify_checkpoint.py openvla/openvla-7b
    python scripts/verify_checkpoint.py runs/my_run--10000_chkpt --output page.md
    python scripts/verify_checkpoint.py ckpts/vggt/model.pt --no_forward

Files, tensors, statistics and tokens against what is known of the published id or demanded by the architecture, then
a prediction on a real observation and on a black one. Policies of OpenVLA, OFT, Spatial-Forcing and SpatialVLA (merged
or as adapters), VGGT and RLDS datasets. Exit code: 0 nothing differs, 1 something does, 2 wrong input.
"""

import sys
from dataclasses import dataclass
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


def main(cfg: VerifyConfig) -> None:
    from prismo.verify import Options, page, verify  # noqa: PLC0415 (heavy; --help needs none of it)

    options = Options(cfg.base_checkpoint, cfg.unnorm_key, cfg.device, forward=not cfg.no_forward)
    report = verify(cfg.source, options, cfg.id)
    text = page(report, ("scripts/verify_checkpoint.py", *(part for part in sys.argv[1:] if part != "--source")))
    if cfg.output is not None:
        cfg.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    sys.exit(int(report.differs))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--source")
    sys.exit(run_command(main, VerifyConfig))
