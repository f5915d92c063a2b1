"""`--dry_run`: what a run would do, without reading weights: flags, sizes, memory, and its first batch as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from prismo.align import teacher_sizes
from prismo.data.dataset import WindowDataset
from prismo.data.loader import Batch
from prismo.data.names import action_names, proprio_names, view_name
from prismo.embodiment import Embodiment
from prismo.training.config import PLACEHOLDER, FinetuneAlignConfig, FinetuneConfig
from prismo.training.objective import Objective
from prismo.training.pictures import Row, Table, contact_sheet, save_picture
from prismo.training.task import RunSizes


def trained_parameters(objective: Objective, rest_of_model: str) -> dict[str, int]:
    """Trained weights by part; `rest_of_model` names those of the policy that are no adapters."""
    stems = {weight: stem for stem, module in objective.components().items() for weight in module.parameters()}
    trained: dict[str, int] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            rest = rest_of_model if name.startswith("vla.") else name.split(".")[0]
            part = "LoRA" if ".lora_" in name else stems.get(parameter, rest)
            trained[part] = trained.get(part, 0) + parameter.numel()
    return trained


def teacher_parameters(config: FinetuneConfig) -> int:
    """Frozen weights of the teacher, if the run has one."""
    if config.align_recipe is None or not isinstance(config, FinetuneAlignConfig):
        return 0
    return teacher_sizes(config.teacher, config.teacher_path).parameters


def expected_memory(
    config: FinetuneConfig, sizes: RunSizes, teacher: int, device: torch.device, processes: int
) -> dict[str, float]:
    """GiB per process by purpose. Weights and optimizer are exact; activations are an estimate (about 20 %)."""
    bytes_of = {torch.float32: 4, torch.bfloat16: 2}
    llm, tokens = sizes.llm, config.batch_size * sizes.tokens
    share = 1 if config.use_lora else processes  # of what FSDP2 spreads
    precision = bytes_of[config.precision(device)]
    # Kept for the backward pass of a decoder layer with adapters on all linear layers, in numbers per token: the inputs
    # of the norms (fp32), their outputs, q, k, v, the attention's output, and four tensors of the MLP's width.
    layer = (11 * llm.hidden_size + 5 * llm.intermediate_size) * precision
    kept = llm.hidden_size * precision if config.gradient_checkpointing else layer
    per_weight = 4 if not isinstance(config, FinetuneAlignConfig) else bytes_of[config.teacher_precision(device)]
    gib = 2**30
    return {
        "base weights": sizes.base * precision / gib,
        "teacher weights": teacher * per_weight / gib,
        "trained weights, gradients, moments (fp32)": sizes.total_trained * 16 / share / gib,
        "activations (estimate)": tokens * (llm.num_hidden_layers * kept + layer) / gib,
    }


def describe(
    config: FinetuneConfig, device: torch.device, run: Path, sizes: RunSizes, teacher: int, memory: dict[str, float]
) -> str:
    """The text of a dry run. What is not set, such as a limit of checkpoints to keep, is left out."""
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | _resolved(config, device)
    given = {name: value for name, value in flags.items() if value is not None and PLACEHOLDER not in str(value)}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    lines = [yaml.safe_dump(plain, sort_keys=False).rstrip(), "", f"run folder: {run}", "", "parameters"]
    lines += [f"  base (frozen)     {sizes.base:>15,}", f"  teacher (frozen)  {teacher:>15,}"]
    lines += [f"  {part:17s} {count:>15,}" for part, count in sizes.trained.items()]
    lines += [f"  trained           {sizes.total_trained:>15,}", "", "expected memory per process, GiB"]
    lines += [f"  {name:43s} {value:8.2f}" for name, value in memory.items()]
    lines += [f"  {'together':43s} {sum(memory.values()):8.2f}"]
    return "\n".join(lines)


def describe_data(dataset: WindowDataset) -> str:
    """What an epoch is made of: windows of each dataset, by its weight in a mixture."""
    lines = ["windows per epoch"]
    for source in dataset.sources:
        weighted = f"  x {source.weight:g} = {max(1, round(source.num_windows * source.weight)):,}"
        lines.append(f"  {source.name:43s} {source.num_windows:,}{weighted if source.weight != 1 else ''}")
    return "\n".join(lines)


def _resolved(config: FinetuneConfig, device: torch.device) -> dict[str, object]:
    """What "auto" and None stand for on this machine."""

    def name(precision: torch.dtype) -> str:
        return str(precision).removeprefix("torch.")

    values = {
        "device": device.type,
        "dtype": name(config.precision(device)),
        "lora_alpha": config.lora.resolved_alpha,
        "use_wandb": config.wandb_wanted,
    }
    if isinstance(config, FinetuneAlignConfig):
        values |= {"vggt_dtype": name(config.teacher_precision(device))}
    return values


def first_batch_picture(
    batch: Batch, pictures: Tensor, robot: Embodiment, prompt: Callable[[str], str], path: Path
) -> Path:
    """Write the first batch as the model sees it: augmented, normalised and back, with its numbers and its prompt.

    Args:
        batch: from the loader.
        pictures: of it, float [B, V, 3, H, W] in [0, 1].
        robot: whose actions and proprio these are.
        prompt: instruction -> the text in front of the actions.
        path: of the PNG.
    """
    rows = []
    for i, instruction in enumerate(batch.instructions):
        place = f"{batch.dataset_names[i]} episode {int(batch.episode[i])} step {int(batch.step[i])}"
        lines = [place, *prompt(instruction).strip().splitlines()]
        actions = Table("actions of the chunk, normalised", action_names(robot), _cells(batch.actions[i]))
        proprio = Table("proprio, normalised", proprio_names(robot), _cells(batch.proprio[i : i + 1]))
        rows.append(Row(pictures[i], lines, (actions, proprio)))
    names = [view_name(view) for view in range(pictures.shape[1])]
    return save_picture(contact_sheet("first batch, as the model sees it", names, rows), path)


def _cells(values: Tensor) -> list[list[str]]:
    return [[f"{value:.3f}" for value in row] for row in values.tolist()]
