"""The pages of the documentation: their code blocks, headings and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    sorted(
        str(page.relative_to(ROOT))
        for pattern in ("*.md", "docs/*.md", "data/README.md", "ckpts/README.md")
        for page in ROOT.glob(pattern)
    )
)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: page, language, text, and the number of the line above its text."""

    page: str
    language: str
    text: str
    line: int

    @property
    def name(self) -> str:
        """Page and first line that is no comment."""
        lines = (line for line in self.text.splitlines() if line and not line.startswith("#"))
        return f"{self.page}: {next(lines, '')}".strip()


def blocks(language: str) -> list[Block]:
    """All blocks of a language, page by page."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        matches = ((match, text[: match.start()].count("\n") + 1) for match in _BLOCK.finditer(text))
        found += [Block(page, match[1], match[2], line) for match, line in matches if match[1] == language]
    return found


def fences(page: str) -> set[str]:
    """What stands behind the opening fences of a page."""
    opened = re.findall(r"^ *```(.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)[::2]
    return set(opened)


def links(page: str) -> list[str]:
    """Targets of links and pictures within the project."""
    text = _BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [target for target in _LINK.findall(text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text)}
