"""Documents with code that readers will copy: found, never listed, so that a new one is tested from its first day."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A fenced block; its first line may hold words after the language, such as ``python no-run``.
_BLOCK = re.compile(r"^```(?P<language>[\w-]*)(?P<words>[^\n]*)\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """README.md and everything under docs."""
    return [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.is_file()]


def notebooks() -> list[Path]:
    return [path for path in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def blocks(page: Path, *languages: str) -> list[str]:
    """Code of a page's blocks in one of the languages."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [match["code"] for match in found if match["language"] in languages]
