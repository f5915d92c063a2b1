"""Messages between simulator and owner: what is sent arrives bit for bit, and nothing damaged gets through."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismo.sim.interface import Observation, SimulatorError
from prismo.sim.messages import LONGEST, MessageError, decode, encode
from prismo.sim.worker import SimWorker

VALUE = ["ok", {"state": np.arange(6.0).reshape(2, 3), "image": np.full((2, 2, 3), 7, np.uint8), "nested": [1.5, None]}]


@pytest.mark.parametrize("kind", ["uint8", "bool", "int64", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 2, 3)])
def test_arrays_arrive_bit_for_bit(kind: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(kind)
    for sent in (array, array.copy(order="F"), array.astype(array.dtype.newbyteorder(">"))):
        (found, text) = decode(encode((sent, "ä")))
        assert (found.dtype, found.shape, text) == (np.dtype(kind), shape, "ä")
        np.testing.assert_array_equal(found, array)
        found[...] = 0  # its own memory, and writable


def test_what_else_may_be_in_a_message() -> None:
    @dataclass(frozen=True)
    class Inner:
        folder: Path
        numbers: tuple[int, ...]

    value = {"a": Inner(Path("x/y"), (1, 2)), "nan": float("nan"), "n": np.float64(0.1), "b": np.bool_(True)}
    found = decode(encode(value))
    assert found.pop("nan") != found.get("nan")
    assert found == {"a": {"folder": "x/y", "numbers": [1, 2]}, "n": 0.1, "b": True}
    for wrong in (object(), {1, 2}, np.array(["text"]), np.array([object()]), b"bytes", Inner):
        with pytest.raises(TypeError, match="a message cannot hold"):
            encode([wrong])


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_message_is_refused_or_of_json(data: Any) -> None:
    """No allocation by what a message claims, no other exception, no code."""
    whole = bytearray(encode(VALUE))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "random"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        damaged = whole[:place]
    elif kind == "flip":
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
        damaged = whole
    elif kind == "insert":
        damaged = whole[:place] + data.draw(st.binary(min_size=1, max_size=9)) + whole[place:]
    else:
        damaged = data.draw(st.binary(max_size=60))
    try:
        decode(bytes(damaged))
    except MessageError:
        return
    assert kind != "cut"


@pytest.mark.parametrize("shape", ["[1000000000000]", "[-1]", "[1.0]", "[true, 2]", '"4"', "[[2]]", "{}", "4"])
def test_a_message_cannot_ask_for_memory(shape: str) -> None:
    header = f'{{"array": ["float64", {shape}]}}'.encode()
    with pytest.raises(MessageError):
        decode(struct.pack(">I", len(header)) + header + bytes(16))
    with pytest.raises(MessageError):
        decode(b"\0\0\xff\xff" + b"[" * 65535)


def test_too_long_a_message_is_not_sent() -> None:
    with pytest.raises(ValueError, match="is too long"):
        encode(np.broadcast_to(np.uint8(0), (LONGEST,)))


def test_the_simulators_side_needs_numpy_only() -> None:
    """It may live in an environment of its own."""
    program = (
        "import sys\n"
        "for name in ('pydantic', 'annotated_types', 'yaml', 'torch', 'draccus', 'PIL', 'mujoco'):\n"
        "    sys.modules[name] = None\n"
        "import prismo.sim.server, prismo.sim.interface\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


ODD = """
import sys
from prismo.sim.server import serve

class Odd:
    def reset(self, **where):
        if where["suite"] == "raw":
            import os
            os.write(int(sys.argv[1]), b"\\0\\0\\0\\5hello")
            return None
        return {"images": {}, "states": {}}

if __name__ == "__main__":
    serve(lambda: Odd())
"""


@pytest.mark.processes
def test_an_answer_of_another_kind_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_simulator.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with SimWorker("odd_simulator", {}, action_dim=2) as worker:
        with pytest.raises(SimulatorError, match=r"odd_simulator answered 'reset' with no Observation: .*instruction"):
            worker.reset("any", 0, 0)
        with pytest.raises(SimulatorError, match=r"has no command '__init__'"):
            worker.request("__init__", 60.0)
        with pytest.raises(SimulatorError, match="answered 'reset' with a damaged message"):
            worker.reset("raw", 0, 0)
        assert worker.pid is None
    with pytest.raises(ValueError, match="camera 'front' gave float64"):
        Observation({"front": np.zeros((2, 2, 3))}, {}, "")
