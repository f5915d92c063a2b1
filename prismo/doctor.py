"""Is this machine fit for a long run? One function per check, each yields findings in plain words."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packaging.version import Version
from PIL import Image

from prismo.benchmarks.libero import BENCHMARK
from prismo.models.openvla.modeling import OpenVLAForActionPrediction
from prismo.models.self_test import SelfTestError
from prismo.sim.assets import cache_folder, resolve_assets
from prismo.sim.gl import GLUnavailableError, egl_devices, physical_cuda_index
from prismo.sim.interface import Observation, SimulatorError
from prismo.sim.libero import AGENT_CAMERA, CAMERAS
from prismo.sim.libero_worker import LiberoWorker
from prismo.sim.suites import package_folder
from prismo.testing.tiny import make_tiny_openvla

MINIMUM = {"torch": "2.6", "transformers": "5.10", "peft": "0.18"}
GIGABYTE = 1 << 30

# Does this simulator behave as the one that the training data comes from? MuJoCo 3.3.3 draws LIBERO-Object's floor
# darker and 3.4.0 lets a bowl of LIBERO-Spatial slip; either costs 5 to 20 points of success without an error. Two
# probes look at the effect instead of trusting a version number.
# Mean of the agentview picture of LIBERO-Object task 0, of 255: 130 to 134 up to MuJoCo 3.3.2, 98 from 3.3.3 on.
DARK_FLOOR = 115.0
# Horizontal distance bowl to ramekin, mm, and tilt of the bowl, degrees, in LIBERO-Spatial task 5: 14.5 and 15.9 up to
# MuJoCo 3.3.7, 37.2 and 10.5 from 3.4.0.
BOWL_OFF_MM = 25.0
_BOWL_TASK = ("libero_spatial", 5)
_BOWL, _RAMEKIN = "akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `level`: "ok", "note" (good to know) or "FAIL" (would spoil results)."""

    level: str
    text: str


@dataclass(frozen=True)
class Doctor:
    """What was asked: folder of LIBERO's assets or "stand-ins" (None looks for them), folder for pictures."""

    libero_assets: str | None
    output_dir: Path


def check_packages(doctor: Doctor) -> Iterator[Finding]:
    """Versions of what training and evaluation need."""
    yield Finding("ok", f"Python {sys.version.split()[0]}")
    for name, minimum in MINIMUM.items():
        version = importlib.metadata.version(name)
        enough = Version(version) >= Version(minimum)
        yield Finding(
            "ok" if enough else "FAIL", f"{name} {version}" + ("" if enough else f": needs at least {minimum}")
        )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", f"CUDA {torch.version.cuda}: {', '.join(names)}")
    else:
        yield Finding("note", "no CUDA device: only tiny models are practical")


def check_attention(doctor: Doctor) -> Iterator[Finding]:
    """OpenVLA-OFT's checkpoints lose half of their success if attention is causal; a tiny model shows which it is."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_openvla(Path(folder))
        for kind in ("bidirectional", "causal"):
            yield _attention_finding(checkpoint, kind)


def _attention_finding(checkpoint: Path, kind: str) -> Finding:
    try:
        OpenVLAForActionPrediction.from_pretrained(checkpoint, attention=kind)
    except SelfTestError as error:
        return Finding("FAIL", str(error))
    return Finding("ok", f"{kind} attention works with this transformers")


def check_simulator(doctor: Doctor) -> Iterator[Finding]:
    """Versions of the simulator, what draws, and whether physics and pixels are those of the training data."""
    try:
        package_folder()
        assets = resolve_assets(doctor.libero_assets, fallback=True)
        worker = LiberoWorker(assets, cuda_device=physical_cuda_index(0) if torch.cuda.is_available() else None)
    except (ImportError, OSError, GLUnavailableError) as error:
        yield Finding("FAIL", str(error))
        return
    try:
        with worker:
            info = worker.info
            yield Finding("ok", f"simulator: {', '.join(f'{k} {v}' for k, v in info.versions.items())}")
            yield from (Finding("FAIL", text) for text in BENCHMARK.warnings(info.versions))
            backend = worker.backend
            slow = ": every picture costs 50 to 150 ms of CPU" if backend is not None and backend.software else ""
            yield Finding("note" if slow else "ok", f"rendering with {backend}{slow}")
            yield from _probes(worker, doctor.output_dir)
    except SimulatorError as error:
        yield Finding("FAIL", f"the simulator does not work: {error}")


def _probes(worker: LiberoWorker, output_dir: Path) -> Iterator[Finding]:
    brightness, observation = probe_floor(worker)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, image in zip(("full_image", "wrist_image"), observation.pictures(CAMERAS), strict=True):
        Image.fromarray(image).save(output_dir / f"{name}.png")
        drawn = float(image.std()) > 10.0
        yield Finding("ok" if drawn else "FAIL", f"{output_dir / name}.png {'saved' if drawn else 'is blank'}")
    if worker.assets.are_stand_ins:
        yield Finding(
            "note",
            "assets: built-in stand-ins (smoke runs only, on request: --libero_assets stand-ins); probes of floor and "
            "bowl need LIBERO's own",
        )
        return
    yield Finding("ok", f"assets: {worker.assets.folder}")
    text = f"floor of LIBERO-Object: mean brightness {brightness:.1f} (training data: 130 to 134)"
    dark = "" if brightness > DARK_FLOOR else "; MuJoCo 3.3.3 and later draw it dark"
    yield Finding("FAIL" if dark else "ok", text + dark)
    distance, _ = probe_settling(worker)
    text = f"bowl on the ramekin (LIBERO-Spatial task 5): {distance:.1f} mm off centre (training data: 14.5)"
    slipped = "" if distance < BOWL_OFF_MM else "; MuJoCo 3.4 and later let it slip"
    yield Finding("FAIL" if slipped else "ok", text + slipped)


def probe_settling(worker: LiberoWorker, init_states: tuple[int, ...] = (0, 24, 49)) -> tuple[float, float]:
    """How the bowl of LIBERO-Spatial task 5 rests on its ramekin after a reset, mean over some initial states.

    Returns:
        Distance in mm, below `BOWL_OFF_MM` as in the training data, and tilt in degrees. Needs LIBERO's own assets.
    """
    measured = []
    for index in init_states:
        worker.reset(*_BOWL_TASK, index, seed=index)
        poses = worker.object_poses()
        (bowl, (_, x, y, _)), (ramekin, _) = poses[_BOWL], poses[_RAMEKIN]
        tilt = np.degrees(np.arccos(1.0 - 2.0 * (x * x + y * y)))
        measured.append((1000.0 * np.linalg.norm((bowl - ramekin)[:2]), tilt))
    distance, tilt = np.mean(measured, axis=0)
    return float(distance), float(tilt)


def probe_floor(worker: LiberoWorker) -> tuple[float, Observation]:
    """Draw LIBERO-Object task 0.

    Returns:
        Brightness of the agentview picture, above `DARK_FLOOR` as in the training data (comparable only with LIBERO's
        own assets), and the observation it was measured on.
    """
    observation = worker.reset("libero_object", 0, 0)
    return float(observation.images[AGENT_CAMERA].mean()), observation


def check_gpu_mapping(doctor: Doctor) -> Iterator[Finding]:
    """EGL counts devices in its own order; without a map all simulators draw on the first one."""
    devices = egl_devices()
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        ordinal = physical_cuda_index(index)
        if devices is not None and ordinal in devices:
            yield Finding("ok", f"CUDA device {index} is EGL device {devices.index(ordinal)}")
        else:
            yield Finding("note", f"CUDA device {index} has no EGL device here: pictures are drawn elsewhere")


def check_room(doctor: Doctor) -> Iterator[Finding]:
    """Free disk and memory."""
    for folder, needed in ((Path.cwd(), 40), (cache_folder(), 1)):
        free = shutil.disk_usage(folder).free / GIGABYTE
        text = f"{free:.0f} GB free in {folder}"
        yield Finding("ok", text) if free > needed else Finding("note", f"{text}; a run wants {needed} GB")
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIGABYTE
    yield Finding("ok" if memory > 4 else "note", f"{memory:.0f} GB of memory free; every simulator takes 1 to 2 GB")


# Further checks go here: a function that takes what was asked and yields findings.
CHECKS: tuple[Callable[[Doctor], Iterator[Finding]], ...] = (
    check_packages,
    check_attention,
    check_simulator,
    check_gpu_mapping,
    check_room,
)


def examine(doctor: Doctor) -> Iterator[Finding]:
    """All findings, as they come."""
    for check in CHECKS:
        yield from check(doctor)
