"""Writes the table of ``checkpoints.md`` from the registry: ``python docs/checkpoints.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from mto_analysis.checkpoints.registry import Checkpoint, list_checkpoints

PAGE = Path(__file__).with_suffix(".md")

MARK = "<!-- all below comes from the registry: python docs/checkpoints.py -->\n"


def page() -> str:
    """The page as it should be: what is written by hand stays, what comes from the registry is made anew."""
    rows = list_checkpoints()
    masked, loading = sum(row.has_mask_token for row in rows), [row for row in rows if row.loads]
    original, slow = (sum(row.evidence.startswith(word) for row in loading) for word in ("original", "slow"))
    counts = (
        f"{len(rows)} files: {masked} with a mask token, of which {len(loading)} load: the layouts of {original} were "
        f"compared with original code, of {slow} with a slow reference."
    )
    sections = (_section(family, list(group)) for family, group in groupby(_by_family(rows), lambda row: row.family))
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    return by_hand + MARK + "\n".join(["", counts, "", *sections])


def _by_family(rows: Iterable[Checkpoint]) -> list[Checkpoint]:
    order = {row.family: None for row in rows}
    return sorted(rows, key=lambda row: list(order).index(row.family))


def _section(family: str, rows: list[Checkpoint]) -> str:
    head = "| id | backbone | epochs | mask token | decoder | loads | tried on | rests on |\n" + "|---" * 8 + "|"
    return "\n".join([f"### {family}", "", head, *map(_line, rows), "", *_notes(rows)])


def _line(row: Checkpoint) -> str:
    length = str(row.epochs) if row.epochs else f"{row.iterations // 1000}k iterations" if row.iterations else ""
    why = row.obstacle or "not read yet"
    loads = "**yes**" if row.loads else f"no: {why}" if row.has_mask_token else "no: no mask token"
    link = (
        row.source
        if row.source.startswith("http")
        else f"https://huggingface.co/{'/'.join(row.source[5:].split('/')[:2])}"
    )
    held = ("yes" if held else "no" for held in (row.has_mask_token, row.has_decoder))
    return " | ".join([f"| [`{row.id}`]({link})", row.backbone, length, *held, loads, row.evidence, f"{row.basis} |"])


def _notes(rows: list[Checkpoint]) -> Iterator[str]:
    """What to know, once for all files that share it."""
    shared: dict[str, list[str]] = {}
    for row in rows:
        if row.notes:
            shared.setdefault(row.notes, []).append(row.id)
    for note, names in shared.items():
        named = f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        yield f"- {note}" if len(shared) == 1 else f"- {named}: {note}"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
