"""Choosing how the simulator draws: EGL (a GPU, or Mesa in software), else OSMesa. Probed before MuJoCo is imported.

MuJoCo and robosuite fix the backend at import from environment variables and fail late, or draw on the wrong GPU, when
these do not fit the machine. So `choose_backend` draws one small picture per candidate in a child process (this file
run as a script), and `GLBackend.environment` holds the variables that make the simulator repeat what worked.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismo.util.processes import end_with

log = logging.getLogger(__name__)

# Without libopengl0, PyOpenGL's EGL finds no functions on a machine that has no other OpenGL. OSMesa would do, too, but
# Mesa 25.1 dropped it, and apt-get installs nothing where one name is unknown.
INSTALL_HINT = "apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0"
_PROBE_TIMEOUT_S = 120.0
_IMPORT_ROOT = str(Path(__file__).resolve().parents[2])
_EGL_CUDA_DEVICE_NV = 0x323A  # EGL_NV_device_cuda: the CUDA ordinal of an EGL device
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")


class GLUnavailableError(RuntimeError):
    """No backend could draw; the message says why for each and what to install."""


@dataclass(frozen=True)
class GLBackend:
    """A way of drawing that has been seen to work.

    Attributes:
        name: "egl" or "osmesa".
        device: index into EGL's devices (not CUDA's: the orders differ on some machines); None for OSMesa.
        cuda_device: the CUDA ordinal of that EGL device, None if it is none (software) or the driver does not tell.
        renderer: what OpenGL calls itself, e.g. "llvmpipe (LLVM 15.0.6, 256 bits)".
    """

    name: str
    device: int | None
    cuda_device: int | None
    renderer: str

    @property
    def software(self) -> bool:
        """Drawn by the CPU."""
        return any(word in self.renderer.lower() for word in _SOFTWARE)

    def environment(self) -> dict[str, str | None]:
        """Variables for the simulator process; None means that the variable has to be absent."""
        return {
            "MUJOCO_GL": self.name,
            "PYOPENGL_PLATFORM": self.name,
            "MUJOCO_EGL_DEVICE_ID": None if self.device is None else str(self.device),
            # robosuite takes an index from this list for an EGL index, and an empty one for an error. The simulator
            # computes nothing with CUDA.
            "CUDA_VISIBLE_DEVICES": None,
        }

    def __str__(self) -> str:
        where = "OSMesa" if self.name == "osmesa" else f"EGL device {self.device}"
        cuda = "" if self.cuda_device is None else f", CUDA device {self.cuda_device}"
        return f"{where} ({self.renderer}{cuda})"


def physical_cuda_index(local: int) -> int | None:
    """The machine-wide ordinal of this process's CUDA device `local`, undoing CUDA_VISIBLE_DEVICES.

    None where that variable names devices by UUID (or MIG slice), or does not list that many: there is no number then.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not visible:
        return local
    entries = [entry.strip() for entry in visible.split(",")]
    return int(entries[local]) if local < len(entries) and entries[local].isdigit() else None


@functools.cache
def choose_backend(cuda_device: int | None = None) -> GLBackend:
    """The first backend that draws: EGL on the wanted GPU, EGL on any other device, OSMesa.

    The choice is logged in one line. MUJOCO_GL and MUJOCO_EGL_DEVICE_ID narrow the candidates where the user set them.

    Args:
        cuda_device: machine-wide ordinal (`physical_cuda_index`) of the GPU to draw on, so that eight workers do not
            all draw on the first one; None takes the first device that works.

    Raises:
        GLUnavailableError: nothing draws on this machine.
    """
    failures = []
    for name, device, ordinal in _candidates(cuda_device, failures):
        extra = {} if device is None else {"MUJOCO_EGL_DEVICE_ID": str(device)}
        answer, reason = _run_probe("draw", MUJOCO_GL=name, PYOPENGL_PLATFORM=name, **extra)
        if answer is None:
            failures.append(f"{name}{'' if device is None else f' device {device}'}: {reason}")
            continue
        backend = GLBackend(name, device, ordinal, answer)
        log.info("rendering with %s%s", backend, f" after {'; '.join(failures)}" if failures else "")
        if cuda_device is not None and ordinal != cuda_device and not backend.software:
            log.warning("no EGL device says that it is CUDA device %d; rendering with %s", cuda_device, backend)
        return backend
    raise GLUnavailableError(
        f"no OpenGL backend can draw here ({'; '.join(failures)}). On Debian or Ubuntu type: sudo {INSTALL_HINT} "
        "(who may not, uses a machine with a GPU, whose driver draws, or a container with these packages)"
    )


def egl_devices() -> list[int | None] | None:
    """The CUDA ordinal of every EGL device (None for a device that is no GPU); None if there is no EGL."""
    return _run_probe("list", MUJOCO_GL="egl", PYOPENGL_PLATFORM="egl")[0]


def _candidates(cuda_device: int | None, failures: list[str]) -> Iterator[tuple[str, int | None, int | None]]:
    """(backend, EGL device, its CUDA ordinal) in the order to try; why EGL has none goes to `failures`."""
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted != "osmesa":
        ordinals, reason = _run_probe("list", MUJOCO_GL="egl", PYOPENGL_PLATFORM="egl")
        chosen = os.environ.get("MUJOCO_EGL_DEVICE_ID", "")
        if not ordinals:
            failures.append(f"egl: {reason or 'no device'}")
        elif chosen:
            if not chosen.isdigit() or int(chosen) >= len(ordinals):
                raise GLUnavailableError(f"MUJOCO_EGL_DEVICE_ID={chosen}: EGL has devices 0 to {len(ordinals) - 1}")
            yield "egl", int(chosen), ordinals[int(chosen)]
        else:
            yield from (("egl", device, ordinals[device]) for device in candidate_order(ordinals, cuda_device))
    if wanted != "egl":
        yield "osmesa", None, None


def _run_probe(what: str, **variables: str) -> tuple[Any, str]:
    """Run this file as a script; return its JSON answer and "", or None and the reason."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_IMPORT_ROOT, environment.get("PYTHONPATH"))))
    try:
        child = subprocess.run(
            [sys.executable, str(Path(__file__)), what, str(os.getpid())],
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"did not answer within {_PROBE_TIMEOUT_S:.0f} s"
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1]), ""
    lines = child.stderr.strip().splitlines()
    return None, lines[-1] if lines else f"the probe ended with code {child.returncode}"


def _egl_cuda_ordinals() -> list[int | None]:
    """For each EGL device its CUDA ordinal, None for a device without one (software) or a driver that does not say."""
    from mujoco.egl import egl_ext as egl  # noqa: PLC0415 (in the probe's process only)

    address = egl.eglGetProcAddress("eglQueryDeviceAttribEXT")
    prototype = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))
    query = prototype(address) if address else None
    ordinals: list[int | None] = []
    for device in egl.eglQueryDevicesEXT():
        value = ctypes.c_ssize_t(-1)
        known = query is not None and query(device, _EGL_CUDA_DEVICE_NV, ctypes.byref(value)) == 1
        ordinals.append(int(value.value) if known and value.value >= 0 else None)
    return ordinals


def candidate_order(ordinals: list[int | None], cuda_device: int | None) -> list[int]:
    """EGL indices in the order to try: the wanted GPU, other GPUs, devices that are none."""
    return sorted(
        range(len(ordinals)),
        key=lambda i: (ordinals[i] != cuda_device if cuda_device is not None else False, ordinals[i] is None, i),
    )


def _draw() -> str:
    """Draw a white box on black with the backend of the environment; return OpenGL's name for itself."""
    import mujoco  # noqa: PLC0415 (in the probe's process only)
    import numpy as np  # noqa: PLC0415

    model = mujoco.MjModel.from_xml_string(  # ty: ignore[missing-attribute] (compiled)
        '<mujoco><worldbody><light pos="0 0 3"/><camera name="c" pos="0 0 2"/>'
        '<geom type="box" size=".5 .5 .1"/></worldbody></mujoco>'
    )
    data = mujoco.MjData(model)  # ty: ignore[missing-attribute] (compiled)
    mujoco.mj_forward(model, data)  # ty: ignore[missing-attribute] (compiled)
    with mujoco.Renderer(model, 64, 64) as renderer:
        from OpenGL import GL  # noqa: PLC0415 (the platform is fixed by now)

        renderer.update_scene(data, camera="c")
        picture = renderer.render()
        name = GL.glGetString(GL.GL_RENDERER).decode()
    if not np.ptp(picture) > 50:
        raise RuntimeError(f"{name} drew an empty picture")
    return name


def _main() -> None:
    """`list` prints the CUDA ordinals of EGL's devices, `draw` the name of the renderer, as JSON; errors to stderr."""
    end_with(int(sys.argv[2]), by_kernel=False)
    try:
        print(json.dumps(_egl_cuda_ordinals() if sys.argv[1] == "list" else _draw()))
    except Exception as error:  # whatever a driver throws: the parent goes on to the next candidate and reports this
        if "'NoneType' object has no attribute" in str(error):  # PyOpenGL's way to say it
            raise SystemExit("its library, or one that it needs, is not installed") from None
        raise SystemExit(f"{type(error).__name__}: {error}".replace("\n", " ")) from None


if __name__ == "__main__":
    _main()
