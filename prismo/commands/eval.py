"""Evaluate a policy in LIBERO, or in another benchmark.

    prismo eval --pretrained_checkpoint runs/...--150000_chkpt --task_suite_name libero_spatial

The kind of policy (head, images, proprio, crop, attention) is read from the checkpoint. A stopped evaluation goes on
with the same command. Ends with 0, with 1 if episodes ended in errors, with 2 if something was wrong before the first
or results could not be written.
"""

from __future__ import annotations

from functools import partial

from prismo.eval.benchmark import benchmark_of
from prismo.eval.config import EvalConfig
from prismo.util.cli import run_command


def run(cfg: EvalConfig) -> int:
    benchmark_of(cfg)
    from prismo.eval.run import evaluate

    return 1 if evaluate(cfg).total.errors else 0


main = partial(run_command, run, EvalConfig)
