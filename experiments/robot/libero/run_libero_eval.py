"""Evaluate a policy in LIBERO.

    python experiments/robot/libero/run_libero_eval.py \
        --pretrained_checkpoint runs/...--150000_chkpt --task_suite_name libero_spatial

The kind of policy (head, images, proprio, crop, attention) is read from the checkpoint. A stopped evaluation goes on
with the same command. Ends with 0, with 1 if episodes ended in errors, with 2 if something was wrong before the first
or results could not be written.
"""

import sys

from prismo.eval.config import EvalConfig
from prismo.eval.run import RepeatedError, prepare
from prismo.models.openvla import SelfTestError
from prismo.sim import SimulatorError
from prismo.sim.gl import GLUnavailableError
from prismo.util.cli import log_error, set_up_logging
from prismo.util.flags import parse_flags
from prismo.util.processes import sigterm_as_exit

_WRONG_INPUT = (ValueError, OSError, ModuleNotFoundError, SelfTestError, SimulatorError, GLUnavailableError)


def main() -> int:
    set_up_logging()
    with sigterm_as_exit():
        return _evaluate()


def _evaluate() -> int:
    try:
        with prepare(parse_flags(EvalConfig)) as evaluation:
            summary = evaluation.run()
    except RepeatedError as error:
        log_error(error)
        return 1
    except _WRONG_INPUT as error:
        log_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if summary.total.errors else 0


if __name__ == "__main__":
    sys.exit(main())
