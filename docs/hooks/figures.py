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
    """Thumbnails of all figures, then a section per caption: its figures or table, the caption, the files."""
    captions = dict(each.split("\n", 1) for each in CAPTIONS.read_text(encoding="utf-8").split("\n## ")[1:])
    thumbnails, sections = [], []
    for name, caption in captions.items():
        stems = drawn(name, captions.keys() - {name})
        title, text = _parts(name, caption)
        sections.append(_section(name, title, text, stems))
        if stems:
            image = f'<img src="figures/{stems[0]}.png" alt="" loading="lazy">'
            thumbnails.append(f'<a href="#{name}">{image}<span>{title}</span></a>')
    return "\n".join(['<div class="thumbnails">', *thumbnails, "</div>", "", *sections])


def drawn(name: str, others: Collection[str]) -> list[str]:
    """The images of a caption: ``fig2`` before ``fig2-mae``, and none of another caption."""
    stems = sorted(path.stem for path in FOLDER.glob(f"{name}*.png"))
    return [stem for stem in stems if re.fullmatch(rf"{name}(-\D.*)?", stem) and stem not in others]


def _parts(name: str, caption: str) -> tuple[str, str]:
    """The title that a caption begins with, and the rest; without one, the title is the name."""
    text = " ".join(caption.split())
    found = _TITLE.match(text)
    title, rest = (found[0], text[found.end() :].lstrip(". ")) if found else (name.replace("-", " ").capitalize(), text)
    return title + ", measured here" * name.endswith("-measured"), rest


def _section(name: str, title: str, text: str, stems: list[str]) -> str:
    lines = [f"## {title} {{ #{name} }}", ""]
    for each in stems:
        links = [f"[{kind}](figures/{each}.{kind})" for kind in ("pdf", "csv") if (FOLDER / f"{each}.{kind}").is_file()]
        lines += [f"![{each}](figures/{each}.png)", "", f"`{each}`: {', '.join(links)}", ""]
    if (table := FOLDER / f"{name}.md").is_file():
        rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        links = [f"[{kind}](figures/{name}.{kind})" for kind in ("tex", "csv")]
        lines += [*rows, "", f"`{name}`: {', '.join(links)}", ""]
    return "\n".join([*lines, text, ""])
