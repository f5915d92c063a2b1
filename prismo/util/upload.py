"""A finished checkpoint goes to the Hugging Face hub, only when the user asks for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from prismo.util.cli import BrokenOffError
from prismo.util.text import first_line

_LOG = logging.getLogger(__name__)


def check_upload(repository: str, *, private: bool) -> None:
    """See that `upload` will be let in, before hours of work. Nothing is created.

    Args:
        repository: `owner/name`.
        private: nobody else is meant to see it.

    Raises:
        ValueError: no such name, owner or right, or the repository is there and public.
        OSError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token  # noqa: PLC0415 (uploads only)
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError  # noqa: PLC0415
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    if repository.count("/") != 1:
        raise ValueError(f"--push_to_hub {repository}: expected OWNER/NAME")
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"--push_to_hub {repository}: {first_line(error)}") from error
    if get_token() is None:
        raise ValueError("--push_to_hub needs a token that may write; type `hf auth login`, or set HF_TOKEN")
    api, owner = HfApi(), repository.partition("/")[0]
    try:
        me = api.whoami()
        found = api.model_info(repository)
    except RepositoryNotFoundError:
        found = None
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refuses --push_to_hub {repository}: {first_line(error)}") from error
    except Exception as error:  # what a network can do has many types, of several libraries
        raise OSError(f"--push_to_hub {repository}: the hub cannot be asked ({first_line(error)})") from error
    owners = [me["name"], *(organization["name"] for organization in me.get("orgs", ()))]
    if owner not in owners:
        raise ValueError(f"--push_to_hub {repository}: this token belongs to {me['name']}, expected one of {owners}")
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("--push_to_hub needs a token that may write, this one may only read; type `hf auth login`")
    if found is not None and private and not found.private:
        raise ValueError(
            f"--push_to_hub {repository} is there and public; give another name, or --hub_private False to publish"
        )


def upload(repository: str, folder: Path, files: Sequence[Path], *, private: bool) -> str:
    """Upload `files`, all below `folder`, into a repository that is created if need be; returns its address.

    Raises:
        BrokenOffError: it was not let in or broke off; the folder is complete all the same.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415

    names = [path.relative_to(folder).as_posix() for path in files]
    api = HfApi()
    _LOG.info("uploading %d files to %s", len(names), repository)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names)
    except Exception as error:  # see above
        raise BrokenOffError(
            f"{folder} is complete, but its upload to {repository} failed ({first_line(error)}); the same command with "
            "--overwrite True tries again"
        ) from error
    return str(address)
