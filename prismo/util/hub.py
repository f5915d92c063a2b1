"""A checkpoint by folder or hub id: one rule for merging, evaluation and training."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

_LOG = logging.getLogger(__name__)

# First parts of relative paths here and in the original projects: `runs/old` is a run that is not there.
_OUR_FOLDERS = frozenset(
    ("checkpoints", "ckpts", "data", "datasets", "experiments", "logs", "official_ckpts", "outputs", "runs")
)
_FETCH = " Fetch a model with: hf download openvla/openvla-7b --local-dir ckpts/openvla-7b"


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` can only be meant as `owner/name`: no path, and no folder of the owner's name lies here."""
    owner = _owner(source)
    return owner is not None and owner not in _OUR_FOLDERS and not Path(owner).is_dir()


def _owner(source: str | Path) -> str | None:
    """The first part of what looks like `owner/name`."""
    owner, _, repository = str(source).partition("/")
    return owner if owner and repository and "/" not in repository and owner[0] not in ".~" else None


def no_such_folder(source: str | Path) -> str:
    """Text of the error for a path that is no folder: the nearest ones that are."""
    path = Path(source)
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    if (owner := _owner(source)) is not None and Path(owner).is_dir():
        hint += (
            f" It is not taken for a hub id because there is a folder {owner} here; to use a repository of that name, "
            f"`hf download {source} --local-dir FOLDER` and give the folder."
        )
    return f"{source} is neither a checkpoint folder nor a hub id such as openvla/openvla-7b.{hint or _FETCH}"


def local_folder(
    source: str | Path, patterns: Sequence[str], *, missing: Callable[[Path], str | None], optional: Sequence[str] = ()
) -> Path:
    """A folder as it is; a hub id from the local cache, downloaded into it if it is not all there.

    A folder wins over a hub repository of the same name. The cache is enough where the hub's own listing, which
    downloading leaves beside it, says that it is complete: offline nodes and many ranks at once then need no network.
    Without a listing (`from_pretrained` of other libraries, older hub clients) the hub is asked for what is lacking;
    where it cannot be reached, `missing` decides. `hf download` fetches a newer revision.

    Args:
        source: folder, or hub id such as `openvla/openvla-7b`.
        patterns: files that are needed.
        missing: what a folder lacks to be used, as a sentence; None for nothing.
        optional: files to fetch with them.

    Raises:
        FileNotFoundError: neither a folder nor a repository that could be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise FileNotFoundError(no_such_folder(source))
    name = str(source)
    cached = _cached(name, patterns)
    if cached is not None and (cached.parents[1] / "trees" / f"{cached.name}.json").is_file():
        return cached  # the hub's listing of this revision is there, so `snapshot_download` has compared with it
    fetched = _fetch(name, [*patterns, *optional], None if cached is None else cached.name)
    if lacking := missing(fetched):
        raise FileNotFoundError(
            f"{lacking}. The local cache has no more of {name}; run `hf download {name}` where there is a network"
        )
    return fetched


def _cached(name: str, patterns: Sequence[str]) -> Path | None:
    """The snapshot in the cache; None if there is none, or its listing says that files of `patterns` are not there."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (local folders need no hub client)
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is neither a checkpoint folder nor a hub id ({error})") from error


def _fetch(name: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    _LOG.info("%s is not in the local cache as a whole, asking the hub for it", name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub repository of that name could not be fetched "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Give the path of a checkpoint folder, or "
            "check the id and the network"
        ) from error
