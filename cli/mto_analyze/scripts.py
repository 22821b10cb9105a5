"""What the scripts in figures/ run: one figure of the paper, by default drawn beside its script."""

import sys
from pathlib import Path

from mto_analyze import app


def run_script(name: str, script: str) -> None:
    """What a script of figures/ does: draw one figure, by default into the script's folder.

    Args:
        name: Of the figure.
        script: Its ``__file__``.
    """
    given = sys.argv[1:]
    here = [] if {"--out", "--help", "--list"} & _options(given) else ["--out", str(Path(script).parent)]
    app(["figures", name, *here, *given])


def _options(arguments: list[str]) -> set[str]:
    """The names of the options among arguments, also of those given as ``--name=value``."""
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
