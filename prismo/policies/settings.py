"""How a policy is run: what the user's flags say, what the checkpoint's files say, and where the two contradict.

Evaluation and serving inherit their flags from `PolicyFlags`; `resolve_settings` turns them into `PolicySettings`.
A flag that is left out is read from the checkpoint. The original's defaults had to be repeated by hand for every kind
of checkpoint, and a wrong one meant 0 % without an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from prismo.data.normalize import UnknownKeyError, resolve_unnorm_key
from prismo.embodiment import Embodiment, Normalization
from prismo.models.heads import HEADS, NO_HEAD
from prismo.models.self_test import AttentionKind
from prismo.policies.checkpoint import Checkpoint
from prismo.policies.flags import PolicyFlags
from prismo.util.text import did_you_mean

_LOG = logging.getLogger(__name__)

Quantization = Literal["8bit", "4bit"]

# What the original's scripts assume where a checkpoint does not say how many cameras it saw.
_USUAL_IMAGES = {"libero": 2, "aloha": 3}
_DIFFUSION_STEPS = 50


@dataclass(frozen=True)
class PolicySettings:
    """Resolved settings of an OpenVLA policy; see `PolicyFlags` for their meaning."""

    head: str
    attention: AttentionKind
    film: bool
    num_images: int
    proprio: bool
    center_crop: bool
    unnorm_key: str
    chunk: int
    diffusion_steps_train: int = _DIFFUSION_STEPS
    diffusion_steps_inference: int = _DIFFUSION_STEPS
    quantization: Quantization | None = None


def resolve_settings(
    flags: PolicyFlags, checkpoint: Checkpoint, robot: Embodiment, default_key: str | None = None
) -> PolicySettings:
    """Settings of an OpenVLA-family checkpoint.

    Args:
        flags: the user's.
        checkpoint: what the files say.
        robot: the robot that will execute the actions.
        default_key: unnorm_key where the user gives none (LIBERO: the suite).

    Raises:
        ValueError: an unknown unnorm_key, impossible flags, or flags that contradict the checkpoint.
    """
    key = statistics_key(flags, checkpoint, default_key, robot.normalization)
    head, attention, problems = _resolve_head(flags, checkpoint)
    problems += _contradictions(flags, checkpoint)
    refuse(problems, flags, checkpoint)
    steps = flags.num_diffusion_steps_train or checkpoint.record.num_diffusion_steps_train or _DIFFUSION_STEPS
    settings = PolicySettings(
        head=head,
        attention=attention,
        film=checkpoint.film,
        num_images=flags.num_images_in_input
        or checkpoint.record.num_images_in_input
        or _usual_images(checkpoint, attention, robot),
        proprio=_first(flags.use_proprio, checkpoint.proprio_dim is not None),
        center_crop=_first(flags.center_crop, checkpoint.center_crop, True),
        unnorm_key=key,
        chunk=1 if attention == "causal" else checkpoint.chunk or robot.chunk,
        diffusion_steps_train=steps,
        diffusion_steps_inference=flags.num_diffusion_steps_inference or steps,
        quantization="8bit" if flags.load_in_8bit else "4bit" if flags.load_in_4bit else None,
    )
    _check_robot(settings, checkpoint, robot)
    return settings


def statistics_key(
    flags: PolicyFlags, checkpoint: Checkpoint, default_key: str | None, kind: Normalization = "bounds_q99"
) -> str:
    """Whose statistics to use, for scaling by `kind`: the user's choice, else those of `default_key`.

    Raises:
        UnknownKeyError: the checkpoint has none of that name.
        ValueError: it has, but they cannot be used.
    """
    if flags.unnorm_key or not default_key:
        return resolve_unnorm_key(checkpoint.statistics, flags.unnorm_key, kind)
    try:
        return resolve_unnorm_key(checkpoint.statistics, default_key, kind)
    except UnknownKeyError as error:
        known = sorted(checkpoint.statistics)
        trained = ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")
        raise UnknownKeyError(
            f"{checkpoint.source} was trained on {trained}, asked for {default_key}. Ask for what it was trained on, "
            "or choose the statistics of a similar dataset with --unnorm_key"
        ) from error


@dataclass(frozen=True)
class Problem:
    """A flag that contradicts the checkpoint; a fatal one cannot be run at all, even with --force."""

    text: str
    fatal: bool = False


def _resolve_head(flags: PolicyFlags, checkpoint: Checkpoint) -> tuple[str, AttentionKind, list[Problem]]:
    """Head and attention, and what speaks against the ones asked for."""
    if flags.use_l1_regression and flags.use_diffusion:
        raise ValueError("--use_l1_regression True and --use_diffusion True exclude each other; a checkpoint has one")
    if flags.attention not in (None, "bidirectional", "causal"):
        raise ValueError(did_you_mean("attention", flags.attention, ("bidirectional", "causal")))
    head, problems = checkpoint.head, []
    found = f"its action_head file is {HEADS[head].title}"
    if head == NO_HEAD:
        found = "it has no action_head file: actions are tokens of the language model"
    for kind, flag in ((kind, each.flag) for kind, each in HEADS.items() if each.flag is not None):
        asked = getattr(flags, flag)
        if asked and head != kind:
            problems.append(Problem(f"--{flag} True, but {found}", fatal=True))
        elif asked is False and checkpoint.head == kind:
            problems.append(Problem(f"--{flag} False, but {found}"))
            head = NO_HEAD
    attention = flags.attention or checkpoint.attention or "causal"
    if checkpoint.attention is None and flags.attention is None:
        _LOG.warning(
            "%s: nothing says whether it decodes token by token (vanilla OpenVLA) or in parallel (OFT without a head); "
            "taken as vanilla. For the other pass --attention bidirectional",
            checkpoint.source,
        )
    if flags.attention and checkpoint.attention and flags.attention != checkpoint.attention:
        problems.append(Problem(f"--attention {flags.attention}, but {checkpoint.attention_evidence}"))
    if attention == "causal" and head != NO_HEAD:
        problems.append(Problem("causal attention cannot feed an action head (chunks are decoded in one pass)", True))
    return head, attention, problems


def _contradictions(flags: PolicyFlags, checkpoint: Checkpoint) -> list[Problem]:
    """Flags that do not fit the files."""
    problems = []
    if flags.use_film is not None and flags.use_film != checkpoint.film:
        found = "a vision_backbone file (FiLM)" if checkpoint.film else "no vision_backbone file"
        problems.append(Problem(f"--use_film {flags.use_film}, but there is {found}", fatal=True))
    has_proprio = checkpoint.proprio_dim is not None
    if flags.use_proprio is not None and flags.use_proprio != has_proprio:
        found = f"a proprio_projector for {checkpoint.proprio_dim} numbers" if has_proprio else "no proprio_projector"
        problems.append(Problem(f"--use_proprio {flags.use_proprio}, but there is {found}", fatal=not has_proprio))
    problems += otherwise_trained(
        *(flags, checkpoint),
        num_images_in_input=checkpoint.record.num_images_in_input,
        num_diffusion_steps_train=checkpoint.record.num_diffusion_steps_train,
    )
    if checkpoint.adapter is not None and (flags.load_in_8bit or flags.load_in_4bit):
        text = "quantised loading of an unmerged adapter; merge it first (`prismo merge`)"
        problems.append(Problem(text, fatal=True))
    return problems


def otherwise_trained(flags: PolicyFlags, checkpoint: Checkpoint, **recorded: Any) -> list[Problem]:
    """Flags that differ from what training had: those in `recorded`, the crop and the adapter's rank."""
    rank = None if checkpoint.adapter is None else checkpoint.adapter.rank
    recorded |= {"center_crop": checkpoint.center_crop, "lora_rank": rank}
    return [
        Problem(f"--{flag} {given}, but it was trained with {value}", fatal=flag == "lora_rank")
        for flag, value in recorded.items()
        if (given := getattr(flags, flag)) is not None and value not in (None, given)
    ]


def refuse(problems: list[Problem], flags: PolicyFlags, checkpoint: Checkpoint) -> None:
    """Raise ValueError for problems that `--force` does not cover; log the others."""
    fatal = [problem for problem in problems if problem.fatal]
    listed = "\n".join(f"  {problem.text}" for problem in problems)
    if fatal or (problems and not flags.force):
        advice = "Leave these flags out: they are read from the checkpoint."
        if not fatal:
            advice += " --force True runs it anyway (such runs usually score 0 %)."
        raise ValueError(f"flags contradict the checkpoint {checkpoint.source}:\n{listed}\n{advice}")
    if problems:
        _LOG.warning("running against the checkpoint %s (--force):\n%s", checkpoint.source, listed)


def _usual_images(checkpoint: Checkpoint, attention: AttentionKind, robot: Embodiment) -> int:
    """Number of views where neither flag nor file says it."""
    count = 1 if attention == "causal" else _USUAL_IMAGES.get(robot.name, 1)
    _LOG.info(
        "%s does not say how many camera images it was trained with; using %d, the usual number "
        "(--num_images_in_input changes it)",
        checkpoint.source,
        count,
    )
    return count


def _check_robot(settings: PolicySettings, checkpoint: Checkpoint, robot: Embodiment) -> None:
    """The statistics and the modules must be of the robot that is to be driven."""
    stats = checkpoint.statistics[settings.unnorm_key]
    for what, expected, found in (
        ("actions", robot.action_dim, stats.action.dim),
        ("actions", robot.action_dim, checkpoint.action_dim),
        ("a state", robot.proprio_dim, checkpoint.proprio_dim if settings.proprio else None),
    ):
        if found is not None and found != expected:
            raise ValueError(
                f"{checkpoint.source} has {what} of {found} numbers for {settings.unnorm_key!r}, "
                f"but {robot.name} takes {expected}: it was trained for another robot"
            )
    if settings.proprio and stats.proprio is None:
        raise ValueError(
            f"{checkpoint.source} has no proprio statistics for {settings.unnorm_key!r}, which its proprio projector "
            f"needs; give another --unnorm_key of {', '.join(sorted(checkpoint.statistics))}"
        )


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
