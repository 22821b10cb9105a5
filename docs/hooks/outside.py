"""Files of the site that live outside ``docs/``: figures, data beside them, pages of the repository's top level.

Pages link to them relatively (``../figures/fig1a.png``), so that links also work where a forge shows the Markdown. On
the site they lie below its root, and this takes the ``../`` off.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Page

ROOT = Path(__file__).parents[2]

#: Pages of the top level that the site shows, and what they link to.
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
BESIDE = ("LICENSE", "NOTICE", "CITATION.cff")

_LINK = re.compile(r"(\]\(|src=\")(?!https?:|#)([^)\"\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Figures with the tables and pages they were drawn from, and the pages of the top level."""
    drawn = sorted(path for kind in ("png", "pdf", "csv", "tex") for path in (ROOT / "figures").rglob(f"*.{kind}"))
    for path in [*drawn, *(ROOT / name for name in (*PAGES, *BESIDE))]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from a page's place in the repository become links from its place on the site."""
    prefix = "" if page.file.src_uri in PAGES else "docs/"
    return _LINK.sub(lambda match: match[1] + moved(match[2], prefix + page.file.src_uri), markdown)


def moved(target: str, page: str) -> str:
    """A relative link from a file of the repository as one on the site, where ``docs/`` is the root."""
    path, mark, anchor = target.partition("#")
    parts: list[str] = list(Path(page).parent.parts)
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    parts = parts[1:] if parts[:1] == ["docs"] else parts
    up = len(Path(page).parent.parts) - (1 if page.startswith("docs/") else 0)
    return "../" * up + "/".join(parts) + mark + anchor
