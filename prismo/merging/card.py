"""The model card (README.md) of a merged checkpoint: data, recipe, metrics, how to run it, base and licences.

Everything in it is read from the files of the run, so nothing is claimed that the run did not write down. The front
matter is what the Hugging Face hub reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from prismo import __version__
from prismo.data.normalize import DatasetStats, load_statistics
from prismo.embodiment import Embodiment
from prismo.families import Family, get_family
from prismo.models.folder import TRAINING_CONFIG
from prismo.util.hub import is_hub_id
from prismo.util.schema import JsonObject, parse_json, read_json

_LOG = logging.getLogger(__name__)
CARD = "README.md"
_STATISTICS = "dataset_statistics.json"
_METRICS = "metrics.jsonl"
_STEP_FOLDER = re.compile(r"(.+)--(\d+)_chkpt")
_SIGNATURE = re.compile(r"<!-- Written by prismo, ([0-9a-f]{64})\. Edit this page and it stays as you left it\. -->\n")
_LIBERO = re.compile(r"libero_(?:spatial|object|goal|10|90)(?=_no_noops|$|/)")
# Episodes of the datasets in this repository; another number is another dataset of the same name.
_LIBERO_REPOSITORY = "openvla/modified_libero_rlds"
_LIBERO_EPISODES = {
    "libero_spatial_no_noops": 432,
    "libero_object_no_noops": 454,
    "libero_goal_no_noops": 428,
    "libero_10_no_noops": 379,
}
_RECIPE = (
    *("max_steps", "batch_size", "grad_accumulation_steps", "world_size", "learning_rate", "scheduler"),
    *("num_steps_before_decay", "lr_warmup_steps", "weight_decay", "max_grad_norm", "lora_rank", "lora_alpha"),
    *("lora_dropout", "use_l1_regression", "use_diffusion", "action_head", "use_film", "use_proprio"),
    *("num_images_in_input", "chunk", "image_aug", "seed", "precision"),
)


@dataclass(frozen=True)
class _Run:
    """What the sentences of the card need of `training_config.json`; the table takes more."""

    vla_path: str | None = None
    dataset_name: str | None = None
    teacher: str | None = None
    teacher_license: str | None = None
    align_recipe: JsonObject | None = None
    embodiment: Embodiment | None = None


@dataclass(frozen=True)
class _Entry:
    """What every line of `metrics.jsonl` has."""

    step: Annotated[int, Ge(0)]
    split: Literal["train", "val"]


def model_card(base: str, model_type: str, checkpoint: Path, rank: int, where: str) -> str:
    """The page for what becomes of an adapter when it is merged.

    Args:
        base: folder or hub id of the base model.
        model_type: of the base's config.json.
        checkpoint: folder of the adapter.
        rank: of the adapter.
        where: folder or hub id of the merged checkpoint, for the commands.

    Raises:
        ValueError: a file of the run is damaged.
    """
    family = get_family(model_type)
    path = checkpoint / TRAINING_CONFIG
    recipe, run = (read_json(path, JsonObject), read_json(path, _Run)) if path.is_file() else ({}, _Run())
    path = checkpoint / _STATISTICS
    statistics = load_statistics(path) if path.is_file() else {}
    base_id = next((name for name in (base, run.vla_path) if name and is_hub_id(name)), None)
    shown = base_id or Path(base).name
    text = "\n\n".join(
        (
            f"---\n{_front_matter(family, base_id, statistics, run)}\n---",
            f"# {Path(where).resolve().name}",
            f"A vision-language-action policy ({family.title}): a LoRA adapter of rank {rank}, merged into `{shown}` "
            f"with prismo {__version__} (distribution `prismo-vla`).",
            f"## Data\n\n{_data(statistics, run)}",
            f"## Recipe\n\n{_recipe(recipe, run)}",
            f"## Metrics\n\n{_metrics(checkpoint)}",
            f"## Use\n\n{_use(where, statistics)}",
            f"## Base and licences\n\n{_licences(family, shown, run)}",
        )
    )
    return _signed(text + "\n\n")


def may_be_written(path: Path) -> bool:
    """Whether nobody else's page would be lost: there is none, or one of ours that nobody has changed."""
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _SIGNATURE.search(text)
    if found and _signed(text[: found.start()]) == text:
        return True
    _LOG.warning("%s was written by somebody else and stays; it may not describe the new weights", path)
    return False


def _signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- Written by prismo, {digest}. Edit this page and it stays as you left it. -->\n"


def _front_matter(family: Family, base: str | None, statistics: Mapping[str, DatasetStats], run: _Run) -> str:
    from huggingface_hub import ModelCardData  # noqa: PLC0415 (only here)

    episodes = {key.partition("/")[0]: stats.num_trajectories for key, stats in statistics.items()}
    published = all(_LIBERO_EPISODES.get(name) == count for name, count in episodes.items())
    data = ModelCardData(
        license=family.license,
        library_name="prismo-vla",
        pipeline_tag="robotics",
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=[_LIBERO_REPOSITORY] if statistics and published else None,
        tags=[
            "vision-language-action",
            family.title.lower(),
            *(["libero"] if any(map(_LIBERO.match, statistics)) else []),
            *(["spatial-forcing"] if run.align_recipe else []),
        ],
    )
    return data.to_yaml()


def _data(statistics: Mapping[str, DatasetStats], run: _Run) -> str:
    if not statistics:
        return "Nothing in the checkpoint says what it was trained on."
    rows = [(f"`{key}`", f"{s.num_trajectories:,}", f"{s.num_transitions:,}") for key, s in statistics.items()]
    table = _table(("dataset (`unnorm_key`)", "episodes", "steps"), rows)
    return f"`--dataset_name {Path(run.dataset_name).name}`:\n\n{table}" if run.dataset_name else table


def _recipe(recipe: Mapping[str, Any], run: _Run) -> str:
    if not recipe:
        return f"Not known: the checkpoint has no `{TRAINING_CONFIG}`."
    values = {name: recipe[name] for name in _RECIPE if recipe.get(name) is not None}
    values |= {"teacher": run.teacher, **run.align_recipe} if run.align_recipe else {"alignment": "none"}
    robot = vars(run.embodiment) if run.embodiment else {}
    values |= {("robot" if name == "name" else name): value for name, value in robot.items() if value != ()}
    words = {name: ", ".join(map(str, v)) if isinstance(v, tuple) else f"{v}" for name, v in values.items()}
    rows = [(f"`{name}`", text) for name, text in words.items()]
    return f"{_table(('setting', 'value'), rows)}\n\nEvery flag and version is in `{TRAINING_CONFIG}`."


def _metrics(checkpoint: Path) -> str:
    entries = _last_entries(checkpoint)
    rows = [
        (split, f"{entry['step']:,}", f"`{name}`", f"{value:.4g}")
        for split, entry in entries.items()
        for name, value in entry.items()
        if name not in ("step", "split") and isinstance(value, int | float)
    ]
    measured = "No success rate was measured when this page was written."
    if not rows:
        return f"The log of the run (`{_METRICS}`) did not lie beside the checkpoint. {measured}"
    return f"The last entries of the run's log:\n\n{_table(('split', 'update', 'metric', 'value'), rows)}\n\n{measured}"


def _last_entries(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The newest line per split that is not newer than the checkpoint; a line that a kill cut off is none."""
    match = _STEP_FOLDER.fullmatch(checkpoint.resolve().name)
    run = checkpoint.resolve().with_name(match[1]) if match else checkpoint
    path, last = run / _METRICS, float(match[2]) if match else float("inf")
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = parse_json(line, _Entry, _METRICS)
        except ValueError:
            continue
        if entry.step <= last:
            found[entry.split] = parse_json(line, JsonObject, _METRICS)
    return found


def _use(where: str, statistics: Mapping[str, DatasetStats]) -> str:
    """Commands and code that run as they stand."""
    suites = dict.fromkeys(match[0] for match in map(_LIBERO.match, statistics) if match)
    key = f', unnorm_key="{next(iter(statistics))}"' if len(statistics) > 1 else ""
    parts = [
        "```python\n"
        "from prismo.policies.base import PolicyInput\n"
        "from prismo.policies.flags import PolicyFlags\n"
        "from prismo.policies.loading import prepare_policy\n\n"
        f"policy = prepare_policy(PolicyFlags(pretrained_checkpoint={json.dumps(where)}{key})).load()\n"
        "policy.start_episode(0, seed=0)\n"
        "# images: uint8 [H, W, 3], the outside camera first; state: as in the data; the answer: [chunk, action]\n"
        "actions = policy.predict([PolicyInput(images, state, instruction)], [0])[0]\n"
        "```"
    ]
    if suites:
        commands = "\n".join(
            f"prismo eval --pretrained_checkpoint {shlex.quote(where)} --task_suite_name {suite}" for suite in suites
        )
        parts.append(f"Success rates in LIBERO (500 episodes each):\n\n```bash\n{commands}\n```")
    return "\n\n".join(parts)


def _licences(family: Family, base: str, run: _Run) -> str:
    lines = [f"- `{base}`: {family.terms}, besides what its authors ask for."]
    if run.align_recipe:
        licence = f"licence ({run.teacher_license})" if run.teacher_license else "licence"
        lines.append(
            f"- The vision tokens were aligned with features of a frozen teacher (`{run.teacher}`). Its "
            f"weights are not in here; look at its own {licence}, which may exclude commercial use."
        )
    lines.append("- The datasets come under their own licences. prismo itself is MIT.")
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
