"""How figures are drawn and written: the options that all drawing commands share. Needs no matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

#: ``screen`` has its notes inside the figure, ``paper`` keeps them for the caption and has serif type, ``slides`` has
#: large type and heavy lines.
STYLES = ("screen", "paper", "slides")
#: Formats in which figures can be written.
FORMATS = ("png", "pdf", "svg")

# TeX's point, not PostScript's: what \the\textwidth prints.
_UNITS = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}


@dataclass(frozen=True)
class DrawingOptions:
    """How figures are drawn and written.

    Example:
        >>> DrawingOptions("paper", ("pdf",), inches("122mm")).formats
        ('pdf',)
    """

    style: str = "screen"
    formats: tuple[str, ...] = ("png", "pdf")
    width: float | None = None

    def __post_init__(self) -> None:
        """Check what is given."""
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {self.style!r}")
        if not self.formats or set(self.formats) - set(FORMATS):
            raise ValueError(f"figure format must be some of {','.join(FORMATS)}, got {','.join(self.formats)!r}")
        if self.width is not None and not 1 <= self.width <= 40:
            raise ValueError(f"width must be from 1 to 40 inches, got {self.width:.4g}")


_DEFAULT = DrawingOptions()
_CURRENT: ContextVar[DrawingOptions] = ContextVar("drawing", default=_DEFAULT)


def current_drawing() -> DrawingOptions:
    """The options that figures are drawn and written with here."""
    return _CURRENT.get()


@contextmanager
def drawing(options: DrawingOptions) -> Iterator[None]:
    """Draw and write figures inside this context with these options, as seaborn's ``plotting_context`` does.

    Example:
        >>> with drawing(DrawingOptions("slides")):
        ...     current_drawing().style
        'slides'
    """
    token = _CURRENT.set(options)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def inches(text: str) -> float:
    """A width in inches from a number with its unit (``in``, ``mm``, ``cm``, or TeX's ``pt``); without one, inches.

    Example:
        >>> round(inches("345pt"), 2), inches("3.4")
        (4.77, 3.4)
    """
    number, unit = text.strip().lower(), "in"
    if number[-2:] in _UNITS:
        number, unit = number[:-2], number[-2:]
    try:
        return float(number) * _UNITS[unit]
    except ValueError:
        raise ValueError(f"width must be a length such as 3.4in, 86mm or 345pt, got {text!r}") from None
