"""What the numbers of actions and proprio, and the views of a sample, are called in pictures and tables."""

from __future__ import annotations

from prismo.embodiment import Embodiment

_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_VIEWS = ("third person", "wrist")
# Robots whose proprio is known, by name and count: the project's own and those of the known datasets.
_PROPRIO = {
    ("libero", 8): ("x", "y", "z", "rot x", "rot y", "rot z", "left finger", "right finger"),
    ("bridge", 7): (*_POSE, "gripper"),
    ("fractal", 8): ("x", "y", "z", "quat x", "quat y", "quat z", "quat w", "gripper"),
    ("franka", 8): (*(f"joint {i}" for i in range(1, 8)), "gripper"),
}
_MOST = 4  # lines that can be told apart in one diagram


def view_name(view: int) -> str:
    """Of the third person, of the wrist, and so on: the order of `DatasetSpec.cameras`."""
    return _VIEWS[view] if view < len(_VIEWS) else f"camera {view + 1}"


def action_names(robot: Embodiment) -> tuple[str, ...]:
    """A names: a pose change and a gripper, or numbers where the robot's action is something else."""
    grippers = [dim % robot.action_dim for dim in robot.gripper_dims]
    if robot.action_dim == len(_POSE) + 1 and grippers == [len(_POSE)]:
        return (*_POSE, "gripper")
    return tuple("gripper" if dim in grippers else f"action {dim}" for dim in range(robot.action_dim))


def proprio_names(robot: Embodiment) -> tuple[str, ...]:
    """P names; numbers for a robot that is not known."""
    known = _PROPRIO.get((robot.name, robot.proprio_dim))
    return known or tuple(f"proprio {dim}" for dim in range(robot.proprio_dim))


def proprio_groups(robot: Embodiment) -> list[tuple[str, slice]]:
    """Parts of the proprio that share a diagram, with their titles: few lines of one unit each."""
    if (robot.name, robot.proprio_dim) == ("libero", 8):
        return [("position, m", slice(0, 3)), ("axis-angle, rad", slice(3, 6)), ("fingers, m", slice(6, 8))]
    starts = range(0, robot.proprio_dim, _MOST)
    return [("proprio", slice(start, min(start + _MOST, robot.proprio_dim))) for start in starts]
