"""The simulator's end of the pipe: answers `prismo.sim.worker.SimWorker` until that is gone.

A simulator is a module that can be run: `python -m MODULE <file descriptor> <parent> main|thread`. Its last lines are

    if __name__ == "__main__":
        serve(MySimulator)

Each request is [command, arguments]; each answer is ["ok", result] or ["error", message]. An error leaves the process
usable.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from prismo.sim.interface import SimulatorError
from prismo.sim.messages import LONGEST, decode, encode
from prismo.util.processes import end_with


def serve(start: Callable[..., Any]) -> None:
    """Serve requests on the pipe that the command line names until the parent is gone.

    Args:
        start: makes the simulator from the options of the `SimWorker`; called once. A simulator has the methods
            `info() -> SimInfo`, `reset(suite, task_id, init_state, seed, settle_steps) -> Observation` and
            `step_chunk(actions, render) -> StepResult`, whose arguments are those of `SimWorker`; other public methods
            can be called by `SimWorker.request`.
    """
    end_with(int(sys.argv[2]), by_kernel=sys.argv[3] == "main")
    pipe, simulator = Connection(int(sys.argv[1])), None
    while True:
        try:
            command, arguments = decode(pipe.recv_bytes(LONGEST))
        except (EOFError, OSError):
            return
        try:
            if command.startswith("_"):
                raise SimulatorError(f"a simulator has no command {command!r}")
            if command == "start":
                simulator, result = start(**arguments), None
            else:
                result = getattr(simulator, command)(**arguments)
            message = encode(["ok", result])
        except SimulatorError as error:
            message = encode(["error", str(error)])
        except Exception:
            message = encode(["error", traceback.format_exc()])
        try:
            pipe.send_bytes(message)
        except OSError:
            return
