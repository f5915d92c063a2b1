"""Built-in stand-ins for LIBERO's assets: boxes and cylinders under the file names that LIBERO-Object opens.

For machines without the assets and without a network (CI, a first try): the scenes load, reset to the benchmark's
initial states, step and render, and objects have the size, density and friction of the originals, so that what a
gripper can do with them is much the same. They do not look like the originals: success rates measured with them say
nothing about published ones. Used through `prismo.sim.assets.resolve_assets`.

What LIBERO and robosuite demand of such files: the object is a body called "object" inside an unnamed one, beside
three sites that give its height and radius; every geom has a group (0 collides, 1 is seen); sites that goals refer to
lie inside "object" with all attributes present; an arena names its floor geom, its floor body, and its floor and wall
textures, whose file names LIBERO replaces by those of the wanted style.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SUITES = ("libero_object",)

Vector = tuple[float, float, float]

RED, ORANGE, YELLOW = (0.75, 0.12, 0.10), (0.93, 0.50, 0.10), (0.95, 0.80, 0.25)
GREEN, BLUE, PALE_BLUE = (0.15, 0.45, 0.20), (0.15, 0.25, 0.65), (0.45, 0.60, 0.85)
WHITE, STEEL, BROWN, DARK = (0.95, 0.95, 0.92), (0.65, 0.65, 0.68), (0.35, 0.20, 0.10), (0.12, 0.08, 0.06)
WICKER, WICKER_RIM = (0.52, 0.36, 0.20), (0.66, 0.48, 0.28)

_Y_UP = "0.70711 0.70711 0 0"  # a cylinder along the object's y axis, which LIBERO's initial states turn upwards


@dataclass(frozen=True)
class Part:
    """A box (`size` = half extents, m) or a cylinder along y (`size` = radius, half height), centred at `at`."""

    size: tuple[float, ...]
    at: Vector
    color: Vector
    solid: bool = True  # collides; the others are paint

    def geoms(self) -> list[dict[str, str]]:
        shape = {"type": "box"} if len(self.size) == 3 else {"type": "cylinder", "quat": _Y_UP}
        shape |= {"pos": _text(self.at), "size": _text(self.size)}
        seen = shape | {"group": "1", "contype": "0", "conaffinity": "0", "rgba": _text((*self.color, 1.0))}
        # Contact parameters and density of LIBERO's own objects.
        contact = {"solimp": "0.998 0.998 0.001", "solref": "0.001 1", "density": "100", "friction": "0.95 0.3 0.1"}
        return [seen, shape | contact | {"group": "0", "rgba": "0.8 0.8 0.8 0.3"}] if self.solid else [seen]


def _can(label: Vector) -> list[Part]:
    return [
        Part((0.0311, 0.0381), (0.0, -0.0005, -0.0037), STEEL),
        Part((0.0316, 0.0270), (0.0, -0.0005, -0.0037), label, solid=False),
        Part((0.0318, 0.0070), (0.0, -0.0005, -0.0037), WHITE, solid=False),
    ]


def _bottle(glass: Vector, label: Vector, cap: Vector) -> list[Part]:
    """Flat body, round neck: 57 x 36 x 146 mm."""
    return [
        Part((0.0270, 0.0400, 0.0176), (0.0, -0.0325, 0.0), glass),
        Part((0.0275, 0.0200, 0.0180), (0.0, -0.0350, 0.0), label, solid=False),
        Part((0.0170, 0.0250), (0.0, 0.0325, 0.0), glass),
        Part((0.0150, 0.0078), (0.0, 0.0653, 0.0), cap),
    ]


def _carton(color: Vector, band: Vector) -> list[Part]:
    """A drink carton with a gable: 53 x 53 x 131 mm."""
    return [
        Part((0.0263, 0.0547, 0.0263), (0.0, -0.0150, 0.0), color),
        Part((0.0266, 0.0180, 0.0266), (0.0, -0.0200, 0.0), band, solid=False),
        Part((0.0263, 0.0108, 0.0120), (0.0, 0.0505, 0.0), color),
    ]


def _flat(half: Vector, color: Vector, band: Vector) -> list[Part]:
    """A small packet that lies on its broad side."""
    x, y, z = half
    return [Part(half, (0.0, 0.0, 0.0), color), Part((x / 3, y + 4e-4, z + 4e-4), (0.0, 0.0, 0.0), band, solid=False)]


def _basket() -> list[Part]:
    """Open at the top, 158 x 158 x 142 mm, origin at the centre of its bottom."""
    floor = Part((0.0724, 0.0724, 0.0085), (0.0, 0.0, 0.0131), WICKER)
    walls, rims = [], []
    for sign in (-1, 1):
        walls += [Part((0.0067, 0.0790, 0.0707), (sign * 0.0727, 0.0, 0.0750), WICKER)]
        walls += [Part((0.0790, 0.0067, 0.0707), (0.0, sign * 0.0727, 0.0750), WICKER)]
        rims += [Part((0.0075, 0.0800, 0.0060), (sign * 0.0727, 0.0, 0.1400), WICKER_RIM, solid=False)]
        rims += [Part((0.0800, 0.0075, 0.0060), (0.0, sign * 0.0727, 0.1400), WICKER_RIM, solid=False)]
    return [floor, *walls, *rims]


# Folder, file and parts of every object of the suite. Heights and widths are those of LIBERO's collision boxes.
OBJECTS: dict[str, list[Part]] = {
    "stable_hope_objects/alphabet_soup": _can(RED),
    "stable_hope_objects/tomato_sauce": _can(BLUE),
    "stable_hope_objects/salad_dressing": _bottle(GREEN, WHITE, GREEN),
    "stable_hope_objects/ketchup": _bottle(RED, RED, WHITE),
    "stable_hope_objects/milk": _carton(WHITE, RED),
    "stable_hope_objects/orange_juice": _carton(ORANGE, YELLOW),
    "stable_hope_objects/butter": _flat((0.0381, 0.0198, 0.0087), YELLOW, RED),
    "stable_hope_objects/cream_cheese": _flat((0.0406, 0.0213, 0.0089), PALE_BLUE, BLUE),
    "stable_hope_objects/chocolate_pudding": _flat((0.0401, 0.0232, 0.0137), BROWN, WHITE),
    # LIBERO's bottle of this sauce has its z axis along its height, unlike the others.
    "stable_hope_objects/bbq_sauce": [
        Part((0.0235, 0.0145, 0.0268), (0.0, 0.0, -0.0278), BROWN),
        Part((0.0238, 0.0148, 0.0140), (0.0, 0.0, -0.0300), YELLOW, solid=False),
        Part((0.0146, 0.0143, 0.0181), (0.0, 0.0, 0.0123), BROWN),
        Part((0.0131, 0.0134, 0.0110), (0.0, 0.0, 0.0415), RED),
    ],
    "stable_scanned_objects/basket": _basket(),
}

# Site boxes that goals refer to: (name, centre, half extents), with the orientation of LIBERO's own.
REGIONS = {"stable_scanned_objects/basket": ("contain_region", (0.0, 0.0, 0.07185), (0.06108, 0.06108, 0.06949))}


# The arena of the suite: LIBERO replaces the files of the two textures by those of the wanted style.
_FLOOR = """\
<mujoco model="floor">
  <asset>
    <texture type="skybox" builtin="gradient" width="256" height="256" rgb1="0.9 0.9 1" rgb2="0.2 0.3 0.4" />
    <texture name="texplane" type="2d" file="../textures/light-gray-floor-tile.png" />
    <material name="floorplane" texture="texplane" {matt} />
    <texture name="tex-wall" type="2d" file="../textures/light-gray-plaster.png" />
    <material name="walls_mat" texture="tex-wall" {matt} />
  </asset>
  <worldbody>
    <body name="floor" pos="0 0 0">
      <geom type="plane" size="3 3 0.125" pos="0 0 0" condim="3" group="1" name="floor" material="floorplane" />
    </body>
    <geom name="wall_rear" pos="-2 0 1.5" size="0.01 3 1.5" {wall} />
    <geom name="wall_left" pos="0.5 3 1.5" size="2.5 0.01 1.5" {wall} />
    <geom name="wall_right" pos="0.5 -3 1.5" size="2.5 0.01 1.5" {wall} />
    <light pos="1 1 4" dir="0 -0.15 -1" diffuse="0.8 0.8 0.8" specular="0.3 0.3 0.3" castshadow="false" />
    <light pos="-3 -3 4" dir="0 -0.15 -1" diffuse="0.8 0.8 0.8" specular="0.3 0.3 0.3" castshadow="false" />
    <camera name="agentview" mode="fixed" pos="0.5 0 1.35" quat="0.653 0.271 0.271 0.653" />
  </worldbody>
</mujoco>
""".format(
    matt='texrepeat="3 3" texuniform="true" reflectance="0" shininess="0" specular="0"',
    wall='type="box" group="1" material="walls_mat" contype="0" conaffinity="0"',
)


def write(folder: Path) -> None:
    """Write all files below `folder` (laid out like LIBERO's `assets`). The same bytes every time."""
    for path, parts in OBJECTS.items():
        target = folder / path / f"{Path(path).name}.xml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_object_xml(Path(path).name, parts, REGIONS.get(path)))
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    (folder / "scenes" / "libero_floor_base_style.xml").write_text(_FLOOR)
    (folder / "textures").mkdir(exist_ok=True)
    for name, image in _textures().items():
        Image.fromarray(image).save(folder / "textures" / name, optimize=False)


def scenes_fingerprint() -> str:
    """Ten hex digits that change with anything in this file."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]


def _object_xml(name: str, parts: list[Part], region: tuple[str, Vector, Vector] | None) -> str:
    root = ET.Element("mujoco", model=name)
    outer = ET.SubElement(ET.SubElement(root, "worldbody"), "body")
    body = ET.SubElement(outer, "body", name="object")
    if region is not None:
        site, at, half = region
        shape = {"type": "box", "pos": _text(at), "quat": "0 0 0 1", "size": _text(half)}
        ET.SubElement(body, "site", shape | {"name": site, "group": "0", "rgba": "0.8 0 0 0"})
    for geom in (geom for part in parts for geom in part.geoms()):
        ET.SubElement(body, "geom", geom)
    # robosuite reads bottom, top (z) and radius (x) from these when it drops objects at a reset.
    for site, at in {"bottom": (0, 0, -0.06), "top": (0, 0, 0.04), "horizontal_radius": (0.025, 0.025, 0)}.items():
        ET.SubElement(outer, "site", name=f"{site}_site", pos=_text(at), size="0.005", rgba="0 0 0 0")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _textures() -> dict[str, np.ndarray]:
    """uint8 [256, 256, 3]: light tiles with joints for the floor, plain grey for the wall; a little grain in both."""
    grain = np.random.RandomState(0).randint(-6, 7, (2, 256, 256, 1))
    floor = np.full((256, 256, 3), (205, 198, 190)) + grain[0]
    floor[:, ::64] = floor[:, 1::64] = floor[::128] = floor[1::128] = 232
    wall = np.full((256, 256, 3), (186, 186, 182)) + grain[1]
    return {"light-gray-floor-tile.png": floor.astype(np.uint8), "light-gray-plaster.png": wall.astype(np.uint8)}


def _text(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:.5g}" for number in numbers)
