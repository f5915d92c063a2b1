"""YAML descriptions of own data, and mixtures."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from prismo.data.dataset import open_dataset
from tests.fuzz.conftest import DATASET
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import WRONG, Draw, Mutation, damage, describe, edited, writes, yaml_bytes

ROBOT = f"""
name: my_robot
path: {DATASET}
cameras: {{primary: observation/image, wrist: observation/wrist_image}}
action: ["action[:6]", "action[-1]"]
proprio: [observation/joint_state, "observation/state[6:7]"]
gripper: open_low
control_hz: 10
chunk: 4
normalization: bounds_q99
gripper_dims: [-1]
gripper_env_sign: -1
actions_from_state: false
skip_first: 1
embodiment: libero
instruction: language_instruction
"""
MIXTURE = f"datasets: {{robot.yaml: 0.5, {DATASET}: 2}}\n"
FILES = ("robot.yaml", "mixture.yaml")
_SLICES = ("[99]", "[5:2]", "[-99]", "[7:]", "[:0]", "[1.5]", "[a]", "[", "[::2]", "[0:99999999999]")
_TEXTS = {
    "a tag of Python": "!!python/object/apply:os.system [true]",
    "an alias of itself": "&a [*a]",
    "aliases that grow": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "itself as a part": "datasets: {mixture.yaml: 1}",
    "a key twice removed": "? {a: b}\n: c",
    "tabs": "name:\n\t- x",
    "a list open": "name: [a, b",
    "two documents": "name: a\n---\nname: b",
    "a date": "name: 2020-01-01\ncontrol_hz: 1:30",
    "a binary": "name: !!binary aGVsbG8=",
}  # fmt: skip


@pytest.fixture(scope="module")
def described(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a description and a mixture, and all indexes."""
    root = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("fuzz") / "described"))
    (root / "robot.yaml").write_text(ROBOT)
    (root / "mixture.yaml").write_text(MIXTURE)
    read_specs(root)
    return root


def read_specs(root: Path) -> Any:
    """What the two files mean, and their first and last sample."""
    found = {}
    for name in FILES:
        data = open_dataset(root, root / name, chunk=None if name == "robot.yaml" else 4)
        samples = [data[index] for index in (0, len(data) - 1)]
        found[name] = {
            "specs": [asdict(source.store.spec) for source in data.sources],
            "weights": [source.weight for source in data.sources],
            "numbers": [(sample.actions.tolist(), sample.proprio.tolist()) for sample in samples],
            "texts": [(sample.instruction, tuple(sample.images.shape)) for sample in samples],
        }
    return found


@st.composite
def yaml_edit(draw: Draw, root: Path) -> Mutation:
    """A value dropped, renamed or replaced; a feature's part that is none; a text that is YAML, but nothing of ours."""
    file = draw(st.sampled_from(FILES))
    value = yaml.safe_load((root / file).read_text())
    how = draw(st.sampled_from(["edit", "edit", "edit", "edit", "root", "text", "part"]))
    if how == "root":
        kind = draw(st.sampled_from(sorted(WRONG)))
        return writes(file, kind, f"its content is {kind}", yaml_bytes(WRONG[kind]), must_fail=True)
    if how == "text":
        kind = draw(st.sampled_from(sorted(_TEXTS)))
        return writes(file, kind, kind, _TEXTS[kind].encode(), must_fail=True)
    if how == "part":
        value, part = yaml.safe_load(ROBOT), draw(st.sampled_from(_SLICES))
        value["proprio"].append(f"observation/state{part}")
        return writes("robot.yaml", "part", f"proprio + observation/state{part}", yaml_bytes(value), must_fail=True)
    value, place, kind = draw(edited(value))
    return writes(file, kind, describe(place, kind), yaml_bytes(value), place=place)


def valid(mutation: Mutation, before: Any, after: Any) -> bool:
    """Another robot that there may be: the type of every value is right and so are its bounds."""
    specs = [spec for found in after.values() for spec in found["specs"]]
    weights = [weight for found in after.values() for weight in found["weights"]]
    bounds = (
        *(0 < spec["embodiment"]["control_hz"] < 1e5 for spec in specs),
        *(
            1 <= spec["embodiment"]["chunk"] < 1e4 and spec["embodiment"]["gripper_env_sign"] in (-1, 1)
            for spec in specs
        ),
        *(spec["skip_first"] >= 0 and all(spec[name] for name in ("name", "cameras", "action")) for spec in specs),
        *(0 < weight < math.inf for weight in weights),
    )
    texts = ("name", "embodiment")
    right_type = (
        mutation.kind in ("-1", "0", "1.5", "huge", "drop", "shorter", "longer", "reversed")
        or not mutation.place  # bytes: written by hand, a file has no checksum
        or (mutation.kind in ("true",) and mutation.place[-1] == "actions_from_state")
        or (mutation.kind in ('"False"', '"7"', "absolute path", "../") and mutation.place[-1] in texts)
        or (mutation.kind in ("null", "[]") and mutation.place[-1] in _OPTIONAL)
    )
    return all(bounds) and right_type


_OPTIONAL = ("path", "chunk", "normalization", "gripper_dims", "gripper_env_sign", "embodiment", "instruction")


def test_damaged_descriptions_and_mixtures(fuzz: Fuzzer, described: Path) -> None:
    edits = yaml_edit(described).filter(
        lambda mutation: not (mutation.kind == "../" and mutation.place[-1:] == ("path",))
    )
    fuzz(described, st.one_of(edits, edits, edits, edits, damage(described, FILES)), read_specs, percent=12,
         legitimate=valid, also=("cannot be mixed",))  # fmt: skip
