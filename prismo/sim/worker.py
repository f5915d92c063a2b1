"""`SimWorker`: a simulator in its own process, with time-outs and restart. What evaluation talks to.

This side imports nothing of a simulator, so that the process with the model stays free of OpenGL, and a benchmark may
live in another environment than the policy.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import numpy as np

import prismo
from prismo.sim.interface import (
    SETTLE_STEPS,
    Observation,
    Render,
    SimInfo,
    SimulatorCrashed,
    SimulatorError,
    SimulatorTimeout,
    StepResult,
)
from prismo.sim.messages import LONGEST, MessageError, decode, encode

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOG_TAIL_LINES = 15
_GRACE_S = 3.0


@dataclass(frozen=True)
class _Running:
    """The process while it lives, our end of its pipe, and what it has printed."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    output: IO[bytes]


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """How a process that no longer answers has ended."""
    try:
        code = process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        return "it closed its pipe"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


class SimWorker:
    """A simulator process, started at the first `reset` and again at the `reset` after it died or hung.

    An episode is a function of (task, initial state, seed, actions), so repeating a lost one gives the same episode.
    Use it as a context manager, or call `close`. Not thread-safe; use one worker per thread.

    Args:
        module: to be run as the simulator (`prismo.sim.server`).
        options: arguments of what the module serves; JSON types, paths and dataclasses of them.
        action_dim: numbers in an action.
        python: interpreter of an environment that holds the simulator, numpy, and prismo (or PYTHONPATH leads to it);
            default: this one.

    Attributes:
        reset_timeout: seconds for a reset; building a scene takes 1 to 5, on a loaded machine much more.
        step_timeout: seconds for a chunk of actions, plus `step_timeout / 10` per action.
    """

    reset_timeout = 300.0
    step_timeout = 60.0

    def __init__(
        self, module: str, options: Mapping[str, Any], *, action_dim: int, python: str | Path | None = None
    ) -> None:
        self._module, self._options, self._python = module, dict(options), python
        self._action_dim = action_dim
        self._running: _Running | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> SimInfo:
        """Assets, renderer and versions, for result files; starts the process."""
        return self._read(SimInfo, "info", self.request("info", self.reset_timeout))

    @property
    def pid(self) -> int | None:
        """Process id, None while none runs."""
        return self._running.process.pid if self._running else None

    def reset(
        self, suite: str, task_id: int, init_state: int | np.ndarray, *, seed: int = 0, settle_steps: int = SETTLE_STEPS
    ) -> Observation:
        """Start an episode and let the objects come to rest.

        Args:
            suite: group of tasks, e.g. "libero_object".
            task_id: 0-based index in the suite.
            init_state: index among the benchmark's initial states, or one as float64 (LIBERO: [1 + nq + nv]).
            seed: for what initial states leave open (LIBERO: the poses of cabinets, stoves and racks). Vary it per
                episode to sample as the benchmark does.
            settle_steps: control steps without motion before the first observation.

        Raises:
            SimulatorError: wrong task or state, or a scene that cannot be built; the worker stays usable.
            SimulatorCrashed, SimulatorTimeout: the process is gone; the next `reset` starts a new one.
        """
        arguments = {"suite": suite, "task_id": task_id, "init_state": init_state, "seed": seed}
        answer = self.request("reset", self.reset_timeout, **arguments, settle_steps=settle_steps)
        return self._read(Observation, "reset", answer)

    def step_chunk(self, actions: np.ndarray, render: Render = "last") -> StepResult:
        """Execute actions until the task succeeds or they end.

        Args:
            actions: float [n, action_dim]. LIBERO: six end-effector deltas in [-1, 1] (5 cm, 0.5 rad at 1); gripper -1
                open, +1 close.
            render: "last" draws only the observation that is returned, "all" every step (frames for a video),
                "all_views" that with all cameras, "none" nothing.

        Raises:
            ValueError: wrong shape, or numbers that are not finite.
            SimulatorError: no episode is running; after SimulatorCrashed or SimulatorTimeout start it again with
                `reset`.
        """
        actions = np.asarray(actions, dtype=np.float64)
        shaped = actions.ndim == 2 and actions.shape[1] == self._action_dim and len(actions) > 0
        if not shaped or not np.isfinite(actions).all():
            raise ValueError(
                f"expected finite actions of shape [n, {self._action_dim}], found shape {actions.shape}"
                f"{'' if np.isfinite(actions).all() else ' with NaN or infinity'}"
            )
        timeout = self.step_timeout * (1 + len(actions) / 10)
        answer = self._call("step_chunk", timeout, actions=actions, render=render)
        if isinstance(answer, dict) and "observation" in answer:
            answer["observation"] = self._read(Observation, "step_chunk", answer["observation"])
        return self._read(StepResult, "step_chunk", answer)

    def request(self, command: str, timeout: float, **arguments: Any) -> Any:
        """Any public method of the simulator, e.g. a whole episode of LIBERO's expert (`prismo.sim.libero_server`)."""
        self.start()
        return self._call(command, timeout, **arguments)

    def start(self) -> None:
        """Start the process unless it runs."""
        if self._running is not None:
            return
        pipe, child = multiprocessing.Pipe()
        output = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # Not multiprocessing's spawn: that would run the caller's main script (torch, perhaps TensorFlow) in the child.
        environment = os.environ | {"PYTHONSAFEPATH": "1"}  # a folder `libero` where the user stands hides no package
        if self._python is None:  # the child imports the same `prismo` as this process
            paths = [str(Path(prismo.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        interpreter = str(self._python or sys.executable)
        # The kernel ends a process with the *thread* that it was started by.
        starter = "main" if threading.current_thread() is threading.main_thread() else "thread"
        process = subprocess.Popen(
            [interpreter, "-m", self._module, str(child.fileno()), str(os.getpid()), starter],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[child.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent, which then closes the worker
        )
        child.close()
        self._running = _Running(process, pipe, output)
        self._call("start", self.reset_timeout, **self._options)

    def _call(self, command: str, timeout: float, **arguments: Any) -> Any:
        running = self._running
        if running is None:
            raise SimulatorError("no episode is running: call reset first")
        try:
            running.pipe.send_bytes(encode([command, arguments]))
            if not running.pipe.poll(timeout):
                tail = self._kill()
                raise SimulatorTimeout(f"the simulator did not answer {command!r} within {timeout:.0f} s{tail}")
            status, result = decode(running.pipe.recv_bytes(LONGEST))
        except MessageError as error:
            raise SimulatorError(f"the simulator answered {command!r} with {error}{self._kill()}") from error
        except (EOFError, OSError) as error:
            code = _end_of(running.process)
            raise SimulatorCrashed(f"the simulator died during {command!r} ({code}){self._kill()}") from error
        except KeyboardInterrupt:
            self._kill()  # its answer would be taken for that of the next call
            raise
        if status == "error":
            raise SimulatorError(result)
        return result

    def _read(self, kind: type[T], command: str, answer: Any) -> T:
        """An answer as one of the dataclasses of `prismo.sim.interface`."""
        try:
            return kind(**answer)
        except (TypeError, ValueError, AttributeError) as error:
            raise SimulatorError(f"{self._module} answered {command!r} with no {kind.__name__}: {error}") from error

    def _kill(self) -> str:
        """Make sure that the process is gone; return the end of its output for an error message."""
        running, self._running = self._running, None
        if running is None:
            return ""
        running.process.kill()
        running.process.wait()
        running.pipe.close()
        running.output.seek(0)
        lines = running.output.read().decode(errors="replace").strip().splitlines()[-_LOG_TAIL_LINES:]
        running.output.close()
        return "; its last output:\n" + "\n".join(lines) if lines else ""

    def interrupt(self) -> None:
        """From another thread: kill the process; the call that waits for it raises SimulatorCrashed."""
        running = self._running
        if running is not None:
            running.process.kill()

    def close(self) -> None:
        """End the process; a later `reset` starts a new one."""
        running = self._running
        if running is None:
            return
        running.pipe.close()  # the child leaves at the end of its input
        try:
            running.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            log.debug("simulator %d did not leave by itself", running.process.pid)
        self._kill()
