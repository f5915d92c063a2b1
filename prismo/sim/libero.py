"""One LIBERO task as an environment in this process: reset to an initial state, step, observe.

Runs inside simulator processes, after `prismo.sim.libero_server.prepare_process`: LIBERO asks questions when it is
imported, and MuJoCo decides then how to draw. Policies go through `prismo.sim.worker.SimWorker`. Only one environment
may be alive per process: robosuite never makes its GL context current again, so two of them silently draw each other's
pictures.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from prismo.embodiment import LIBERO
from prismo.sim.assets import Assets
from prismo.sim.interface import SETTLE_STEPS, Observation, SimulatorError
from prismo.sim.suites import LiberoTask

AGENT_CAMERA, WRIST_CAMERA = CAMERAS = LIBERO.cameras
# States that OpenVLA-OFT's LIBERO checkpoints expect, in this order: end-effector position (m), its orientation as
# axis-angle (rad), two finger positions (m).
STATES = LIBERO.states

# Gripper command of an action: LIBERO's -1 opens, +1 closes.
GRIPPER_OPEN = -1.0
GRIPPER_CLOSE = 1.0
# Sent while the objects fall to rest after a reset: no motion, gripper open.
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, GRIPPER_OPEN)
ACTION_DIM = len(SETTLE_ACTION)

_RESET_ATTEMPTS = 20


class LiberoEnv:
    """A task's scene, goal and robot (Panda, OSC_POSE at 20 Hz).

    An episode is a function of (task, initial state, seed, actions), bit for bit, whatever ran in this environment
    before. (`seed` draws the poses of cabinets, stoves and racks, which initial states do not hold.)

    Args:
        task: from `prismo.sim.suites.load_task`.
        assets: meshes and textures.
        image_size: height and width of both cameras.
        cameras: without them no GL context is made, and creating the environment is faster.

    Raises:
        SimulatorError: the scene could not be built, e.g. because asset files are missing.
    """

    def __init__(self, task: LiberoTask, assets: Assets, *, image_size: int = 256, cameras: bool = True) -> None:
        import libero.libero  # noqa: PLC0415 (imports MuJoCo, like everything of LIBERO and robosuite)

        self.task = task
        self.cameras = cameras
        self._wanted: frozenset[str] = frozenset()
        self._observations: dict[str, np.ndarray] = {}
        self._drawn: frozenset[str] = frozenset()
        # LIBERO ignores the assets folder of its own configuration; it would download to the home folder instead.
        libero.libero._assets_path_cache = str(assets.folder)
        try:
            self.raw: Any = self._build(image_size)
        except SimulatorError:
            raise
        except Exception as error:
            raise SimulatorError(
                f"could not build {task.suite} task {task.index} ({task.language!r}) from the {assets.source} assets "
                f"in {assets.folder}: {type(error).__name__}: {error}"
            ) from error

    def _build(self, image_size: int) -> Any:
        """The robosuite environment with LIBERO's settings."""
        import robosuite  # noqa: PLC0415
        from libero.libero.envs import TASK_MAPPING  # noqa: PLC0415
        from libero.libero.envs.bddl_utils import get_problem_info  # noqa: PLC0415

        problem = TASK_MAPPING[get_problem_info(str(self.task.bddl_file))["problem_name"]]
        create = functools.partial(
            self._with_gated_cameras(problem, image_size),
            str(self.task.bddl_file),
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default",
            initialization_noise=None,
            use_camera_obs=self.cameras,
            has_renderer=False,
            has_offscreen_renderer=self.cameras,
            control_freq=20,
            ignore_done=True,  # the caller counts steps; robosuite would raise after its own horizon
            # A hard reset compiles the scene again (1 s) and makes episodes depend on how many there were before.
            hard_reset=False,
            camera_names=list(CAMERAS),
            camera_heights=image_size,
            camera_widths=image_size,
        )
        return self._placed(create)

    def _placed(self, attempt: Callable[[], Any]) -> Any:
        """Run `attempt`, again if no free place was found for the objects (LIBERO itself would retry for ever)."""
        from robosuite.utils.errors import RandomizationError  # noqa: PLC0415

        for _ in range(_RESET_ATTEMPTS):
            try:
                return attempt()
            except RandomizationError:
                continue
        raise SimulatorError(f"no free place for the objects of {self.task.name} in {_RESET_ATTEMPTS} attempts")

    def _with_gated_cameras(self, problem: Any, image_size: int) -> type:
        """`problem` with cameras that draw only when `self._wanted` names them.

        robosuite samples observations inside a control step, a little before its end. Gating the sensor, rather than
        drawing after the step, keeps pictures and state of that same instant, equal to those of the training data.
        """
        blank = np.zeros((image_size, image_size, 3), dtype=np.uint8)

        def gate(sensor: Callable, camera: str) -> Callable:
            @functools.wraps(sensor)
            def gated(cache: dict) -> np.ndarray:
                return sensor(cache) if camera in self._wanted else blank

            return gated

        def create_sensors(env: Any, cam_name: str, *args: Any, **kwargs: Any) -> tuple[list, list]:
            sensors, names = problem._create_camera_sensors(env, cam_name, *args, **kwargs)
            return [gate(sensor, cam_name) for sensor in sensors], names

        # LIBERO compares the class's name with the one in the BDDL file.
        return type(problem.__name__, (problem,), {"_create_camera_sensors": create_sensors})

    def reset(
        self, init_state: np.ndarray, *, seed: int, settle_steps: int = SETTLE_STEPS, draw: tuple[str, ...] = CAMERAS
    ) -> None:
        """Start an episode from `init_state` and let the objects come to rest.

        Args:
            init_state: float64 [1 + nq + nv]: time, positions, velocities.
            seed: for what `init_state` leaves open (poses of fixtures).
            settle_steps: control steps without motion, gripper open.
            draw: cameras to draw at the end.

        Raises:
            SimulatorError: `init_state` belongs to another scene.
        """
        expected = 1 + self.raw.sim.model.nq + self.raw.sim.model.nv
        if np.shape(init_state) != (expected,):
            raise SimulatorError(
                f"an initial state of {self.task.name} has {expected} numbers; found shape {np.shape(init_state)}: "
                f"it belongs to another task"
            )
        np.random.seed(seed)
        self._placed(self.raw.reset)
        # robosuite 1.4.0 keeps the gripper's last command across resets.
        gripper = self.raw.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        self.raw.sim.set_state_from_flattened(np.asarray(init_state))
        self.raw.sim.forward()
        self.raw._check_success()
        self.raw._post_process()
        self._update(draw if settle_steps == 0 else (), self.raw._get_observations, force_update=True)
        for remaining in reversed(range(settle_steps)):
            self.step(np.array(SETTLE_ACTION), draw=() if remaining else draw)

    def step(self, action: np.ndarray, draw: tuple[str, ...] = CAMERAS) -> bool:
        """Execute one action (six deltas in [-1, 1]; gripper -1 open, +1 close); return whether the goal holds."""
        return bool(self._update(draw, self.raw.step, action)[2])

    def _update(self, draw: tuple[str, ...], advance: Callable, *args: Any, **kwargs: Any) -> Any:
        """Let robosuite sample its observables while the cameras in `draw` are open."""
        self._wanted = self._drawn = frozenset(draw) if self.cameras else frozenset()
        try:
            result = advance(*args, **kwargs)
        finally:
            self._wanted = frozenset()
        self._observations = result[0] if isinstance(result, tuple) else result
        return result

    def draw_now(self) -> None:
        """Draw both cameras for `observe` although the last step did not (for the last frame of an episode)."""
        self._update(CAMERAS, self.raw._get_observations, force_update=True)

    def observe(self) -> Observation:
        """The observation of the last step; pictures only of the cameras that it drew."""
        images = {camera: view for camera in CAMERAS if (view := self.image(camera)) is not None}
        states = (self.eef_pos, quat_to_axis_angle(self.eef_quat), self.gripper_qpos)
        return Observation(images, dict(zip(STATES, states, strict=True)), self.task.language)

    def image(self, camera: str) -> np.ndarray | None:
        """uint8 [H, W, 3] of the last step, turned by 180 degrees (OpenGL's first row is the bottom)."""
        if camera not in self._drawn:
            return None
        return np.ascontiguousarray(self._observations[f"{camera}_image"][::-1, ::-1])

    @property
    def eef_pos(self) -> np.ndarray:
        """End effector, m, world frame: float64 [3]."""
        return self._observations["robot0_eef_pos"]

    @property
    def eef_quat(self) -> np.ndarray:
        """Orientation of the end effector as (x, y, z, w): float64 [4]."""
        return self._observations["robot0_eef_quat"]

    @property
    def gripper_qpos(self) -> np.ndarray:
        """Finger positions, m: about (0.04, -0.04) open, (0, 0) closed."""
        return self._observations["robot0_gripper_qpos"]

    @property
    def joint_pos(self) -> np.ndarray:
        """Arm joints, rad: float64 [7]."""
        return self._observations["robot0_joint_pos"]

    def object_poses(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Position (m) and quaternion (w, x, y, z) of every movable object, world frame, by its name in the scene."""
        data = self.raw.sim.data
        bodies = {name: self.raw.obj_body_id[name] for name in self.raw.objects_dict}
        return {name: (data.body_xpos[body].copy(), data.body_xquat[body].copy()) for name, body in bodies.items()}

    def sim_state(self) -> np.ndarray:
        """Time, positions, velocities as an initial state holds them: float64 [1 + nq + nv]."""
        return self.raw.sim.get_state().flatten()

    def close(self) -> None:
        """Free the scene and its GL context, so that this process may make another environment."""
        self._observations = {}
        self.raw.close()
        self.raw = None
        gc.collect()


def quat_to_axis_angle(quat: np.ndarray) -> np.ndarray:
    """(x, y, z, w) to axis times angle (rad, 0 to 2 pi), as the training data has it: no sign is made canonical."""
    w = np.clip(quat[3], -1.0, 1.0)
    norm = np.sqrt(1.0 - w * w)
    if norm == 0.0:
        return np.zeros(3)
    return quat[:3] * 2.0 * np.arccos(w) / norm
