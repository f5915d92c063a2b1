"""Evaluate a policy in LIBERO.

    python experiments/robot/libero/run_libero_eval.py \
        --pretrained_checkpoint runs/...--150000_chkpt --task_suite_name libero_spatial

The kind of policy (head, images, proprio, crop, attention) is read from the checkpoint. A stopped evaluation goes on
with the same command. Ends with 0, with 1 if episodes ended in errors, with 2 if something was wrong before the first.
"""

import logging
import sys

from prismo.eval.config import EvalConfig
from prismo.eval.run import prepare
from prismo.models.openvla import SelfTestError
from prismo.sim import SimulatorError
from prismo.sim.gl import GLUnavailableError
from prismo.util.flags import parse_flags

_WRONG_INPUT = (ValueError, OSError, ModuleNotFoundError, SelfTestError, SimulatorError, GLUnavailableError)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        evaluation = prepare(parse_flags(EvalConfig))
    except _WRONG_INPUT as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    with evaluation:
        try:
            summary = evaluation.run()
        except KeyboardInterrupt:
            return 130
    return 1 if summary.total.errors else 0


if __name__ == "__main__":
    sys.exit(main())
