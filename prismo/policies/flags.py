"""Flags that describe a policy; evaluation and serving inherit them. Light to import, for `--help`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from prismo.embodiment import Camera
from prismo.util.flags import at_least, at_most
from prismo.util.text import did_you_mean


@dataclass(frozen=True)
class PolicyFlags:
    """Flags that describe a policy. None = not given: read from the checkpoint's files."""

    # --- checkpoint
    # "openvla" (OpenVLA, OpenVLA-OFT, Spatial-Forcing) or "svla" (SpatialVLA). Default: from the checkpoint
    model_family: str | None = None
    # Checkpoint folder or Hugging Face hub id
    pretrained_checkpoint: str = ""
    # Base model of an unmerged checkpoint (folder with lora_adapter/). Default: the one its adapter names
    base_checkpoint: str | None = None

    # --- policy (left out, read from the checkpoint)
    # Continuous actions from the L1 head (original default: True). Default: from the checkpoint
    use_l1_regression: bool | None = None
    # Continuous actions from the diffusion head (original default: False). Default: from the checkpoint
    use_diffusion: bool | None = None
    # Length of the diffusion schedule in training (original default: 50)
    num_diffusion_steps_train: int | None = None
    # Denoising steps per prediction. Default: num_diffusion_steps_train
    num_diffusion_steps_inference: int | None = None
    # FiLM in the vision towers (original default: False). Default: from the checkpoint
    use_film: bool | None = None
    # Camera views (original default: 2). Default: from the checkpoint, else 2 for OFT and 1 for vanilla OpenVLA
    num_images_in_input: int | None = None
    # Feed the proprioceptive state (original default: True). Default: from the checkpoint
    use_proprio: bool | None = None
    # Take the central 0.9 of the image area; right for models trained with --image_aug (original default: True)
    center_crop: bool | None = None
    # LoRA rank (original default: 32; used with FiLM). Always read from the checkpoint; given, it must agree
    lora_rank: int | None = None
    # Statistics that scale actions and proprio. Default: the task suite, then <suite>_no_noops
    unnorm_key: str | None = None
    # "bidirectional" (OFT: a chunk in one pass) or "causal" (vanilla OpenVLA). Default: from the checkpoint
    attention: str | None = None

    # --- SpatialVLA
    # SpatialVLA: average the actions that the last chunks predict for a step (a query per step). Default: True
    adaptive_ensemble: bool | None = None
    # SpatialVLA: sharpness of that average (0 = plain mean)
    ensemble_alpha: float = 0.1
    # SpatialVLA: camera for the 3D positions: "checkpoint" (as its authors) or "libero" (the true one)
    intrinsics: str | None = None

    # --- machine
    # bitsandbytes 8-bit weights (merged OpenVLA checkpoints, NVIDIA GPUs)
    load_in_8bit: bool = False
    # bitsandbytes 4-bit weights
    load_in_4bit: bool = False
    # Device of the model, e.g. "cuda:1". Default: the first GPU, else the CPU
    device: str | None = None

    # --- checkpoint
    # Run although flags, or the names of cameras and states, contradict the checkpoint
    force: bool = False

    def validate(self) -> None:
        """What can be seen without a checkpoint.

        Raises:
            ValueError: naming the flag, what it was and what it may be.
        """
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit True and --load_in_4bit True exclude each other")
        at_least(self, num_images_in_input=1, num_diffusion_steps_train=1, num_diffusion_steps_inference=1)
        at_least(self, lora_rank=1, ensemble_alpha=0)
        at_most(self, num_images_in_input=16, num_diffusion_steps_train=10_000, lora_rank=4096)
        if self.intrinsics is not None and self.intrinsics not in get_args(Camera):
            raise ValueError(did_you_mean("intrinsics", self.intrinsics, get_args(Camera)))
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device):
            raise ValueError(f"--device is {self.device!r}; expected cpu, cuda or cuda:N")
