"""From the name of a dataset or mixture, or a YAML file about own data, to folders and specs (`resolve`).

Called by `dataset.py`, and before anything is indexed by the checks of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator

from prismo.data.specs import MIXTURES, SPECS, DatasetSpec, Feature, Gripper, check_features, total_width
from prismo.data.store import DOWNLOAD_DATA, check_spec, find_folder, is_dataset, read_features
from prismo.embodiment import EMBODIMENTS, LIBERO, Count, Embodiment, Normalization, Rate, Sign
from prismo.util.problems import check_all
from prismo.util.schema import JsonObject, check, own_keys, read_yaml
from prismo.util.text import did_you_mean


@dataclass(frozen=True)
class MixtureEntry:
    """A dataset of a mixture: its spec, its folder, and how often each window is seen per epoch."""

    spec: DatasetSpec
    folder: Path
    weight: float = 1.0


def resolve(data_root: str | Path, name: str | Path) -> list[MixtureEntry]:
    """The datasets that `name` means: a known dataset or mixture, or a YAML file (one dataset or a mixture).

    `data_root / name` is the folder, with or without a version below it; a known name may carry the version
    ("bridge_orig/1.0.0"). `data_root` may also be the dataset's own folder.

    Raises:
        ValueError, FileNotFoundError: unknown name, absent folder, feature or file; one sentence on what to do.
    """
    return _resolve(Path(data_root), str(name), ())


def _resolve(data_root: Path, name: str, within: tuple[Path, ...]) -> list[MixtureEntry]:
    """As `resolve`; `within` are the mixture files around this name."""
    if name.endswith((".yaml", ".yml")):
        return _resolve_yaml(data_root, Path(name), within)
    if name in MIXTURES:
        return _resolve_mixture(data_root, MIXTURES[name], within)
    base = name.split("/", maxsplit=1)[0]
    if base not in SPECS:
        check_all(lambda: _unknown(name, within), lambda: _check_root(data_root))
    folder, spec = find_folder(_below(data_root, name)), replace(SPECS[base], name=name)
    check_spec(spec, folder)
    return [MixtureEntry(spec, folder)]


def _unknown(name: str, within: tuple[Path, ...]) -> NoReturn:
    raise ValueError(
        (f"{within[-1]}: " if within else "")
        + did_you_mean("dataset", name, [*SPECS, *MIXTURES])
        + ". Describe your own data in a YAML file and give its path (data/README.md)"
    )


def _check_root(data_root: Path) -> None:
    if not data_root.is_dir():
        raise FileNotFoundError(f"there is no folder {data_root}. Check --data_root_dir ({DOWNLOAD_DATA})")


def _below(data_root: Path, name: str) -> Path:
    """The dataset's folder below the root, or the root where that is the dataset's own (or its version) folder."""
    base = name.split("/", maxsplit=1)[0]
    root = data_root.absolute()
    own = base in (root.name, root.parent.name) and not (root / name).is_dir()
    if own and any(map(is_dataset, (root, *root.glob("*/")))):
        return root
    return data_root / name


def _resolve_mixture(data_root: Path, weights: Mapping[str, float], within: tuple[Path, ...]) -> list[MixtureEntry]:
    """Datasets by their weights; files are named relative to the mixture file, the last of `within`."""
    entries = []
    for name, weight in weights.items():
        is_file = name.endswith((".yaml", ".yml"))
        found = _resolve(data_root, str(within[-1].parent / name) if is_file else name, within)
        entries += [replace(entry, weight=entry.weight * weight) for entry in found]
    names = [entry.spec.name for entry in entries]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the mixture holds {', '.join(repeated)} more than once; give each dataset one weight")
    return entries


def _listed(value: Any) -> Any:
    """Features of a description: one name, several, or names by role."""
    if isinstance(value, str):
        return [value]
    return list(value.values()) if isinstance(value, dict) else value


_Features = Annotated[list[str], MinLen(1), BeforeValidator(_listed)]
_Name = Annotated[str, MinLen(1)]


@own_keys
@dataclass(frozen=True)
class _Description:
    """A YAML file about own data (data/README.md); None takes the default of the robot `embodiment`."""

    name: _Name
    cameras: _Features
    action: _Features
    proprio: _Features
    gripper: Gripper
    control_hz: Rate
    path: _Name | None = None
    instruction: _Name = "language_instruction"
    embodiment: str | None = None
    chunk: Count | None = None
    normalization: Normalization | None = None
    gripper_dims: list[int] | None = None
    gripper_env_sign: Sign | None = None
    actions_from_state: bool = False
    skip_first: Annotated[int, Ge(0)] = 0


@own_keys
@dataclass(frozen=True)
class _Mixture:
    """A YAML file with datasets, by known name or file, and how often each of their windows is seen per epoch."""

    datasets: Annotated[dict[str, Annotated[float, Gt(0), Le(10_000)]], MinLen(1)]


def _resolve_yaml(data_root: Path, file: Path, within: tuple[Path, ...]) -> list[MixtureEntry]:
    if not file.is_file():
        raise FileNotFoundError(f"no dataset description {file}")
    if file.resolve() in [other.resolve() for other in within]:
        raise ValueError(f"{file} includes itself: {' -> '.join(map(str, (*within, file)))}")
    advice = "correct it (data/README.md shows a complete one)"
    content = read_yaml(file, JsonObject, advice=advice)
    if "datasets" in content:
        weights = check(content, _Mixture, str(file), advice=advice).datasets
        return _resolve_mixture(data_root, weights, (*within, file))
    description = check(content, _Description, str(file), advice=advice)
    named = Path(description.path or description.name)
    named = named if named.is_absolute() else _below(data_root, str(named))
    check_all(lambda: _check_robot(description, file), lambda: read_features(find_folder(named)))
    features = read_features(folder := find_folder(named))
    try:
        spec = _described(description, features, _roles(content["cameras"]), _roles(content["proprio"]))
        check_features(spec, features)
    except ValueError as error:
        raise ValueError(f"{file}: {folder}: {error}") from error
    return [MixtureEntry(spec, folder)]


def _check_robot(text: _Description, file: Path) -> None:
    if text.embodiment is not None and text.embodiment not in EMBODIMENTS:
        raise ValueError(f"{file}: {did_you_mean('embodiment', text.embodiment, EMBODIMENTS)}")


def _roles(value: Any) -> tuple[str, ...]:
    """Names of features: their roles where they have some."""
    return tuple(map(str, value)) if isinstance(value, dict) else tuple(_listed(value))


def _described(
    text: _Description, features: Mapping[str, Feature], cameras: tuple[str, ...], states: tuple[str, ...]
) -> DatasetSpec:
    """The spec that a description means, of a robot with these names, or those of `embodiment` where they fit."""
    base = EMBODIMENTS[text.embodiment] if text.embodiment else LIBERO
    proprio_dim = total_width(text.proprio, features)
    if text.embodiment and len(cameras) <= len(base.cameras):
        cameras = base.cameras[: len(cameras)]
    if text.embodiment and base.states and proprio_dim == base.proprio_dim:
        states = base.states
    embodiment = Embodiment(
        name=text.embodiment or text.name,
        action_dim=total_width(text.action, features),
        proprio_dim=proprio_dim,
        chunk=text.chunk or base.chunk,
        normalization=text.normalization or base.normalization,
        control_hz=float(text.control_hz),
        gripper_dims=base.gripper_dims if text.gripper_dims is None else tuple(text.gripper_dims),
        gripper_env_sign=text.gripper_env_sign or base.gripper_env_sign,
        cameras=cameras,
        states=states,
    )
    return DatasetSpec(
        name=text.name,
        embodiment=embodiment,
        cameras=tuple(text.cameras),
        action=tuple(text.action),
        proprio=tuple(text.proprio),
        instruction=text.instruction,
        gripper=text.gripper,
        actions_from_state=text.actions_from_state,
        skip_first=text.skip_first,
    )
