"""Where meshes, textures and scenes come from, and the folder that simulators may write to.

LIBERO's assets (about 200 MB) are not in its package. In this order: a folder that the user names, the package's own
`assets` folder, what a former download left, a download if the user allows one. The built-in stand-ins are used where
they are asked for: a policy that was trained on the real scenes has no chance among boxes and cylinders.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prismo.sim import standins
from prismo.sim.interface import STAND_INS
from prismo.sim.suites import package_folder
from prismo.util.files import atomic_folder

log = logging.getLogger(__name__)

ASSETS_VARIABLE = "PRISMO_LIBERO_ASSETS"
CACHE_VARIABLE = "PRISMO_CACHE"
HUB_REPOSITORY = "lerobot/libero-assets"  # the dataset repository that hf-libero itself downloads


@dataclass(frozen=True)
class Assets:
    """A folder laid out like LIBERO's `assets`, and where it comes from.

    Attributes:
        folder: holds `scenes`, `stable_hope_objects`, ...
        source: "folder", "package", "hub", or "stand-ins": results made with those are smoke runs and must say so.
    """

    folder: Path
    source: str

    @property
    def are_stand_ins(self) -> bool:
        return self.source == STAND_INS


def resolve_assets(folder: str | Path | None = None, *, download: bool = False, fallback: bool = False) -> Assets:
    """Find the assets; stand-ins are logged loudly.

    Args:
        folder: the content of LIBERO's `assets` folder; default: the environment variable PRISMO_LIBERO_ASSETS.
            "stand-ins" asks for the built-in ones.
        download: allow fetching `lerobot/libero-assets` from the hub.
        fallback: use the stand-ins where there is nothing else (for checks of a machine, whose figures nobody keeps).

    Raises:
        FileNotFoundError: the named folder is missing or is not an assets folder, or none is named and nothing found.
    """
    folder = folder or os.environ.get(ASSETS_VARIABLE) or None
    if folder is not None and str(folder) != STAND_INS:
        return Assets(_check(Path(folder)), "folder")
    if folder is None:
        found, why = _find(download)
        if found is not None:
            return found
        if not fallback:
            raise FileNotFoundError(
                f"no LIBERO assets (meshes and textures) {why}. Type --libero_assets DIR (or set {ASSETS_VARIABLE}) "
                f"where you have them, allow the download of {HUB_REPOSITORY} with --download_assets, or type "
                f"--libero_assets {STAND_INS} for a smoke run with boxes and cylinders"
            )
    log.warning(
        "LIBERO's scenes are built-in stand-ins (boxes and cylinders), fit for smoke runs only: success rates compare "
        "with nothing. For real results set %s to LIBERO's assets folder or allow the download of %s.",
        ASSETS_VARIABLE,
        HUB_REPOSITORY,
    )
    return Assets(_stand_ins(), STAND_INS)


def _check(folder: Path) -> Path:
    if not (folder / "scenes").is_dir():
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else None
        raise FileNotFoundError(
            f"{folder} is not LIBERO's assets folder: expected sub-folders such as scenes and stable_hope_objects, "
            f"found {'no such folder' if found is None else found or 'an empty folder'}. "
            f"Set {ASSETS_VARIABLE} to the right one, or to {STAND_INS!r} for a smoke run."
        )
    return folder.resolve()


def _find(download: bool) -> tuple[Assets | None, str]:
    """Assets in the package, downloaded before by hf-libero or by us (hub cache), or now; else why there are none."""
    package = package_folder() / "assets"
    if (package / "scenes").is_dir():
        return Assets(package, "package"), ""
    former = Path.home() / ".cache" / "libero" / "assets"
    if (former / "scenes").is_dir():
        return Assets(former, "hub"), ""
    try:
        return _fetch(local_files_only=True), ""
    except OSError:
        if not download:
            return None, "are installed"
    try:
        return _fetch(), ""
    except OSError as error:
        return None, f"are installed, and the download of {HUB_REPOSITORY} failed ({' '.join(str(error).split())})"


def _fetch(*, local_files_only: bool = False) -> Assets:
    """From the hub, or only what its cache holds; OSError if that fails."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (an assets folder needs no hub client)
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        folder = snapshot_download(HUB_REPOSITORY, repo_type="dataset", local_files_only=local_files_only)
    except HfHubHTTPError as error:  # no OSError in every version of the client
        raise ConnectionError(str(error)) from error
    return Assets(_check(Path(folder)), "hub")


def _stand_ins() -> Path:
    """The generated stand-ins; the folder's name holds the generator's hash, so that an old set is never used."""
    folder = cache_folder() / f"stand-ins-{standins.scenes_fingerprint()}"
    if not folder.is_dir():
        with atomic_folder(folder, keep_existing=True) as temporary:  # simulators may read those of a faster one
            standins.write(temporary)
    return folder


def cache_folder() -> Path:
    """Our own folder for what simulators write: configuration, compiled code, stand-ins. Not the home folder.

    PRISMO_CACHE names it; default: `prismo-<user id>` among the temporary files, readable by its owner only.

    Raises:
        PermissionError: somebody else owns it (compiled code is executed, so it must not come from others).
    """
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"prismo-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set {CACHE_VARIABLE} to a folder of your own")
    return folder
