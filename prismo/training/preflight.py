"""Everything about a run that can be wrong and costs only a look at files: paths, sizes, what to resume.

It runs before any weights are read and before a dataset is indexed.
"""

from __future__ import annotations

import importlib.util
import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic

from prismo.align import teacher_sizes
from prismo.align.recipe import layer_index
from prismo.data.resolve import resolve
from prismo.families import all_families, family_of, foreign_flags, settings_folder
from prismo.merging.merge import resolve_base
from prismo.models.folder import TRAINING_CONFIG
from prismo.models.weight_files import fingerprint, stored_tensors
from prismo.training.checkpoint import base_of, check_same_run, check_state, read_state
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.training.run_folder import Resume, RunFolder, find_resume, run_folder
from prismo.training.task import C, ModelFamily
from prismo.util.extras import install_hint
from prismo.util.hub import is_hub_id
from prismo.util.problems import check_all

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan(Generic[C]):
    """A run that can start.

    Attributes:
        config: the flags; a resumed run takes its base model from the checkpoint.
        run: where it writes.
        resume: what it continues from.
    """

    config: C
    run: RunFolder
    resume: Resume | None


def make_plan(config: C, world_size: int, held: ExitStack) -> Plan[C]:
    """Take the run for this process and check the files that it needs.

    Args:
        held: gets the lock on the run, unless it is a dry run, which changes nothing.

    Raises:
        FileNotFoundError, ValueError, OSError: one sentence on what is wrong and what to do.
    """
    run = run_folder(config)
    if not config.dry_run:
        held.enter_context(run.locked())
    resume = find_resume(config, run)
    exact = resume is not None and resume.exact
    if exact:
        config = _base_of(config, resume)
    check_all(*(partial(check, config) for check in _LOCAL))
    base = settings_folder(config.vla_path)
    _refuse_foreign(config, base)
    family: ModelFamily = family_of(base).load("training")
    config = family.check_flags(config, base, world_size)
    _check_layers(config, family.hidden_states(base))
    if exact:
        _check_continuation(config, resume)
    if not config.dry_run:  # from here on gigabytes may be downloaded
        base = resolve_base(config.vla_path)
        if exact:
            _check_fingerprint(base, resume)
    if resume is not None and not exact:
        _check_writes_elsewhere(config, run, base)
    _warn_of_small_batch(config, world_size, family.usual_batch)
    return Plan(replace(config, resume=resume is not None), run, resume)


def _refuse_foreign(config: FinetuneConfig, base: Path) -> None:
    family = family_of(base)
    if given := foreign_flags(config, family):
        raise ValueError(f"{config.vla_path} is of {family.title}; leave out {', '.join(given)}")


def _check_local_base(config: FinetuneConfig) -> None:
    if Path(config.vla_path).is_dir() or not is_hub_id(config.vla_path):
        resolve_base(config.vla_path)


def _warn_of_small_batch(config: FinetuneConfig, world_size: int, usual: int) -> None:
    total = config.batch_size * config.grad_accumulation_steps * world_size
    if total < usual // 2:
        _LOG.warning(
            "%d samples per update; the published runs use %d, and runs below %d usually end lower. "
            "--grad_accumulation_steps %d would make up for it",
            total,
            usual,
            usual // 2,
            -(-usual // (config.batch_size * world_size)),
        )


def _base_of(config: C, resume: Resume) -> C:
    """The flags with the base model of the checkpoint, where vla_path names the checkpoint itself."""
    given = Path(config.vla_path)
    if given.is_dir() and ((given / TRAINING_CONFIG).is_file() or given.resolve() == resume.folder.resolve()):
        return replace(config, vla_path=base_of(resume.folder))
    return config


def _check_continuation(config: FinetuneConfig, resume: Resume) -> None:
    """The checkpoint is whole, and made with these flags."""
    check_state(resume.folder)
    if changes := check_same_run(resume.folder, config):
        _LOG.warning("the state is restored exactly, but the run goes on with changed flags: %s", ", ".join(changes))


def _check_fingerprint(base: Path, resume: Resume) -> None:
    if fingerprint(stored_tensors(base)) != read_state(resume.folder).base_fingerprint:
        raise ValueError(
            f"{resume.folder} was trained on other weights than those in {base}; pass the model that the run started "
            "from as --vla_path"
        )


def _check_writes_elsewhere(config: FinetuneConfig, run: RunFolder, base: Path) -> None:
    if (
        config.merge_lora_during_training
        and config.save_latest_checkpoint_only
        and run.path.resolve() == base.resolve()
    ):
        raise ValueError(
            f"this run would merge into {base}, which is the base model of its own adapters. Give it another folder "
            "with --run_id_override, or set --save_latest_checkpoint_only False"
        )


def _check_teacher(config: FinetuneConfig) -> None:
    """The teacher is there and has the layer to align with."""
    recipe = config.align_recipe
    if recipe is not None and isinstance(config, FinetuneAlignConfig):
        layer_index(recipe.vggt_layers_align, teacher_sizes(config.teacher, config.teacher_path).layers)


def _check_layers(config: FinetuneConfig, states: int) -> None:
    """The policy has the layer to align."""
    recipe = config.align_recipe
    if recipe is not None and not -states <= recipe.vla_layers_align < states:
        raise ValueError(
            f"--vla_layers_align {recipe.vla_layers_align}: {config.vla_path} has {states} hidden states, "
            f"{-states} to {states - 1} (the paper aligns 24 of 33)"
        )


def _check_dataset(config: FinetuneConfig) -> None:
    """The dataset is there and has the cameras."""
    for entry in resolve(config.data_root_dir, config.dataset_name):
        cameras = entry.spec.cameras
        if config.num_images_in_input > len(cameras):
            raise ValueError(
                f"--num_images_in_input {config.num_images_in_input}, but {entry.spec.name} has {len(cameras)} "
                f"({', '.join(cameras)})"
            )


def _check_extras(config: FinetuneConfig) -> None:
    for wanted, package in ((config.wandb_wanted, "wandb"), (config.use_tensorboard, "tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"logging to {package} needs the package: {install_hint(package)}")


def _check_family_files(config: FinetuneConfig) -> None:
    """Files that flags of one family name are there, whichever family the base turns out to be of."""
    check_all(*(partial(family.check_given, config) for family in all_families()))


# What shows without asking the hub and without the base model: all of it is listed at once.
_LOCAL = (_check_local_base, _check_teacher, _check_dataset, _check_family_files, _check_extras)
