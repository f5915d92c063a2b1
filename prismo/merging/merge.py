"""Fold a LoRA adapter into its base model, file to file, without ever holding a model in memory.

`prismo merge` and the trainer call `merge`. The result has the layout of a published
fine-tuned checkpoint. Every weight is `W + scale * B @ A` on the CPU, rounded once to the base's dtype, so the bytes
are the same on every machine (the original merges in bf16, and its results depend on the GPU).
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from prismo import __version__
from prismo.families import FAMILIES, Family, family_of, missing_of_base
from prismo.merging.card import CARD, may_be_written, model_card
from prismo.merging.merge_check import MergeChecks, compare
from prismo.merging.publish import check_space, prepared, refuse_overwriting, side_files
from prismo.models.adapter_file import ADAPTER_FOLDER, ADAPTER_WEIGHTS, open_adapter, read_adapter_file
from prismo.models.folder import CONFIG, MARKER, WEIGHTS_AND_SETTINGS, check_folder, read_marker
from prismo.models.lora import (
    LoraSpec,
    add_lora,
    base_copies,
    match_adapter,
    match_saved,
    merged_weight,
    read_adapter_spec,
    saved_keys,
)
from prismo.models.weight_files import (
    INDEX,
    StoredTensor,
    checksum,
    combine_checksums,
    fingerprint,
    in_parallel,
    stored_tensors,
    total_bytes,
    write_shards,
)
from prismo.util.files import write_json
from prismo.util.hub import local_folder


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        folder: holds the merged checkpoint.
        adapted_tensors: weights that were changed.
        copied_tensors: weights that are the base's, bit for bit.
        bytes: size of the weights.
        seconds: wall time.
        checks: result of `verify_merge`, None if it was left out.
    """

    folder: Path
    adapted_tensors: int
    copied_tensors: int
    bytes: int
    seconds: float
    checks: MergeChecks | None


@dataclass(frozen=True)
class _Adapter:
    """An adapter that fits: which factors belong to which weight.

    Attributes:
        file: opened safetensors file.
        spec: rank and scale.
        keys: name of a base weight -> keys of A and B in the file.
        saved: name of a base weight -> key of the trained one that replaces it.
        repeated: see `prismo.families.Family`.
    """

    file: safe_open
    spec: LoraSpec
    keys: dict[str, tuple[str, str]]
    saved: dict[str, str]
    repeated: Mapping[str, str]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self.keys[name]
        return self.file.get_tensor(a), self.file.get_tensor(b)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """What the base's `weight` becomes."""
        if name in self.keys:
            return merged_weight(weight, *self.factors(name), self.spec.scale)
        if name in self.saved:
            return self.file.get_tensor(self.saved[name]).to(weight.dtype)
        if (part := self.repeated.get(name)) in self.saved:
            rows = self.file.get_tensor(self.saved[part])
            return torch.cat((weight[: -len(rows)], rows.to(weight.dtype)))
        return weight


def merge(
    base: str | Path,
    checkpoint_dir: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
    shard_bytes: int = 5_000_000_000,
    hub_id: str | None = None,
) -> MergeReport:
    """Write base + adapter as a complete checkpoint.

    Args:
        base: folder of the model that the adapter was trained on, or a hub id (the local cache is used if it is there).
        checkpoint_dir: holds `lora_adapter/` and `dataset_statistics.json`.
        output: folder to write to; None = `checkpoint_dir`, as the original does. Another folder also gets the side
            modules and processor files.
        overwrite: replace merged weights that are already there.
        verify: read the result back and compare it with base + adapter, and the base with what training read
            (`verify_merge`), before the result appears.
        progress: show progress bars.
        shard_bytes: upper limit of a weight file.
        hub_id: repository that the checkpoint is meant for; its model card then names that instead of the folder.

    Raises:
        FileNotFoundError, ValueError: something is missing, does not fit, or would merge an adapter twice. Nothing has
            been written then.
        OSError: the disk is too small.
    """
    began = time.monotonic()
    checkpoint_dir = Path(checkpoint_dir)
    output = Path(output) if output is not None else checkpoint_dir
    base_folder = resolve_base(base)
    family = family_of(base_folder)
    with _opened(base_folder, checkpoint_dir) as (tensors, adapter):
        marker = _marker(base, base_folder, tensors, checkpoint_dir, adapter)
        config = family.merged_config(base_folder, checkpoint_dir)
        where = hub_id or output.as_posix()
        card = model_card(str(base), config["model_type"], checkpoint_dir, adapter.spec.rank, where)
        beside = side_files(base_folder, checkpoint_dir, output, base_code=family.base_code(checkpoint_dir))
        refuse_overwriting(base_folder, checkpoint_dir, output, beside, overwrite)
        size = total_bytes(tensors)
        check_space(output, size, beside)
        with prepared(output) as temporary:
            for name, source in beside.items():
                shutil.copyfile(source, temporary / name)
            _write_weights(temporary, tensors, adapter, shard_bytes, progress)
            checks = _verify(tensors, adapter, temporary, progress) if verify else None
            write_json(temporary / CONFIG, config)
            write_json(temporary / MARKER, marker | {"checks": asdict(checks) if checks else None})
            if may_be_written(output / CARD):
                (temporary / CARD).write_text(card, encoding="utf-8")
    adapted = len(adapter.keys) + len(adapter.saved)
    return MergeReport(output, adapted, len(tensors) - adapted, size, time.monotonic() - began, checks)


def verify_merge(
    base: str | Path, checkpoint_dir: str | Path, merged: str | Path, *, progress: bool = True
) -> MergeChecks:
    """Prove that the weights in `merged` are base + adapter, whoever wrote them.

    Every tensor is read back. One without an adapter must be the base's, bit for bit. Of one with an adapter, some rows
    are compared weight by weight with the exact sum, and all rows by their product with a random input, for which
    `W x + scale * B (A x)` is computed without forming `B A`. The base is compared with what training read, byte by
    byte where the adapter records that (`save_adapter`).

    Raises:
        ValueError: naming the first tensor that differs by more than rounding; or the base has changed.
    """
    with _opened(resolve_base(base), Path(checkpoint_dir)) as (tensors, adapter):
        return _verify(tensors, adapter, Path(merged), progress)


def resolve_base(base: str | Path) -> Path:
    """Folder of a base model: `base` itself, or the local copy of a hub id (downloaded if it is not in the cache)."""
    folder = local_folder(base, WEIGHTS_AND_SETTINGS, missing=missing_of_base, optional=("*.py", "tokenizer.model"))
    check_folder(folder, tuple(FAMILIES))
    family_of(folder).read_config(folder)
    return folder


@contextmanager
def _opened(base_folder: Path, checkpoint_dir: Path) -> Generator[tuple[dict[str, StoredTensor], _Adapter]]:
    """Base tensors and adapter, after checking that both fit the model and each other."""
    tensors = stored_tensors(base_folder)
    folder = checkpoint_dir / ADAPTER_FOLDER
    spec = read_adapter_spec(folder)
    with open_adapter(folder) as file:
        family = family_of(base_folder)
        keys = _match(file, spec, family, base_folder, tensors, checkpoint_dir)
        for key in base_copies(file, spec):
            own = tensors.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
            if own is None or not torch.equal(own.read(), file.get_tensor(key)):
                raise ValueError(
                    f"{folder} was trained on another base model than {base_folder}: its copy of {key} differs. "
                    "Pass the model that training started from as --base_checkpoint"
                )
        yield tensors, _Adapter(file, spec, keys, saved_keys(file, spec), family.repeated)


def _match(
    file: safe_open,
    spec: LoraSpec,
    family: Family,
    base_folder: Path,
    tensors: dict[str, StoredTensor],
    checkpoint_dir: Path,
) -> dict[str, tuple[str, str]]:
    """Base weight -> keys of its two factors. Names and shapes come from the model itself, built without memory."""
    with torch.device("meta"):
        model = family.build(family.read_config(base_folder))
        for name, parameter in model.state_dict().items():
            stored = family.stored_name(name)
            shape = tensors[stored].shape if stored in tensors else None
            if shape != tuple(parameter.shape):
                raise ValueError(f"{base_folder}: {stored} has shape {shape}, its config.json means {parameter.shape}")
        of_base = {name.removesuffix(".weight") for name in model.state_dict()}
        family.wrap(model, checkpoint_dir, list(file.keys()))
        add_lora(model, spec)
    found = match_adapter(file, model, checkpoint_dir / ADAPTER_FOLDER)
    match_saved(file, model, spec, checkpoint_dir / ADAPTER_FOLDER)
    modules = {name.rpartition(".lora_")[0] for name in found} & of_base  # the files of what wraps it hold the others
    return {
        family.stored_name(f"{m}.weight"): (found[f"{m}.lora_A.weight"], found[f"{m}.lora_B.weight"])
        for m in sorted(modules)
    }


def _marker(
    base: str | Path, base_folder: Path, tensors: dict[str, StoredTensor], checkpoint_dir: Path, adapter: _Adapter
) -> dict[str, Any]:
    """Content of `merge.json`: what was merged into what.

    Raises:
        ValueError: the base already contains this adapter, or the adapter belongs to another base.
    """
    path = checkpoint_dir / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    digest = _sha256(path)
    before = read_marker(base_folder)
    contained = [] if before is None else before.adapters
    beside = base_folder / ADAPTER_FOLDER / path.name
    if digest in contained or (beside.is_file() and _sha256(beside) == digest):
        raise ValueError(
            f"the weights in {base_folder} already contain this adapter; merging it again would apply it twice. "
            "Pass the model that training started from as --base_checkpoint"
        )
    identity = fingerprint(tensors)
    trained_on = (adapter.file.metadata() or {}).get("base_fingerprint")
    if trained_on not in (None, identity):
        name = read_adapter_file(path.parent).base_model_name_or_path
        raise ValueError(
            f"{path} was trained on other weights than those in {base_folder} (training started from {name!r}); "
            "pass that model as --base_checkpoint"
        )
    return {
        "adapters": [*contained, digest],
        "base_checkpoint": str(base),
        "base_fingerprint": identity,
        "rank": adapter.spec.rank,
        "scale": adapter.spec.scale,
        "adapted_tensors": len(adapter.keys) + len(adapter.saved),
        "prismo_version": __version__,
    }


def _write_weights(
    folder: Path, tensors: dict[str, StoredTensor], adapter: _Adapter, shard_bytes: int, progress: bool
) -> None:
    """Weight files and index."""

    def produce(name: str) -> Tensor:
        return adapter.apply(name, tensors[name].read())

    size = total_bytes(tensors)
    with _bar("merge", size, progress) as bar:
        weight_map = write_shards(folder, tensors, produce, shard_bytes=shard_bytes, wrote=bar.update)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _verify(tensors: dict[str, StoredTensor], adapter: _Adapter, merged: Path, progress: bool) -> MergeChecks:
    """See `verify_merge`."""
    written = stored_tensors(merged)
    kinds, expected = ({(n, t.dtype, t.shape) for n, t in found.items()} for found in (written, tensors))
    if differing := kinds ^ expected:
        raise ValueError(f"{merged}: {min(differing)[0]} is not stored as in the base model")

    def check(name: str) -> tuple[MergeChecks, int]:
        before, after = tensors[name].read(), written[name].read()
        of_base = checksum(before)
        if name in adapter.keys:
            found = compare(before, after, *adapter.factors(name), adapter.spec.scale, seed=crc32(name.encode()))
            return found, of_base
        before = adapter.apply(name, before)
        if not torch.equal(before.view(-1).view(torch.uint8), after.view(-1).view(torch.uint8)):
            raise ValueError(f"{merged}: {name} differs from the base model, but no adapter changes it")
        return MergeChecks(0.0, 0.0), of_base

    worst, checksums = MergeChecks(0.0, 0.0), {}
    with _bar("verify", total_bytes(tensors), progress) as bar, closing(in_parallel(tensors, check)) as found_in:
        for name, (found, checksums[name]) in found_in:
            if not (found.weight_error <= 1.05 and found.output_error <= 10):
                raise ValueError(f"{merged}: {name} is not base + adapter ({found})")
            worst = MergeChecks(
                max(worst.weight_error, found.weight_error), max(worst.output_error, found.output_error)
            )
            bar.update(tensors[name].size)
    trained_on = (adapter.file.metadata() or {}).get("base_full_fingerprint")
    if trained_on not in (None, combine_checksums(checksums)):
        raise ValueError(
            f"the weights in {next(iter(tensors.values())).file.parent} are not those that training read: bytes have "
            "changed on disk or while copying. Fetch the base model again"
        )
    return worst


def _bar(title: str, size: int, show: bool) -> tqdm:
    """A progress bar over bytes with rate and time left."""
    return tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=not show)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
