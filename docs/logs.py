"""Writes ``logs.md`` from the table of formats and its examples: ``python docs/logs.py``."""

from __future__ import annotations

from pathlib import Path

from mto_analysis.rauc.curves import read_curves
from mto_analysis.rauc.logs import FORMATS, Format

PAGE = Path(__file__).with_suffix(".md")
EXAMPLES = Path(__file__).parents[1] / "tests" / "logs"

MARK = "<!-- all below comes from the table of formats: python docs/logs.py -->\n"

_WIDTH = 100


def page() -> str:
    """The page as it should be: what is written by hand stays, what comes from the table is made anew."""
    head = "| format | written by | recognized by | first epoch |\n|---|---|---|---|"
    rows = [
        f"| [{one.name}](#{_anchor(one.name)}) | {one.written_by} | {one.told_by} | {_counting(one)} |"
        for one in FORMATS
    ]
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    return by_hand + MARK + "\n".join(["", head, *rows, "", *map(_section, FORMATS)])


def _anchor(name: str) -> str:
    return name.lower().replace("&", "").replace(" ", "-")


def _counting(one: Format) -> str:
    return "as its epochs show" if one.first_epoch is None else str(one.first_epoch)


def _section(one: Format) -> str:
    read = one.read or "the accuracy that the names tell"
    lines = [f"## {one.name}", "", f"Score: {read}. Example `{one.example}`:", ""]
    path = EXAMPLES / one.example
    if path.is_file():
        text = path.read_text(encoding="utf-8").splitlines()
        shown = [line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ..." for line in text[:4]]
        lines += ["```text", *shown, *(["..."] if len(text) > 4 else []), "```", ""]
    (report,) = read_curves([path]).provenance
    return "\n".join(
        [*lines, "reads as", "", "```text", *_wrapped(str(report).removeprefix(f"{EXAMPLES}/")), "```", ""]
    )


def _wrapped(text: str) -> list[str]:
    """The report in lines of the page's width."""
    lines = [""]
    for part in text.split(", "):
        if len(lines[-1]) + len(part) > _WIDTH:
            lines.append("  ")
        lines[-1] += part + ", "
    return [line.rstrip() for line in lines[:-1]] + [lines[-1].removesuffix(", ")]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
