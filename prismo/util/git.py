"""Which commit runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def git_commit() -> str | None:
    """Commit of the checkout that runs, with `-dirty` where files differ from it; None for an installed package."""
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        return None
    call = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
