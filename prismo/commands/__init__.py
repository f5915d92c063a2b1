"""The commands: one module each with its flags and a `main`. `prismo <name>` finds it in `COMMANDS`.

A module holds what parsing needs and imports the rest when it runs, so that `--help` and a typo are answered at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from prismo import __version__
from prismo.util.text import nearest

# Name (of one word, or of two: a group and what to do) -> module and what it does. A new command is one line.
COMMANDS = {
    "train": ("train", "fine-tune a policy and align it with a teacher (vla-scripts/finetune_align.py)"),
    "finetune": ("finetune", "fine-tune a policy without a teacher (vla-scripts/finetune.py)"),
    "merge": ("merge", "merge a run's LoRA adapter into its base (vla-scripts/merge_lora_weights_and_save.py)"),
    "eval": ("eval", "roll a policy out in LIBERO (experiments/robot/libero/run_libero_eval.py)"),
    "verify": ("verify", "is a checkpoint or dataset what it should be: one page (scripts/verify_checkpoint.py)"),
    "report": ("report", "what a run left, its curves, and what to type next"),
    "doctor": ("doctor", "check this machine before a long run"),
    "demo": ("demo", "the whole chain at a small size, without GPU and downloads"),
    "tiny": ("tiny", "write tiny random checkpoints in the published layouts"),
    "data show": ("data_show", "look at an episode, as a picture or as a film"),
    "data stats": ("data_stats", "normalisation statistics as a table and as histograms"),
    "data build": ("data_build", "an RLDS dataset from HDF5 demonstrations"),
    "data synthetic": ("data_synthetic", "a small made-up LIBERO dataset, to try things with"),
    "data regenerate": ("data_regenerate", "LIBERO's human demonstrations at 256 pixels, without no-ops"),
    "data collect": ("data_collect", "demonstrations of a scripted expert"),
    "data gaussians": ("data_gaussians", "SpatialVLA's action bins for a dataset"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command: finds the command in the first words and hands it the rest. Returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(""))
        return 0
    for words in (1, 2):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            module = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")
            return module.main(arguments[words:])
    group = f"{arguments[0]} "
    if any(name.startswith(group) for name in COMMANDS):
        asked_for_help = arguments[1:2] in ([], ["-h"], ["--help"])
        print(_overview(group), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else _unknown(" ".join(arguments[:2]))
    return _unknown(arguments[0])


def _unknown(name: str) -> int:
    close = nearest(name, list(COMMANDS), count=2)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    print(f"ERROR unknown command {name!r}.{hint} `prismo --help` lists all", file=sys.stderr)
    return 2


def _overview(group: str) -> str:
    width = max(len(name) for name in COMMANDS)
    rows = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items() if name.startswith(group)]
    usage = f"prismo {group}<command> --flag value ...".replace("  ", " ")
    return "\n".join([usage, "", *rows, "", f"prismo {group}<command> --help lists its flags."])
