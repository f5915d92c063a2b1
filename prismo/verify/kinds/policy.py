"""Policies: files, tensors, adapters, statistics, prediction; a family adds what is its own (`Family.checks`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from prismo.data.normalize import DatasetStats, load_statistics, resolve_unnorm_key
from prismo.embodiment import Embodiment, embodiment_for
from prismo.families import Family, family_of_checkpoint
from prismo.models.adapter_file import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    open_adapter,
    read_adapter_file,
)
from prismo.models.folder import CONFIG, is_model
from prismo.models.training_record import read_training_record
from prismo.models.weight_files import fingerprint, stored_tensors, weight_files
from prismo.policies.checkpoint import statistics_file
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import PolicySpec, prepare_policy
from prismo.util.hub import is_hub_id
from prismo.util.schema import JsonObject, read_json
from prismo.verify import tensors
from prismo.verify.checks import Check, Finding, SkippedError, difference, judge, needed
from prismo.verify.facts import Architecture
from prismo.verify.forward import Forward
from prismo.verify.memory import in_bytes
from prismo.verify.statistics import check_known, check_plausible
from prismo.verify.subject import Subject

_ADAPTER_FILES = tuple(f"{ADAPTER_FOLDER}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
_TENSORS = ("weight files", "tensor names", "tensor shapes")
# The datasets whose statistics a prediction uses, the first that there is; the sample observation is of the first.
_PREFERRED = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "bridge_orig", "droid")


class PolicyFolder:
    """The checks of one policy; a family may add its own."""

    more_files: tuple[str, ...] = ()  # beside configuration and processor
    shown_settings: tuple[str, ...] = ("chunk", "unnorm_key")
    loading = "loading"  # name of the check that loads the policy

    def __init__(self, family: Family, subject: Subject) -> None:
        self.family, self.subject, self.folder = family, subject, subject.path
        self.known = subject.known
        # In the folder, or in the base model's where there is only an adapter; of several names one is enough.
        self.needed_files = ((CONFIG,), *family.processor, *((name,) for name in self.more_files))
        self.forward = Forward(lambda: self.spec, self._parameters, subject.options.forward, self.loading)

    # ------------------------------------------------------------------ what a family says

    def own_checks(self) -> list[Check]:
        """Tokenizer, images, modules beside the model."""
        return []

    def flags(self, folder: str, base: str | None, key: str) -> PolicyFlags:
        """How to run it."""
        device = self.subject.options.device
        return PolicyFlags(pretrained_checkpoint=folder, base_checkpoint=base, unnorm_key=key, device=device)

    @property
    def statistics_file(self) -> Path:
        """Where the statistics are, or should be."""
        found = needed(lambda: statistics_file(self.folder, self.family), "configuration")
        return found or self.folder / self.family.statistics[0]

    # ------------------------------------------------------------------ parts, read when somebody asks

    @cached_property
    def unmerged(self) -> bool:
        """There is no model but an adapter for one."""
        return not is_model(self.folder) and (self.folder / ADAPTER_FOLDER).is_dir()

    @cached_property
    def base(self) -> Path:
        """The folder of the model's weights and configuration: the checkpoint's own, or its base model's."""
        if not self.unmerged:
            return self.folder
        named = self.subject.options.base_checkpoint
        if named is None:
            adapter = self.folder / ADAPTER_FOLDER
            named = needed(lambda: read_adapter_file(adapter), "adapter").base_model_name_or_path or ""
        if Path(named).is_dir():
            return Path(named)
        cached = try_to_load_from_cache(named, CONFIG) if is_hub_id(named) else None
        if isinstance(cached, str):
            return Path(cached).parent
        raise SkippedError(f"the base model {named or '(not named)'} is not on this machine; give --base_checkpoint")

    @property
    def _has_base(self) -> bool:
        try:
            return self.base.is_dir()
        except (SkippedError, ValueError, OSError):
            return False

    @cached_property
    def architecture(self) -> Architecture | None:
        name = self.known.architecture if self.known else None
        return None if name is None else self.subject.facts.architectures[name]

    @cached_property
    def config(self) -> Any:
        return self.family.read_config(self.file(CONFIG).parent)

    @cached_property
    def expected(self) -> tensors.Shapes:
        needed(lambda: self.config, "configuration")
        with tensors.on_meta():
            shapes = tensors.shapes_of(self.family.build(self.config))
        return {self.family.stored_name(name): shape for name, shape in shapes.items()}

    @cached_property
    def stored(self) -> Mapping[str, tensors.Stored]:
        return tensors.read_model(self.base)

    @cached_property
    def statistics(self) -> Mapping[str, DatasetStats]:
        if not self.statistics_file.is_file():
            raise SkippedError("missing, see 'files'")
        return load_statistics(self.statistics_file)

    @cached_property
    def unnorm_key(self) -> str:
        """Whose statistics to predict with: the user's choice, the id's, LIBERO's, or the first."""
        wanted = self.subject.options.unnorm_key
        if wanted is None and self.known is not None and self.known.unnorm_key in self.statistics:
            wanted = self.known.unnorm_key
        if wanted is not None:
            return resolve_unnorm_key(self.statistics, wanted)
        for name in _PREFERRED:
            for key in sorted(self.statistics):
                if key.startswith(name):
                    return key
        return min(self.statistics)

    @cached_property
    def spec(self) -> PolicySpec:
        key = self.unnorm_key
        flags = self.flags(str(self.folder), str(self.base) if self.unmerged else None, key)
        return prepare_policy(flags, self.robot(key), key)

    def robot(self, key: str) -> Embodiment:
        """Whose actions these are: as the training run says, by the dataset's name, or by the statistics alone."""
        record = read_training_record(self.folder)
        if record is not None and record.embodiment is not None:
            return record.embodiment
        try:
            return embodiment_for(key)
        except ValueError:  # somebody's own
            stats = self.statistics[key]
            return Embodiment(key, stats.action.dim, stats.proprio.dim if stats.proprio else 1, 8, "bounds_q99", 10.0)

    def _parameters(self) -> int:
        return tensors.parameters(self.stored.values())

    # ------------------------------------------------------------------ checks

    def checks(self) -> list[Check]:
        dtype = self.architecture.dtype if self.architecture else None
        own = self.own_checks()
        return [
            Check("files", self._files),
            Check("configuration", self._configuration),
            Check("weight files", self._weight_files),
            Check("tensor names", lambda: tensors.check_names(self.stored, self.expected), ("weight files",)),
            Check("tensor shapes", lambda: tensors.check_shapes(self.stored, self.expected), ("weight files",)),
            Check("tensor types", lambda: tensors.check_dtypes(self.stored, dtype), ("weight files",)),
            Check("counts", lambda: tensors.check_counts(self.stored, self.architecture), _TENSORS),
            *([Check("adapter", self._adapter)] if self.unmerged else []),
            *own,
            Check("statistics", lambda: check_plausible(self.statistics)),
            Check("statistics of this id", self._known_statistics, ("statistics",)),
            Check("settings", self._settings, ("weight files", *(check.name for check in own), "statistics")),
            *self.forward.checks((*_TENSORS, *(check.name for check in own), "adapter")),
        ]

    def file(self, *names: str) -> Path:
        """The first of these names that is there; the check "files" demands one.

        Raises:
            SkippedError: none is.
        """
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        for name in names:
            if (self.base / name).is_file():
                return self.base / name
        raise SkippedError(f"`{names[0]}` is missing")

    def _files(self) -> Finding:
        wanted = [*self.needed_files, *((name,) for name in (self.known.files if self.known else ()))]
        if self.unmerged:
            wanted = [names for names in wanted if names != (CONFIG,)]  # the base model's
            wanted += [(name,) for name in _ADAPTER_FILES]
        folders = (self.folder, self.base) if self.unmerged and self._has_base else (self.folder,)
        missing = [
            " or ".join(names)
            for names in dict.fromkeys(wanted)
            if not any((folder / name).is_file() for folder in folders for name in names)
        ]
        lines = [difference(f"`{name}`", "a file", "none") for name in missing]
        if not self.statistics_file.is_file() and self.statistics_file.name not in missing:
            lines.append(difference("statistics", f"`{self.statistics_file.name}`", "none"))
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return judge(f"{len(files)} files, {in_bytes(sum(path.stat().st_size for path in files))}", lines)

    def _configuration(self) -> Finding:
        text = f"model_type {self.config.model_type}"
        if self.architecture is None:
            return Finding("not known", text)
        lines = []
        for name, expected in self.architecture.config.items():
            found: object = self.config
            for part in name.split("."):
                found = getattr(found, part, None)
            if found != expected:
                lines.append(difference(f"`{name}`", expected, found))
        return judge(f"{text}, {len(self.architecture.config)} values as published", lines)

    def _weight_files(self) -> Finding:
        count, files = len(self.stored), weight_files(self.base)
        size = in_bytes(sum(path.stat().st_size for path in files))
        whose = f" of the base model {self.base}" if self.unmerged else ""
        return Finding("ok", f"{len(files)} whole file{'s' * (len(files) > 1)}{whose}, {size}, {count:,} tensors")

    def _adapter(self) -> Finding:
        from prismo.models.lora import add_lora, match_adapter, read_adapter_spec  # noqa: PLC0415 (imports peft)

        folder = self.folder / ADAPTER_FOLDER
        if not all((self.folder / name).is_file() for name in _ADAPTER_FILES):
            raise SkippedError("missing, see 'files'")
        spec = read_adapter_spec(folder)
        with open_adapter(folder) as file:
            needed(lambda: self.config, "configuration")
            with tensors.on_meta():
                model = self.family.build(self.config)
                self.family.wrap(model, self.folder, list(file.keys()))
                add_lora(model, spec)
            found = match_adapter(file, model, self.folder)
            trained_on = (file.metadata() or {}).get("base_fingerprint")
        text = f"{len(found)} tensors of rank {spec.rank} fit"
        if trained_on is None:
            return Finding("ok", f"{text}; nothing says which base they were trained on")
        if trained_on != needed(lambda: fingerprint(stored_tensors(self.base)), "weight files"):
            return judge("", [difference("base model", "the one that it was trained on", f"another in {self.base}")])
        return Finding("ok", f"{text}, trained on this base model")

    def _known_statistics(self) -> Finding:
        return check_known(self.statistics, self.known.keys if self.known else None, self.subject.facts)

    def _settings(self) -> Finding:
        needed(lambda: self.config, "configuration")
        settings, evidence = self.spec.describe(), self.spec.checkpoint.attention_evidence
        lines = []
        for what in ("head", "attention"):
            expected = getattr(self.known, what, None)
            if expected is not None and settings.get(what) != expected:
                lines.append(f"{difference(what, expected, settings.get(what))} ({evidence})")
        return judge(", ".join(f"{name} {settings[name]}" for name in self.shown_settings), lines)


@dataclass(frozen=True)
class PolicyKind:
    """The kind of a family's checkpoints: merged models, full fine-tunes, and adapters alone."""

    family: Family

    @property
    def title(self) -> str:
        return f"{self.family.title} policy"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and model_type(path) == self.family.model_type

    def checks(self, subject: Subject) -> list[Check]:
        return self.family.load("checks")(self.family, subject).checks()


def model_type(folder: Path) -> str | None:
    """What config.json says, None without that file; for an adapter alone, what lies beside it."""
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG, JsonObject).get("model_type")
    return family_of_checkpoint(folder).model_type if (folder / ADAPTER_FOLDER).is_dir() else None
