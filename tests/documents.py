"""Documents with code that readers will copy: found, never listed, so that a new one is tested from its first day.

A block that no test runs says why in a comment right above it: ``<!-- not run: it needs a network -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A fenced block, with the comment right above it; its first line may hold words after the language.
_BLOCK = re.compile(
    r"(?:^<!-- *(?P<comment>[^\n]*?) *-->\n)?^```(?P<language>[\w-]*)(?P<words>[^\n]*)\n(?P<code>.*?)^```\s*$",
    re.MULTILINE | re.DOTALL,
)

#: Comments of README.md that say which test runs the block: by itself, and in an environment of its own.
RUN_ELSEWHERE = {"demo command": "tests/test_demo.py", "test command": "the test run itself"}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    #: Why no test runs it, or which one does.
    reason: str

    def commands(self) -> list[str]:
        """Lines of a shell, continued lines joined, without comments and prompts; output of a session is left out."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        found = [line.partition(" #")[0].strip() for line in lines]
        return [each.strip() for line in found if line and not line.startswith("#") for each in line.split("&&")]


def pages() -> list[Path]:
    """README.md, the other pages of the top level and everything under docs."""
    return [path for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))] if path.is_file()]


def notebooks() -> list[Path]:
    return [path for path in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def blocks(page: Path, *languages: str) -> list[Block]:
    """Blocks of a page in one of the languages, or in any."""
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        comment = match["comment"] or ""
        reason = RUN_ELSEWHERE.get(comment, comment.removeprefix("not run:").strip() if "not run:" in comment else "")
        found.append(Block(match["language"], match["code"], reason))
    return [block for block in found if not languages or block.language in languages]


def indented_code(page: Path) -> Iterator[str]:
    """Lines that are code by indentation alone, which nothing here would run."""
    for line in _BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines():
        if re.match(r"    (mto-analyze|pip|python|accelerate|torchrun|import|from \S+ import)\b", line):
            yield line.strip()
