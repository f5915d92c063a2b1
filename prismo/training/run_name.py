"""The generated name of a run: the original's, and behind it what was set otherwise than in the published runs.

The published commands give exactly the published names, and so do the original's defaults. Every other value of a flag
that an ablation varies adds a word, so that its arms lie beside each other: `...--image_aug--layer-16--seed-8`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismo.training.config import FinetuneConfig, check_name

if TYPE_CHECKING:
    from prismo.families import Family

# Flag -> its word. Left out are flags that make a run longer (`max_steps`, `num_steps_before_decay`) and those of speed
# and logging; data, batch, rate, adapters and augmentation are in the original's part of the name.
_WORDS = {
    "use_film": "film",
    "num_images_in_input": "images",
    "use_proprio": "proprio",
    "lora_alpha": "alpha",
    "freeze_llm_embed": "frozen_embed",
    "freeze_vision_tower": "frozen_vision",
    "adapt_emb": "adapted_bins",
    "adpt_feature": "adapted_embed",
    "min_sigma": "min_sigma",
    "intrinsics": "camera",
    "scheduler": "scheduler",
    "lr_warmup_steps": "warmup",
    "weight_decay": "decay",
    "max_grad_norm": "clip",
    "use_tail": "tail",
    "use_val_set": "val",
    "seed": "seed",
    "auxiliaries": "aux",
}
_ALIGNMENT_WORDS = {
    "teacher": "teacher",
    "vla_layers_align": "layer",
    "vggt_layers_align": "teacher_layer",
    "align_loss_coeff": "align",
    "use_vlm_norm": "vlm_norm",
    "use_vggt_pe": "vggt_pe",
    "gain_feat_1move": "1move",
}
_ALIGNED = {"use_vlm_norm": True, "use_vggt_pe": True}  # what the published commands set
_HEAD = ("use_l1_regression", "use_diffusion", "action_head")


def run_id(config: FinetuneConfig) -> str:
    """Name of a new run.

    Raises:
        ValueError: too long for a folder.
    """
    if config.run_id_override:
        return config.run_id_override
    base = config.vla_path.rstrip("/").split("/")[-1]
    dataset = Path(config.dataset_name).stem if config.dataset_name.endswith((".yaml", ".yml")) else config.dataset_name
    batch = config.batch_size * config.grad_accumulation_steps
    name = f"{base}+{dataset.replace('/', '-')}+b{batch}+lr-{config.learning_rate}"
    name += f"+lora-r{config.lora_rank}+dropout-{config.lora_dropout}" if config.use_lora else "+full"
    parts = [name, *(["image_aug"] if config.image_aug else []), *_differences(config)]
    parts += [config.run_id_note] if config.run_id_note else []
    return check_name("without --run_id_override the name of this run", "--".join(parts))


def naming_flags(config: FinetuneConfig) -> list[str]:
    """Flags whose values are in the name."""
    original = ["vla_path", "dataset_name", "batch_size", "grad_accumulation_steps", "learning_rate", "use_lora"]
    original += ["lora_rank", "lora_dropout", "image_aug", "run_id_note", "run_id_override"]
    family = _family(config)
    return [*original, *(flag for flag in _HEAD if flag not in family.settled), *_words(config, family)]


def _family(config: FinetuneConfig) -> Family:
    """By the name, because a run is named before anything is fetched; with another name its words are but more."""
    from prismo.families import family_of_name  # noqa: PLC0415 (takes seconds, and not every report names a run)

    return family_of_name(config.vla_path)


def _is_aligned(config: FinetuneConfig) -> bool:
    """Without `align_recipe`, which takes torch: names are asked for where nothing trains."""
    return getattr(config, "align_loss_coeff", 0) != 0


def _words(config: FinetuneConfig, family: Family) -> dict[str, str]:
    """The flags that can add a word to this run's name."""
    words = _WORDS | (_ALIGNMENT_WORDS if _is_aligned(config) else {})
    return {flag: word for flag, word in words.items() if flag not in family.settled}


def _differences(config: FinetuneConfig) -> list[str]:
    """A word for each flag that differs from the published settings; none if all are the original's defaults."""
    family = _family(config)
    words = _words(config, family)
    values = {flag: _value(config, flag, family) for flag in words}
    defaults = {field.name: field.default for field in fields(config)} | {"adapt_emb": False}
    expected = {flag: (defaults | family.published | _ALIGNED)[flag] for flag in words}
    head: list[str] = [] if config.head == "l1" or "use_l1_regression" in family.settled else [config.head]
    head += ["no_align"] if "align_loss_coeff" in defaults and not _is_aligned(config) else []
    if not head and all(defaults[flag] == value for flag, value in values.items()):
        return []
    return head + [_word(words[flag], value) for flag, value in values.items() if value != expected[flag]]


def _value(config: FinetuneConfig, flag: str, family: Family) -> Any:
    """The value as it is compared: of a file only whether it is given, of an alpha nothing if it is the usual one."""
    if flag == "lora_alpha":
        is_usual = config.lora_alpha == family.lora_alpha(config.lora_rank)
        return None if is_usual or not config.use_lora else config.lora_alpha
    return config.adapt_emb is not None if flag == "adapt_emb" else getattr(config, flag)


def _word(word: str, value: Any) -> str:
    if isinstance(value, bool):
        return word if value else f"no_{word}"
    return f"{word}-{value:g}" if isinstance(value, float) else f"{word}-{value}"
