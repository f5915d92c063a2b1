"""Pictures of a run: what is written on them, and colours that mean the same on all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prismo.data.names import action_names, proprio_groups, proprio_names, view_name
from prismo.embodiment import ALOHA, EMBODIMENTS, LIBERO
from prismo.training.pictures import Row, Table, contact_sheet, cosine_sheet


def test_names_of_numbers():
    assert action_names(LIBERO) == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert action_names(ALOHA)[5:8] == ("action 5", "gripper", "action 7")
    assert [view_name(i) for i in range(3)] == ["third person", "wrist", "camera 3"]
    own = replace(LIBERO, name="own", proprio_dim=6)
    assert proprio_names(own) == tuple(f"proprio {i}" for i in range(6))
    for robot in (*EMBODIMENTS.values(), own):
        assert len(proprio_names(robot)) == robot.proprio_dim
        covered = [i for _, part in proprio_groups(robot) for i in range(robot.proprio_dim)[part]]
        assert covered == list(range(robot.proprio_dim))
        assert max(len(range(99)[part]) for _, part in proprio_groups(robot)) <= 4


def test_a_cosine_has_the_same_colour_in_every_picture():
    images = torch.zeros(1, 1, 3, 56, 56)

    def color(value: float, other: float) -> tuple[int, ...]:
        cosine = torch.full((1, 1, 4, 4), other)
        cosine[0, 0, 0, 0] = value
        sheet = cosine_sheet(images, cosine, "cosine of policy and teacher")
        return sheet.getpixel((4 + 60 + 2, 36 + 2))

    assert color(0.5, 0.1) == color(0.5, 0.9)
    assert color(-0.4, 0.5) == color(0.0, 0.5)
    assert len({color(value, 0.5) for value in (0.0, 0.25, 0.5, 0.75, 1.0)}) == 5


@pytest.mark.parametrize("views", [1, 2])
def test_a_sheet_has_room_for_its_numbers(views):
    table = Table("actions", action_names(LIBERO), [["0.000"] * 7] * 25)
    row = Row(torch.rand(views, 3, 56, 56), ["a line", "another"], (table, table))
    sheet = contact_sheet("title", ["third person", "wrist"][:views], [row, row])
    assert sheet.height > 2 * 2 * 28 * 14
    assert sheet.width > views * 56 + 7 * 50
    plain = contact_sheet("title", ["third person", "wrist"][:views], [replace(row, tables=())])
    assert plain.height < 56 + 120
