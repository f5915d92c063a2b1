"""A checkpoint by folder or hub id: one rule for merging, evaluation and training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

_LOG = logging.getLogger(__name__)


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` can only be meant as `owner/name`, no path."""
    name = str(source)
    return name.count("/") == 1 and not Path(name).is_absolute() and not name.startswith(".") and not name.endswith("/")


def local_folder(source: str | Path, patterns: Sequence[str]) -> Path:
    """A folder as it is; a hub id from the local cache, downloaded into it if it is not there.

    A folder wins over a hub repository of the same name. The cache is asked first, so that offline nodes and many ranks
    at once need no network; `hf download` fetches a newer revision.

    Args:
        source: folder, or hub id such as `openvla/openvla-7b`.
        patterns: files to fetch.

    Raises:
        FileNotFoundError: neither a folder nor a repository that could be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise FileNotFoundError(f"{source} is neither a checkpoint folder nor a hub id such as openvla/openvla-7b")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (local folders need no hub client)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    name, allowed = str(source), list(patterns)
    try:
        return Path(snapshot_download(name, allow_patterns=allowed, local_files_only=True))
    except LocalEntryNotFoundError:
        _LOG.info("%s is not in the local cache, downloading it", name)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is neither a checkpoint folder nor a hub id ({error})") from error
    try:
        return Path(snapshot_download(name, allow_patterns=allowed))
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub repository of that name could not be fetched "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Give the path of a checkpoint folder, or "
            "check the id and the network"
        ) from error
