"""Merge the LoRA adapter of a fine-tuning run into its base model.

    prismo merge \\
        --base_checkpoint openvla/openvla-7b \\
        --lora_finetuned_checkpoint_dir runs/...--10000_chkpt

The merged weights are written beside `lora_adapter/`, or to `--output`. No GPU is needed, memory stays small, and the
result is compared with base + adapter before it appears, with a model card (README.md) unless you have written one.
`--push_to_hub ORG/NAME` then uploads it, as a private repository. Ends with 2 if something was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prismo.util.cli import run_command
from prismo.util.upload import check_upload, upload


@dataclass
class MergeConfig:
    # Model that the adapter was trained on: folder or hub id. Adapters of this project know it to the last byte; of
    # earlier versions by the first 4,096 bytes of every tensor; of the original at most by its lm_head
    # (`hf cache verify openvla/openvla-7b` compares a downloaded base with the hub)
    base_checkpoint: str
    # Checkpoint folder that holds lora_adapter/
    lora_finetuned_checkpoint_dir: Path
    # Folder for the merged checkpoint; default: the checkpoint folder itself
    output: Path | None = None
    # Replace merged weights that are already there
    overwrite: bool = False
    # Upload the merged checkpoint to this repository of the Hugging Face hub (ORG/NAME; `hf auth login` first)
    push_to_hub: str | None = None
    # Create that repository as a private one (one that is there stays what it is)
    hub_private: bool = True


def run(cfg: MergeConfig) -> None:
    from prismo.merging.merge import merge
    from prismo.merging.publish import merged_files

    if cfg.push_to_hub is not None:
        check_upload(cfg.push_to_hub, private=cfg.hub_private)
    checkpoint = cfg.lora_finetuned_checkpoint_dir
    report = merge(cfg.base_checkpoint, checkpoint, cfg.output, overwrite=cfg.overwrite, hub_id=cfg.push_to_hub)
    size = f"{report.bytes / 1e9:.1f} GB" if report.bytes >= 1e8 else f"{report.bytes / 1e6:.1f} MB"
    print(
        f"{report.folder} is complete: {report.adapted_tensors} weights merged, {report.copied_tensors} copied "
        f"({size}, {report.seconds:.0f} s). Read back and compared: every weight is base + adapter, rounded once."
    )
    if cfg.push_to_hub is not None:
        address = upload(cfg.push_to_hub, report.folder, merged_files(report.folder), private=cfg.hub_private)
        print(f"uploaded to {address}")


main = partial(run_command, run, MergeConfig)
