"""From the flags to a finished run: `prismo train` and `prismo finetune` call `run`."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from prismo.data.dataset import WindowDataset, open_dataset
from prismo.data.images import prepare_images
from prismo.data.loader import CollateText, Loader, usual_workers
from prismo.data.normalize import dump_statistics
from prismo.families import family_of, settings_folder
from prismo.merging.merge import resolve_base
from prismo.models.self_test import SelfTestError
from prismo.training.action_error import ActionErrors
from prismo.training.checkpoint import read_state
from prismo.training.config import FinetuneConfig
from prismo.training.distributed import World, start_world, stop_world
from prismo.training.logs import Sink, open_online
from prismo.training.preflight import Plan, make_plan
from prismo.training.preview import describe, describe_data, expected_memory, first_batch_picture, teacher_parameters
from prismo.training.run_folder import Resume
from prismo.training.summary import run_summary
from prismo.training.task import ModelFamily
from prismo.training.text_log import RunLog
from prismo.training.trainer import NonFiniteLossError, RunData, Trainer
from prismo.util.cli import log_error
from prismo.util.reaper import end_descendants_of_this_process

_LOG = logging.getLogger(__name__)
_WRONG_INPUT = (ValueError, OSError, SelfTestError)


def run(config: FinetuneConfig, is_main: bool) -> int:
    """Run a training; returns the process's exit code: 0 done or stopped by a signal, 1 broken off, 2 wrong input.

    Args:
        is_main: whether this is the first of the job's processes, which says what is wrong with all of them.
    """
    with RunLog() as log:
        return _run(config, is_main, log)


def _run(config: FinetuneConfig, is_main: bool, log: RunLog) -> int:
    try:
        world = start_world(config.device)
    except _WRONG_INPUT as error:
        return _fail(error, 2, is_main)
    try:
        with ExitStack() as held:
            plan, online = _plan_on_all(config, world, held)
            if plan.config.dry_run:
                _dry_run(plan, world)
            else:
                _train(plan, world, online, log)
    except NonFiniteLossError as error:
        return _fail(error, 1, is_main)
    except _WRONG_INPUT as error:
        return _fail(error, 2, True)
    finally:
        stop_world()
    return 0


def _fail(error: Exception, code: int, show: bool) -> int:
    if show:
        log_error(error)
    return code


def _plan_on_all(config: FinetuneConfig, world: World, held: ExitStack) -> tuple[Plan, list[Sink]]:
    """The main process looks at the files and takes the run; all processes get its result, or stop with its error.

    It also opens the logs that may be refused from outside, before minutes go by with reading weights.
    """
    plan: Plan | None = None
    online: list[Sink] = []
    failure: Exception | None = None
    if world.is_main:
        try:
            plan = make_plan(config, world.size, held)
            online = [] if config.dry_run else open_online(plan.config, plan.run.path, plan.resume is not None)
        except _WRONG_INPUT as error:
            failure = error
    plan = world.broadcast(plan)
    if failure:
        raise failure
    if plan is None:
        sys.exit(2)
    return plan, online


def _train(plan: Plan, world: World, online: list[Sink], log: RunLog) -> None:
    config = plan.config
    if config.compiles:
        end_descendants_of_this_process()
    base = resolve_base(config.vla_path)
    family: ModelFamily = family_of(base).load("training")
    data = _open_datasets(config, family, base)
    collate = family.load_collate(config, base)
    robot = data[0].embodiment
    loaders = _loaders(config, data, collate, world)
    if plan.resume is not None and plan.resume.exact:
        _check_position(plan.resume, loaders[0])
    task = family.load_task(config, base, robot, data[0].statistics, world)
    if world.is_main:
        log.open(plan.run.path)
        dump_statistics(data[0].statistics, plan.run.path / "dataset_statistics.json")
        trained = sum(p.numel() for p in task.objective.parameters() if p.requires_grad)
        windows = loaders[0].samples_per_epoch
        _LOG.info("%s: %s windows per epoch, %s trained weights", plan.run.path.name, f"{windows:,}", f"{trained:,}")
    errors = ActionErrors(data[0].statistics, robot, world.device)
    trainer = Trainer(config, task, RunData(*loaders, errors), plan.run, world, plan.resume, online)
    done = trainer.fit()
    if world.is_main:
        _LOG.info(
            "%s after update %d of %d", "finished" if done >= config.max_steps else "stopped", done, config.max_steps
        )
        if done:
            _LOG.info("%s", run_summary(plan.run.path))


def _open_datasets(config: FinetuneConfig, family: ModelFamily, base: Path) -> list[WindowDataset]:
    """Training windows and, if asked, held-out ones, with chunks and, where sizes differ, pictures as the model's."""
    windows = partial(
        open_dataset,
        config.data_root_dir,
        config.dataset_name,
        num_images=config.num_images_in_input,
        chunk=family.chunk(base),
        size=family.image_size(base),
        use_tail=config.use_tail,
        val_fraction=config.val_fraction if config.use_val_set else 0.0,
    )
    train = windows()
    return [train, windows(split="val", statistics=train.statistics)] if config.use_val_set else [train]


def _loaders(
    config: FinetuneConfig, data: list[WindowDataset], collate: CollateText, world: World
) -> tuple[Loader, Loader | None]:
    """Training and validation batches of this process; None in place of a validation that is not wanted."""
    batches = partial(
        Loader,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.num_workers,
        collate_text=collate,
        pin_memory=world.device.type == "cuda",
    )
    return batches(data[0]), batches(data[1], epochs=1) if len(data) > 1 else None


def _check_position(resume: Resume, loader: Loader) -> None:
    """The place in the data that a run goes on from exists."""
    sample, size = read_state(resume.folder).data.sample, loader.samples_per_epoch
    if sample >= size:
        raise ValueError(
            f"{resume.folder} was saved at sample {sample} of an epoch, which has {size} here: the dataset is not "
            "the one that the run was started with"
        )


def _dry_run(plan: Plan, world: World) -> None:
    """Print and draw what the run would do."""
    if not world.is_main:
        return
    config = replace(plan.config, num_workers=0)
    base = settings_folder(config.vla_path)
    family: ModelFamily = family_of(base).load("training")
    data = _open_datasets(config, family, base)
    sizes, teacher = family.sizes(config, base, data[0].embodiment), teacher_parameters(config)
    memory = expected_memory(config, sizes, teacher, world.device, world.size)
    collate, alone = family.load_collate(config, base), replace(world, size=1, device=torch.device("cpu"))
    batch = next(iter(_loaders(config, data, collate, alone)[0]))
    seeds = batch.seeds if config.image_aug else None
    pictures = prepare_images(batch.images, family.image_size(base), seeds).float() / 255
    path = plan.run.path / "first_batch.png"
    picture = first_batch_picture(batch, pictures, data[0].embodiment, family.prompt, path)
    workers = plan.config.num_workers
    shown = replace(plan.config, num_workers=usual_workers(world.size) if workers is None else workers)
    text = describe(shown, world.device, plan.run.path, sizes, teacher, memory)
    sys.stdout.write(f"{text}\n\n{describe_data(data[0])}\n\nfirst batch: {picture}\n")
