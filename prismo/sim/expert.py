"""A scripted expert that picks and places with the simulator's own knowledge of poses.

It makes demonstrations where none can be downloaded, and tells whether a simulator (assets, stand-ins, versions) lets
a competent policy succeed. Used by `prismo data collect` through the simulator process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prismo.sim.demos import Demo, Recorder
from prismo.sim.interface import SimulatorError
from prismo.sim.libero import CAMERAS, GRIPPER_CLOSE, GRIPPER_OPEN, LiberoEnv
from prismo.sim.suites import MAX_STEPS
from prismo.util.extras import need

# What the controller does with an action of 1: metres and radians.
_POSITION_SCALE, _ROTATION_SCALE = 0.05, 0.5
# Panda's gripper, m: usable opening; how far the fingertips reach below the grip site; from there up to the palm.
_OPENING, _FINGERTIP, _PALM = 0.074, 0.011, 0.030
_CLEARANCE = 0.03
_SLEW = 0.25  # largest change of an action component from one step to the next, as a hand on a joystick does
_GRASP_ATTEMPTS = 3
_PHASE_LIMIT = 60
_RIM_DEPTH, _RIM_WIDTH = 0.018, 0.004  # m: where to hold a bowl by its rim
UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Phase:
    """A stretch of the motion: go to `target` until it is reached within `tolerance` and `steps` have passed."""

    name: str
    target: np.ndarray
    gripper: float
    speed: float = 0.9  # largest norm of the translation part of an action
    tolerance: float = 0.008  # m
    steps: int = 0
    noise: float = 1.0  # share of the exploration noise


class Scene:
    """Poses and extents read from the simulator.

    Args:
        env: reset environment of a pick-and-place task.

    Raises:
        SimulatorError: the task's goal is not one "In" or "On" relation of a movable object.
    """

    def __init__(self, env: LiberoEnv) -> None:
        self._raw = env.raw
        goals = self._raw.parsed_problem["goal_state"]
        if len(goals) != 1 or len(goals[0]) != 3 or goals[0][0] not in ("in", "on"):
            raise SimulatorError(f"the expert can only pick and place one object; {env.task.name} wants {goals}")
        self.relation, self.item, self.place = goals[0]

    def position(self, name: str) -> np.ndarray:
        """Origin of an object, or centre of a region, m."""
        if name in self._raw.obj_body_id:
            return self._raw.sim.data.body_xpos[self._raw.obj_body_id[name]].copy()
        return np.array(self._raw.sim.data.get_site_xpos(name))

    def distance_to_others(self, point: np.ndarray) -> float:
        """Horizontal distance of a point to the nearest other object or fixture, m."""
        others = [self.position(name) for name in self._raw.obj_body_id if name != self.item]
        return min(float(np.linalg.norm((other - point)[:2])) for other in others)

    def travel_height(self) -> float:
        """Height for the lower side of what is carried: above everything that can be knocked over, m."""
        tops = [self.span(name, UP)[1] for name in self._raw.objects_dict if name != self.item]
        return max(*tops, self.span(self.item, UP)[0]) + _CLEARANCE

    def release_height(self) -> float:
        """Height of the object's origin at which to let go, m: a little above the goal, it falls the rest."""
        if self.relation == "in":  # above the upper face of a box region
            half = self._raw.object_sites_dict[self.place].size
            axes = self._raw.sim.data.get_site_xmat(self.place)
            return float(self.position(self.place)[2] + np.abs(axes @ half)[2]) + 0.01
        return self.position(self.place)[2] + self.position(self.item)[2] - self.span(self.item, UP)[0] + 0.02

    def span(self, name: str, direction: np.ndarray, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
        """Extent [2] of an object along a unit vector, m, from its colliding geoms that reach into heights low..high.

        Raises:
            SimulatorError: none does.
        """
        model, data = self._raw.sim.model, self._raw.sim.data
        body = self._raw.obj_body_id[name]
        ranges = []
        for geom in range(model.ngeom):
            if model.body_rootid[model.geom_bodyid[geom]] != model.body_rootid[body] or not model.geom_contype[geom]:
                continue
            center, axes = data.geom_xpos[geom], data.geom_xmat[geom].reshape(3, 3)
            size, kind = model.geom_size[geom], model.geom_type[geom]
            vertical = _half_extent(kind, size, axes, np.array([0.0, 0.0, 1.0]))
            if center[2] + vertical < low or center[2] - vertical > high:
                continue
            half = _half_extent(kind, size, axes, direction)
            ranges.append((center @ direction - half, center @ direction + half))
        if not ranges:
            raise SimulatorError(f"{name} has nothing to grasp between {low:.3f} m and {high:.3f} m")
        return np.array([min(r[0] for r in ranges), max(r[1] for r in ranges)])


def _half_extent(kind: int, size: np.ndarray, axes: np.ndarray, direction: np.ndarray) -> float:
    """Half the extent of a box (MuJoCo's type 6) or cylinder (5) along a unit vector."""
    local = axes.T @ direction
    if kind == 6:
        return float(np.abs(local) @ size)
    if kind == 5:
        return float(size[0] * np.hypot(local[0], local[1]) + size[1] * abs(local[2]))
    raise SimulatorError(f"the expert knows boxes and cylinders, not MuJoCo's geom type {kind}")


def plan_grasp(scene: Scene, finger_axis: np.ndarray) -> np.ndarray:
    """Where to bring the grip site: across the object if it fits between the fingers, else over its rim.

    Args:
        scene: with the object at rest.
        finger_axis: horizontal unit vector along which the fingers close.

    Returns:
        float64 [3], m, world frame.
    """
    side = np.cross(UP, finger_axis)
    bottom, top = scene.span(scene.item, UP)
    height = max((bottom + top) / 2, top - _PALM, bottom + _FINGERTIP)
    across = scene.span(scene.item, finger_axis, height - _FINGERTIP, height + _FINGERTIP)
    if across[1] - across[0] < _OPENING:
        along = scene.span(scene.item, side, height - _FINGERTIP, height + _FINGERTIP)
        return finger_axis * across.mean() + side * along.mean() + UP * height
    height = top - _RIM_DEPTH
    rim = scene.span(scene.item, finger_axis, height, top) + np.array([_RIM_WIDTH, -_RIM_WIDTH])
    middle = scene.position(scene.item)
    points = [finger_axis * r + side * (middle @ side) + UP * height for r in rim]
    return max(points, key=scene.distance_to_others)


class Expert:
    """Reaches over the object, grasps it (again if it slipped), carries it over the goal and lets go.

    Args:
        env: reset environment.
        noise: standard deviation of the exploration noise on the six deltas, in action units (0.05 is 2.5 mm).
        rng: source of that noise.
    """

    def __init__(self, env: LiberoEnv, noise: float, rng: np.random.RandomState) -> None:
        self._env = env
        self._scene = Scene(env)
        self._noise, self._rng = noise, rng
        self._drift = np.zeros(6)
        self._previous = np.zeros(6)
        self._upright = _upright(env.eef_quat)
        self._phases = self._plan()
        self._phase, self._phase_steps = next(self._phases), 0

    def act(self) -> np.ndarray:
        """The next action, float64 [7] in [-1, 1]."""
        while self._finished(self._phase):
            following = next(self._phases, None)
            if following is None:
                break
            self._phase, self._phase_steps = following, 0
        phase = self._phase
        self._phase_steps += 1
        move = (phase.target - self._env.eef_pos) / _POSITION_SCALE
        move *= min(1.0, phase.speed / max(np.linalg.norm(move), 1e-9))
        turn = _rotation_vector(self._upright @ _matrix(self._env.eef_quat).T) / _ROTATION_SCALE
        # Noise that keeps its direction for some steps: a hand drifts, it does not tremble.
        self._drift = 0.8 * self._drift + 0.6 * self._rng.normal(0.0, self._noise, 6) * (1, 1, 1, 0.3, 0.3, 0.3)
        wish = np.concatenate([move, np.clip(turn, -0.3, 0.3)]) + phase.noise * self._drift
        wish = self._previous + np.clip(wish - self._previous, -_SLEW, _SLEW)
        self._previous = np.clip(wish, -1.0, 1.0)
        return np.append(self._previous, phase.gripper)

    def _finished(self, phase: Phase) -> bool:
        reached = float(np.linalg.norm(phase.target - self._env.eef_pos)) < phase.tolerance
        return self._phase_steps >= phase.steps and (reached or self._phase_steps >= _PHASE_LIMIT)

    def _plan(self) -> Iterator[Phase]:
        """Phases, each made when the one before is over, from what the scene is like then."""
        scene = self._scene
        for _ in range(_GRASP_ATTEMPTS):
            grasp = plan_grasp(scene, self._upright[:, 1])
            bottom, top = scene.span(scene.item, UP)
            above = np.array([grasp[0], grasp[1], max(top, grasp[2]) + 0.05])
            travel = scene.travel_height() + grasp[2] - bottom
            yield Phase("reach", np.array([*grasp[:2], max(above[2], min(travel, self._env.eef_pos[2]))]), GRIPPER_OPEN)
            yield Phase("approach", above, GRIPPER_OPEN, tolerance=0.006, noise=0.5)
            yield Phase("descend", grasp, GRIPPER_OPEN, speed=0.5, tolerance=0.004, noise=0.3)
            yield Phase("close", grasp, GRIPPER_CLOSE, steps=11, noise=0.3)
            yield Phase("lift", np.array([*grasp[:2], travel]), GRIPPER_CLOSE, noise=0.5, tolerance=0.02)
            if scene.span(scene.item, UP)[0] - bottom > 0.5 * (travel - grasp[2]):
                break
        hold = scene.position(scene.item) - self._env.eef_pos
        place = scene.position(scene.place) - hold
        yield Phase("carry", np.array([*place[:2], travel]), GRIPPER_CLOSE, tolerance=0.012)
        hold = scene.position(scene.item) - self._env.eef_pos
        place = scene.position(scene.place) - hold
        place[2] = scene.release_height() - hold[2]
        yield Phase("lower", place, GRIPPER_CLOSE, speed=0.5, tolerance=0.008, noise=0.3)
        yield Phase("release", place, GRIPPER_OPEN, steps=12, noise=0.3)
        yield Phase("retreat", place + 0.08 * UP, GRIPPER_OPEN, steps=1000)


def demonstrate(env: LiberoEnv, init_state: np.ndarray, *, seed: int, noise: float, draw: bool) -> tuple[Demo, bool]:
    """One episode of the expert, ended by success or by the suite's step limit.

    Args:
        env: of a task with one "In" or "On" goal.
        init_state: float64 [1 + nq + nv].
        seed: of the scene and of the noise.
        noise: see `Expert`.
        draw: record pictures of both cameras (costs most of the time).

    Returns:
        The demonstration and whether it succeeded.
    """
    cameras = CAMERAS if draw else ()
    env.reset(init_state, seed=seed, draw=cameras)
    expert = Expert(env, noise, np.random.RandomState(seed))
    recorder = Recorder(env, init_state, seed)
    for _ in range(MAX_STEPS[env.task.suite]):
        action = expert.act()
        recorder.add(action)
        if env.step(action, draw=cameras):
            return recorder.demo(), True
    return recorder.demo(), False


def _upright(quat: np.ndarray) -> np.ndarray:
    """The rotation [3, 3] nearest to `quat` with the gripper straight down and its fingers along a world axis."""
    fingers = np.zeros(3)
    current = _matrix(quat)[:, 1]
    axis = int(np.argmax(np.abs(current[:2])))
    fingers[axis] = np.sign(current[axis])
    return np.column_stack([np.cross(fingers, -UP), fingers, -UP])


def _matrix(quat: np.ndarray) -> np.ndarray:
    return need("scipy.spatial.transform", "libero").Rotation.from_quat(quat).as_matrix()


def _rotation_vector(matrix: np.ndarray) -> np.ndarray:
    return need("scipy.spatial.transform", "libero").Rotation.from_matrix(matrix).as_rotvec()
