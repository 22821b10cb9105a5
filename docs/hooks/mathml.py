r"""Mathematics as MathML, which browsers draw themselves: the site needs no script and no network for it.

Pages write ``$...$`` in a line and a ``math`` fence for a formula on its own, as forges do.
"""

from __future__ import annotations

import html
import logging
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.nav import Page

_FORMULA = re.compile(
    r"<(?P<tag>span|div) class=\"arithmatex\">\s*\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]\s*</(?P=tag)>", re.DOTALL
)

_log = logging.getLogger("mkdocs.hooks.mathml")
_THIN = '<mspace width="0.17em" />'


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Every formula of a page, converted."""
    content = _FORMULA.sub(_converted, content)
    if 'class="arithmatex"' in content:
        _log.warning("%s: a formula was not converted", page.file.src_uri)  # an error of a strict build
    return content


def _converted(match: re.Match[str]) -> str:
    display = "block" if match["open"] == "[" else "inline"
    formula = convert(html.unescape(match["latex"]).strip(), display=display)
    # The bars of a norm are written as signs, and would stretch to the height of the line, one by itself.
    formula = re.sub(r"<mo(?: [^>]*)?>(&#x02016;)</mo>", r'<mo stretchy="false">\1</mo>', formula)
    return re.sub(r"<mi>(log|max)</mi>", rf"{_THIN}<mi>\1</mi>{_THIN}", formula)  # else "p log p" runs together
