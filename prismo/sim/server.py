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

from prismo.sim.interface import Simulator, SimulatorError
from prismo.sim.messages import LONGEST, decode, encode
from prismo.util.processes import end_with


def serve(start: Callable[..., Simulator]) -> None:
    """Serve requests on the pipe that the command line names until the parent is gone.

    Args:
        start: makes the simulator from the options of the `SimWorker`; called once.
    """
    end_with(int(sys.argv[2]), by_kernel=sys.argv[3] == "main")
    pipe, simulator = Connection(int(sys.argv[1])), None

    def answer(command: str, arguments: dict[str, Any]) -> Any:
        nonlocal simulator
        if command == "start":
            simulator = start(**arguments)
            return None
        if command.startswith("_"):
            raise SimulatorError(f"a simulator has no command {command!r}")
        return getattr(simulator, command)(**arguments)

    while True:
        try:
            command, arguments = decode(pipe.recv_bytes(LONGEST))
        except (EOFError, OSError):
            return
        try:
            message = encode(["ok", answer(command, arguments)])
        except SimulatorError as error:
            message = encode(["error", str(error)])
        except Exception:
            message = encode(["error", traceback.format_exc()])
        try:
            pipe.send_bytes(message)
        except OSError:
            return
