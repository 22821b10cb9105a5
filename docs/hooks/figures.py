"""The gallery of figures and tables: what ``figures/captions.md`` says, with each one above its caption."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.nav import Page

FOLDER = Path(__file__).parents[2] / "figures"
CAPTIONS = FOLDER / "captions.md"
MARK = "<!-- gallery -->"

# "Fig. 1(a): heterogeneity of several models over layer depth" of a caption's beginning.
_TITLE = re.compile(r"(?:Supplementary )?(?:Figs?\.|Tables?) [^.:]*: [^.]+", re.IGNORECASE)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the gallery where the page has its mark."""
    return markdown.replace(MARK, gallery()) if MARK in markdown else markdown


def gallery() -> str:
    """A section per caption: the figures or the table of that name, the caption, the files."""
    captions = dict(each.split("\n", 1) for each in CAPTIONS.read_text(encoding="utf-8").split("\n## ")[1:])
    return "\n".join(_section(name, caption, others=captions.keys() - {name}) for name, caption in captions.items())


def _section(name: str, caption: str, others: Collection[str]) -> str:
    text = " ".join(caption.split())
    found = _TITLE.match(text)
    stems = sorted(path.stem for path in FOLDER.glob(f"{name}*.png"))  # "fig2" before "fig2-mae"
    drawn = [stem for stem in stems if re.fullmatch(rf"{name}(-\D.*)?", stem) and stem not in others]
    heading = found[0] if found else name.replace("-", " ").capitalize()
    lines = [f"## {heading}{', measured here' if name.endswith('-measured') else ''}", ""]
    for each in drawn:
        links = [f"[{kind}](figures/{each}.{kind})" for kind in ("pdf", "csv") if (FOLDER / f"{each}.{kind}").is_file()]
        lines += [f"![{each}](figures/{each}.png)", "", f"`{each}`: {', '.join(links)}", ""]
    if (table := FOLDER / f"{name}.md").is_file():
        rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        links = [f"[{kind}](figures/{name}.{kind})" for kind in ("tex", "csv")]
        lines += [*rows, "", f"`{name}`: {', '.join(links)}", ""]
    return "\n".join([*lines, text[len(found[0]) :].lstrip(". ") if found else text, ""])
