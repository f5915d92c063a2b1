"""LIBERO simulators in their own processes: `SimWorker` for policies, a scripted expert, HDF5 demonstrations.

Nothing in this package imports MuJoCo, robosuite or LIBERO before a function of `prismo.sim.libero` runs, so the
process that holds a model can import it freely (TensorFlow and Mesa crash each other in one process, and EGL beside
CUDA inference has been seen to abort).
"""

from prismo.sim.interface import Observation, SimulatorCrashed, SimulatorError, SimulatorTimeout, StepResult
from prismo.sim.suites import MAX_STEPS, SUITES, Task, load_init_states, load_task, load_tasks
from prismo.sim.worker import SimWorker

__all__ = [
    "MAX_STEPS",
    "SUITES",
    "Observation",
    "SimWorker",
    "SimulatorCrashed",
    "SimulatorError",
    "SimulatorTimeout",
    "StepResult",
    "Task",
    "load_init_states",
    "load_task",
    "load_tasks",
]
