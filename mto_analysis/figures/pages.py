"""Pages as one HTML file: nothing is loaded from anywhere, and no script but ours may run.

Every string of the user's is escaped, and the same contents give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_ASSETS = Path(__file__).parents[1] / "assets"


def render_page(name: str, *, title: str, version: str, skip: tuple[str, str], data: Any, **content: Any) -> str:
    """One of our pages, with the style and the theme button that all have.

    Args:
        name: Of the template ``NAME.html.j2``, its ``NAME.css`` and its ``NAME.js``.
        title: Heading of the page.
        version: Of this package.
        skip: Where the link leads that skips what is above: id and words.
        data: What the script reads, for JSON.
        content: For the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, script = ("\n".join(_text(f"{stem}.{kind}") for stem in ("page", name)) for kind in ("css", "js"))
    return environment.get_template(f"{name}.html.j2").render(
        title=title,
        version=version,
        skip={"id": skip[0], "words": skip[1]},
        css=Markup(css),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(_json_in_html(data)),
        **content,
    )


def _text(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json_in_html(content: Any) -> str:
    """JSON that no string inside can end the script element with."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
