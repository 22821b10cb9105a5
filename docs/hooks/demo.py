"""The demo's report as a page of the site, computed while the site is built, and linked from the start page."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Page

ROOT = Path(__file__).parents[2]
PAGE = "demo-report.html"
MARK = "<!-- demo report -->"

LINK = (
    f"**[Open the demo's report]({PAGE})**: affinity maps and reconstructions of the bundled models, layer by layer, "
    "to explore in the browser."
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The page that ``mto-analyze demo`` writes as ``report.html``."""
    files.append(File.generated(config, PAGE, content=report()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link where a page has the mark; where a forge shows the page, there is no report to link to."""
    return markdown.replace(MARK, LINK)


def report() -> str:
    """The report of the bundled models on a quarter of the bundled images."""
    sys.path[:0] = [str(ROOT)]
    from mto_analysis.demo import measure_demo
    from mto_analysis.figures.report import render_report
    from mto_analysis.figures.report_contents import demo_report

    return render_report(demo_report(measure_demo(limit=64)), title="Demo: small models")
