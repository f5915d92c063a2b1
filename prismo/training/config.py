"""Flags of `vla-scripts/finetune.py` and `finetune_align.py`: the original's names, defaults and meanings, and our own.

`parse_config` reads the command line; `validate` finds everything that can be wrong without opening a file,
`prismo.training.preflight` what needs a look at files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from prismo.training.bounds import check_bounds
from prismo.util.flags import parse_flags
from prismo.util.text import did_you_mean

if TYPE_CHECKING:  # they take seconds to import, and `--help` needs none of them
    import torch

    from prismo.align import AlignRecipe
    from prismo.models.lora import LoraSpec
    from prismo.training.optim import Schedule

Precision = Literal["auto", "bfloat16", "float32"]
PLACEHOLDER = "your-wandb-"  # the original's defaults of the two Weights & Biases names


@dataclass(frozen=True)
class FinetuneConfig:
    """One training run. Steps always count optimizer updates: checkpoint N holds the weights after exactly N."""

    # --- model
    # Base model: checkpoint folder or hub id. With --resume True --resume_step N also a published or merged checkpoint
    vla_path: str = "openvla/openvla-7b"

    # --- data
    # Folder that holds one folder per RLDS dataset
    data_root_dir: Path = Path("datasets/rlds")
    # Dataset, mixture (libero_4_task_suites_no_noops) or the path of a YAML description of your own data
    dataset_name: str = "aloha_scoop_x_into_bowl"

    # --- run
    # Folder of the run folders; with several machines, one that all of them see
    run_root_dir: Path = Path("runs")

    # --- data
    # Accepted for old commands; nothing is buffered here, any window is read directly and the order is fully shuffled
    shuffle_buffer_size: int = 100_000

    # --- model
    # Regress action chunks with the L1 head; False with use_diffusion False trains discrete action tokens
    use_l1_regression: bool = True
    # Denoise action chunks (DDIM); excludes use_l1_regression
    use_diffusion: bool = False
    # Action head by name: l1, diffusion, discrete, or one of your own. Default: as the two flags above say
    action_head: str | None = None
    # Timesteps of the diffusion schedule
    num_diffusion_steps_train: int = 50
    # Let the instruction modulate the vision towers
    use_film: bool = False
    # Cameras per sample: 1 = third person, 2 = and wrist
    num_images_in_input: int = 1
    # Feed the robot state as a token
    use_proprio: bool = False

    # --- optimisation
    # Samples per process and micro-batch
    batch_size: int = 8
    # AdamW's rate after warm-up, for everything that is trained (full fine-tuning of SpatialVLA: 2e-5)
    learning_rate: float = 5e-4
    # Updates over which the rate rises linearly from a tenth to the whole; the decay then acts as usual
    lr_warmup_steps: int = 0
    # MultiStepLR: updates after which the rate is a tenth
    num_steps_before_decay: int = 100_000
    # Micro-batches per update
    grad_accumulation_steps: int = 1
    # Updates of the whole run (resumed runs count on)
    max_steps: int = 200_000

    # --- validation
    # Validate on held-out episodes
    use_val_set: bool = False
    # Updates between validations
    val_freq: int = 10_000
    # Seconds after which a validation stops early
    val_time_limit: int = 180

    # --- checkpoints
    # Updates between checkpoints; the last update always gives one
    save_freq: int = 10_000
    # Keep one checkpoint, in the run folder itself and named "latest", instead of a folder per step beside it
    save_latest_checkpoint_only: bool = False

    # --- optimisation
    # MultiStepLR, CosineAnnealingLR (down to a thousandth at max_steps) or LinearLR (down to 0 at max_steps)
    scheduler: str = "MultiStepLR"

    # --- checkpoints
    # Continue: from the newest complete checkpoint of this run (weights, optimizer, schedule, noise and data position),
    # or with resume_step from the checkpoint in vla_path. "auto" starts the run where there is nothing to continue yet
    resume: bool | Literal["auto"] = False
    # Step of the checkpoint in vla_path to continue from. Folders without trainer state (published ones) restore the
    # side modules and the step only
    resume_step: int | None = None

    # --- data
    # Random crop and colour jitter
    image_aug: bool = True

    # --- validation
    # Updates between the full denoisings that measure the L1 error of a diffusion head
    diffusion_sample_freq: int = 50

    # --- model
    # Adapters on a frozen base. False = full fine-tuning, for SpatialVLA only; several GPUs then share one copy (FSDP2)
    use_lora: bool = True
    # Rank of the adapters
    lora_rank: int = 32
    # Dropout in front of the adapters
    lora_dropout: float = 0.0

    # --- checkpoints
    # Also write each checkpoint as a complete, merged model (15 GB; can be done later by the merge script)
    merge_lora_during_training: bool = True

    # --- logging
    # Weights & Biases account; giving it or the project switches logging there on
    wandb_entity: str = "your-wandb-entity"
    # Weights & Biases project
    wandb_project: str = "your-wandb-project"

    # --- run
    # Suffix of the run's name
    run_id_note: str | None = None
    # The run's name instead of the generated one
    run_id_override: str | None = None

    # --- logging
    # Updates between two entries of all logs
    wandb_log_freq: int = 10

    # --- optimisation
    # Seed of initial weights, sample order, augmentation, dropout and diffusion noise
    seed: int = 7
    # Gradients are scaled down to this norm; 0 switches clipping off, as in the original
    max_grad_norm: float = 1.0
    # Recompute activations in the backward pass: about a third slower, a fraction of the memory
    gradient_checkpointing: bool = False

    # --- machine
    # "cuda" or "cpu". Default: the GPU where there is one
    device: str | None = None
    # Of the frozen base and the computation; "auto" = bfloat16 on a GPU, float32 on a CPU. What is trained is float32
    dtype: str = "auto"

    # --- optimisation
    # AdamW's weight decay
    weight_decay: float = 0.01

    # --- model
    # Alpha of the adapters. Default: min(rank, 16) for OpenVLA, the rank for SpatialVLA
    lora_alpha: int | None = None

    # --- SpatialVLA
    # SpatialVLA, full fine-tuning: keep the text embeddings as they are
    freeze_llm_embed: bool = True
    # SpatialVLA, full fine-tuning: keep SigLIP as it is
    freeze_vision_tower: bool = False
    # SpatialVLA: cut the action bins from these Gaussians (`prismo data gaussians`). Default: the checkpoint's
    adapt_emb: Path | None = None
    # With adapt_emb: also move the action embeddings to the new bins and train them; else token k keeps its embedding
    adpt_feature: bool = False
    # With adapt_emb: no Gaussian is narrower than this
    min_sigma: float = 0.0
    # SpatialVLA: camera of the pictures, "checkpoint" (stored for the dataset, else the authors' WidowX) or "libero"
    intrinsics: str = "checkpoint"

    # --- machine
    # Compile the transformer blocks (faster steps after a start of a few minutes)
    compile: bool = False
    # Decoding processes per training process. Default: this process's share of the cores, 8 at most
    num_workers: int | None = None

    # --- data
    # Train on the last frames of episodes, too, whose missing actions are masked (the original leaves them out)
    use_tail: bool = False

    # --- validation
    # Share of episodes held out by use_val_set, chosen by their content; 0 uses the dataset's own "val" split
    val_fraction: float = 0.05

    # --- model
    # Start FiLM as the identity; False starts at random, as the original
    film_identity_init: bool = True
    # Leave padding out of FiLM's mean over the instruction, as in prediction; False takes it in, as the original
    film_exclude_padding: bool = True

    # --- optimisation
    # Auxiliary losses beside the alignment, by their names in prismo/align/auxiliary.py, separated by commas
    auxiliaries: str | None = None

    # --- checkpoints
    # Step folders to keep, newest first. Default: all
    keep_last: int | None = None
    # Checkpoints that keep what resuming needs, newest first; it is several times as large as an adapter
    keep_states: int = 1

    # --- logging
    # Log to Weights & Biases (WANDB_MODE is respected). Default: when wandb_entity or wandb_project is given
    use_wandb: bool | None = None
    # Also write TensorBoard files into the run folder
    use_tensorboard: bool = False

    # --- run
    # Check everything, print the resolved configuration, sizes and expected memory, write a picture of the first
    # batch as the model sees it, and stop
    dry_run: bool = False

    @property
    def align_recipe(self) -> AlignRecipe | None:
        """Settings of the alignment; None = train without a teacher."""
        return None

    @property
    def compiles(self) -> bool:
        """Whether anything is compiled, for which torch starts processes of its own."""
        return self.compile

    @property
    def head(self) -> str:
        """How actions are predicted, a key of `prismo.models.heads.HEADS`."""
        flags = "diffusion" if self.use_diffusion else "l1" if self.use_l1_regression else "discrete"
        return self.action_head or flags

    @property
    def lora(self) -> LoraSpec:
        from prismo.models.lora import LoraSpec

        return LoraSpec(self.lora_rank, self.lora_alpha, self.lora_dropout)

    @property
    def schedule(self) -> Schedule:
        from prismo.training.optim import Schedule

        return Schedule(
            peak=self.learning_rate,
            kind=self.scheduler,
            warmup_steps=self.lr_warmup_steps,
            decay_step=self.num_steps_before_decay,
            max_steps=self.max_steps,
        )

    @property
    def wandb_wanted(self) -> bool:
        given = not (self.wandb_entity.startswith(PLACEHOLDER) and self.wandb_project.startswith(PLACEHOLDER))
        return given if self.use_wandb is None else self.use_wandb

    def precision(self, device: torch.device) -> torch.dtype:
        """Of base weights and computation on `device`."""
        import torch

        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    def validate(self) -> None:
        """Everything that can be seen without a file.

        Raises:
            ValueError: naming the flag, what it was and what it may be.
        """
        if self.use_l1_regression and self.use_diffusion:
            raise ValueError("--use_l1_regression True and --use_diffusion True exclude each other; set one to False")
        if self.use_diffusion and self.action_head not in (None, "diffusion"):
            raise ValueError(f"--use_diffusion True and --action_head {self.action_head} exclude each other; drop one")
        if self.action_head is not None:
            from prismo.models.heads import HEADS

            _check_choice("action_head", self.action_head, HEADS)
        if self.auxiliaries is not None:
            from prismo.align.auxiliary import AUXILIARIES

            for name in self.auxiliaries.split(","):
                _check_choice("auxiliaries", name, AUXILIARIES.keys() - {"alignment"})
        _check_choice("dtype", self.dtype, get_args(Precision))
        _check_choice("device", self.device or "cpu", ("cpu", "cuda"))
        for field in fields(self):
            check_bounds(field.name, getattr(self, field.name))
        for flag in ("run_id_note", "run_id_override"):
            if getattr(self, flag):
                check_name(f"--{flag}", getattr(self, flag))
        if self.resume_step is not None and self.resume is not True:
            raise ValueError("--resume_step is given without --resume True")
        if self.resume_step is not None and self.resume_step >= self.max_steps:
            raise ValueError(f"--resume_step {self.resume_step} is not below --max_steps {self.max_steps}")
        if self.save_latest_checkpoint_only and (self.keep_last is not None or self.keep_states != 1):
            raise ValueError(
                "--keep_last and --keep_states count step folders, --save_latest_checkpoint_only True writes none"
            )
        _ = self.lora, self.schedule, self.align_recipe  # their own checks


@dataclass(frozen=True)
class FinetuneAlignConfig(FinetuneConfig):
    """A training run with Spatial Forcing: vision tokens are aligned with features of a frozen teacher."""

    # --- alignment
    # Weights of VGGT-1B (model.pt or a folder with it), or of another teacher. "random" needs none
    vggt_path: str = "official_ckpts/vggt_model.pt"
    # Alignment objective; only "cosine"
    align_loss_type: str = "cosine"
    # Weight of the alignment loss; 0 switches the teacher off, it is not even loaded
    align_loss_coeff: float = 0.5
    # How the teacher's feature grid becomes the policy's; only "bilinear"
    pooling_func: str = "bilinear"
    # Hidden state to align: 0 = input embeddings, k = output of decoder layer k, -1 = last (paper: 24)
    vla_layers_align: int = -1
    # Teacher layer to align with (paper: -1)
    vggt_layers_align: int = -1
    # LayerNorm on the hidden states in front of the projector (paper: True)
    use_vlm_norm: bool = False
    # Position embedding on the teacher's features (paper: True)
    use_vggt_pe: bool = False
    # Compare teacher patch j with the token of patch j + 1, as all published runs do
    gain_feat_1move: bool = True

    # Teacher: "vggt", or "random" for the untrained control
    teacher: str = "vggt"
    # Weights of another teacher than VGGT, as its loader takes them. Default: vggt_path, if that is given
    teacher_weights: str | None = None
    # Of the teacher's weights; "auto" = as dtype
    vggt_dtype: str = "auto"

    # --- machine
    # Compile the teacher's blocks
    compile_vggt: bool = False

    # --- alignment
    # Updates between pictures of the cosine map; 0 = none
    align_map_freq: int = 1000

    @property
    def align_recipe(self) -> AlignRecipe | None:
        if self.align_loss_coeff == 0:
            return None
        from prismo.align import AlignRecipe

        return AlignRecipe(**{field.name: getattr(self, field.name) for field in fields(AlignRecipe)})

    @property
    def compiles(self) -> bool:
        return self.compile or self.compile_vggt

    @property
    def teacher_path(self) -> str | None:
        """File of the teacher. The default of `vggt_path` is VGGT's and means nothing to another."""
        if self.teacher_weights is not None:
            return self.teacher_weights
        is_given = self.teacher == "vggt" or self.vggt_path != type(self).vggt_path
        return self.vggt_path if is_given else None

    def teacher_precision(self, device: torch.device) -> torch.dtype:
        """Of the teacher's weights on `device`."""
        import torch

        return self.precision(device) if self.vggt_dtype == "auto" else getattr(torch, self.vggt_dtype)

    def validate(self) -> None:
        super().validate()
        from prismo.align import TEACHERS

        _check_choice("teacher", self.teacher, TEACHERS)
        _check_choice("vggt_dtype", self.vggt_dtype, get_args(Precision))


_LONGEST_NAME = 200  # bytes; a file system takes 255, and checkpoints add to a run's name

C = TypeVar("C", bound=FinetuneConfig)


def parse_config(kind: type[C], arguments: Sequence[str] | None = None, about: str | None = None) -> C:
    """Read the flags as `prismo.util.flags.parse_flags` does, and validate them.

    Raises:
        ValueError: an unknown flag or key (with the nearest one), or a value that cannot be.
    """
    config = parse_flags(kind, arguments, about)
    config.validate()
    return config


def check_name(what: str, name: str) -> str:
    """A name that a run may have: one part of a path, in which checkpoints keep theirs.

    Raises:
        ValueError: begins with `what`.
    """
    taken = name.startswith(".") or name == "latest" or name != name.strip() or re.search(r"--\d+_chkpt$", name)
    if taken or "/" in name or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{what} is {name!r}; a name of a folder is expected: at most {_LONGEST_NAME} printable characters without "
            '/, not beginning with a dot, not ending like a checkpoint and not "latest"'
        )
    return name


def _check_choice(flag: str, value: str, options: Collection[str]) -> None:
    if value not in options:
        raise ValueError(did_you_mean(f"value of --{flag}", value, options))
