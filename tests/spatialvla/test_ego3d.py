"""Camera geometry and the 3D position code."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from prismo.models.spatialvla.ego3d import (
    LIBERO_AGENTVIEW,
    WIDOWX,
    CameraIntrinsics,
    Ego3DPositionEmbedding,
    camera_points,
    group_patches,
    pixel_grid,
    sinusoids,
)

CPU = torch.device("cpu")


def test_grids() -> None:
    exact = pixel_grid(224, 32, "exact", CPU)
    assert exact[:2].tolist() == [3.5, 10.5]
    assert exact[-1] == 220.5
    rounded = pixel_grid(224, 32, "parity", CPU)
    assert torch.equal(rounded[:18], exact[:18])  # up to 122.5
    assert rounded[18:].tolist() == [130, 136, 144, 150, 158, 164, 172, 178, 186, 192, 200, 206, 214, 220]


def test_default_camera_is_the_rounded_widowx() -> None:
    matrix = WIDOWX.matrix(224)
    expected = torch.tensor([[218.2558, 0, 111.8253], [0, 291.0078, 111.7877], [0, 0, 1]])
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-3)
    assert matrix.bfloat16().float().tolist() == [[218, 0, 112], [0, 292, 112], [0, 0, 1]]


def test_first_point_in_parity() -> None:
    depth = torch.full((1, 32, 32), 1.7)
    points = camera_points(depth, WIDOWX.matrix(224)[None], 224, "parity")
    expected = 1.7 * torch.tensor([(3.5 - 112) / 218, (3.5 - 112) / 292, 1])
    torch.testing.assert_close(points[0, 0, 0], expected)
    # Row 1 differs in y, column 1 in x.
    assert points[0, 0, 1, 0] > points[0, 0, 0, 0]
    assert points[0, 0, 1, 1] == points[0, 0, 0, 1]
    assert points[0, 1, 0, 1] > points[0, 0, 0, 1]


def test_exact_points_invert_the_matrix() -> None:
    matrix = torch.tensor([[200.0, 3.0, 100.0], [0.0, 250.0, 120.0], [0, 0, 1]])
    depth = torch.rand(2, 32, 32) + 0.5
    points = camera_points(depth, matrix.expand(2, 3, 3), 224, "exact")
    grid = pixel_grid(224, 32, "exact", CPU)
    pixels = torch.stack((grid.expand(32, 32), grid[:, None].expand(32, 32), torch.ones(32, 32)), dim=-1)
    torch.testing.assert_close(points, pixels @ torch.linalg.inv(matrix).T * depth[..., None], rtol=1e-4, atol=1e-4)


def test_patches_hold_their_cells_row_by_row() -> None:
    points = torch.arange(32 * 32 * 3.0).view(1, 32, 32, 3)
    patches = group_patches(points, 2)
    assert patches.shape == (1, 256, 12)
    patch = patches[0, 16 + 3].view(2, 2, 3)  # second row, fourth column of patches
    assert torch.equal(patch, points[0, 2:4, 6:8])


def test_code_layout() -> None:
    code = sinusoids(torch.tensor([[0.3, -0.7]]), 8)[0]
    assert code.shape == (34,)
    frequencies = 2.0 ** torch.arange(8)
    expected = torch.cat((torch.tensor([0.3]), (0.3 * frequencies).sin(), (0.3 * frequencies).cos()))
    torch.testing.assert_close(code[:17], expected)
    torch.testing.assert_close(code[17], torch.tensor(-0.7))


@pytest.mark.parametrize("geometry", ["parity", "exact"])
def test_encoding_of_a_flat_scene(geometry: str) -> None:
    module = Ego3DPositionEmbedding(8, 224, 14, 2, 8)
    code = module.encode(torch.full((1, 224, 224), 1.5), WIDOWX.matrix(224)[None], geometry, torch.float32)
    assert code.shape == (1, 256, 204)
    fx, cx = (218, 112) if geometry == "parity" else (218.25580, 111.82535)
    x = 1.5 * (3.5 - cx) / fx / 2
    expected = torch.tensor([x] + [0.0] * 16)
    frequencies = 2.0 ** torch.arange(8)
    expected[1:9], expected[9:] = (x * frequencies).sin(), (x * frequencies).cos()
    torch.testing.assert_close(code[0, 0, :17], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(code[0, 0, 34], torch.tensor((1.5 - 2) / 2))  # z is centred at 2 m
    assert module(torch.full((1, 224, 224), 1.5), WIDOWX.matrix(224)[None], geometry).shape == (1, 256, 8)


def test_crops_move_the_axis_and_zoom() -> None:
    crop = LIBERO_AGENTVIEW.center_cropped(0.9)
    assert crop.matrix(224)[0, 0] == pytest.approx(270.39 / 0.9**0.5, abs=0.02)
    assert crop.matrix(224)[0, 2] == pytest.approx(112)
    left = LIBERO_AGENTVIEW.cropped(0, 0, 0.5, 1)
    assert (left.cx, left.width) == (128, 128)
    # A pixel of the crop and of the whole image look in the same direction.
    corner = LIBERO_AGENTVIEW.cropped(0.25, 0.5, 0.25, 0.25)
    assert (10 - corner.cx) / corner.fx == pytest.approx((10 + 64 - LIBERO_AGENTVIEW.cx) / LIBERO_AGENTVIEW.fx)


def test_field_of_view() -> None:
    camera = CameraIntrinsics.from_fovy(90, 640, 480)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == pytest.approx((240, 240, 320, 240))


SIMULATOR = """
import json, sys
from prismo.sim.assets import resolve_assets
from prismo.sim.libero_server import prepare_process
from prismo.sim.suites import load_task
assets = resolve_assets(fallback=True)
if assets.are_stand_ins:
    sys.exit(77)
prepare_process(assets, None)
from prismo.sim.libero import LiberoEnv
from robosuite.utils.camera_utils import get_camera_intrinsic_matrix
found = {}
for suite, index in json.loads(sys.argv[1]):
    env = LiberoEnv(load_task(suite, index), assets, cameras=False)
    found[suite] = [get_camera_intrinsic_matrix(env.raw.sim, "agentview", size, size).tolist() for size in (256, 224)]
    env.close()
print("RESULT", json.dumps(found))
"""


def test_libero_camera_is_mujocos() -> None:
    """The matrices that robosuite computes from MuJoCo's model, for a table, a floor and a kitchen scene."""
    if not (find_spec("robosuite") and find_spec("libero")):
        pytest.skip("needs the simulator (make setup)")
    tasks = json.dumps([("libero_spatial", 0), ("libero_object", 0), ("libero_10", 2)])
    done = subprocess.run(
        [sys.executable, "-c", SIMULATOR, tasks],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("no LIBERO assets (set PRISMO_LIBERO_ASSETS to their folder); stand-ins have cameras of their own")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("RESULT ")[1])
    for matrices in found.values():
        for size, matrix in zip((256, 224), matrices, strict=True):
            torch.testing.assert_close(LIBERO_AGENTVIEW.matrix(size), torch.tensor(matrix), rtol=1e-5, atol=1e-3)
