"""Between which values the numbers among the flags of a training lie."""

from __future__ import annotations

_ENDLESS = 10**9  # updates
# Every flag that is a number: the smallest and the largest value. Behind them lie slips of the keyboard, tracebacks of
# libraries, and numbers that mean nothing (NaN is in no range).
BOUNDS: dict[str, tuple[float, float]] = {
    "shuffle_buffer_size": (0, _ENDLESS),
    "num_diffusion_steps_train": (1, 10_000),
    "num_images_in_input": (1, 16),
    "batch_size": (1, 4096),
    "learning_rate": (1e-12, 1),
    "lr_warmup_steps": (0, _ENDLESS),
    "num_steps_before_decay": (0, _ENDLESS),
    "grad_accumulation_steps": (1, 100_000),
    "max_steps": (1, _ENDLESS),
    "val_freq": (1, _ENDLESS),
    "val_time_limit": (1, 10**7),
    "save_freq": (1, _ENDLESS),
    "resume_step": (0, _ENDLESS),
    "diffusion_sample_freq": (1, _ENDLESS),
    "lora_rank": (1, 4096),
    "lora_dropout": (0, 0.99),
    "wandb_log_freq": (1, _ENDLESS),
    "seed": (0, 2**32 - 1),
    "max_grad_norm": (0, 1e6),
    "weight_decay": (0, 1),
    "lora_alpha": (1, 65_536),
    "min_sigma": (0, 100),
    "num_workers": (0, 1024),
    "val_fraction": (0, 0.99),
    "keep_last": (1, _ENDLESS),
    "keep_states": (1, _ENDLESS),
    "align_loss_coeff": (0, 1e6),
    "vla_layers_align": (-1000, 1000),
    "vggt_layers_align": (-1000, 1000),
    "align_map_freq": (0, _ENDLESS),
}


def check_bounds(flag: str, value: float | None) -> None:
    """Refuse a number out of its bounds. None passes: it was not given; and so does a flag that is no number.

    Raises:
        ValueError: naming the flag, its value and the bound.
    """
    if flag not in BOUNDS or value is None:
        return
    low, high = BOUNDS[flag]
    if not value >= low:
        raise ValueError(f"--{flag} is {value}; expected at least {low}")
    if value > high:
        raise ValueError(f"--{flag} is {value}; expected at most {high}")
