"""Small pieces of a page: escaped text, readable quantities, and bars made of two elements."""

from __future__ import annotations

import html
from collections.abc import Mapping

_COUNTS = ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def text(value: object) -> str:
    """``value`` as text that a page shows as it is, in elements and in quoted attributes."""
    return html.escape(str(value), quote=True)


def count(number: float) -> str:
    """Three digits and a decimal prefix: ``12.3 M``."""
    return _short(number, _COUNTS)


def size(number: float) -> str:
    """Three digits and a binary prefix: ``12.3 MiB``."""
    return _short(number, _BYTES) if abs(number) >= 2**10 else f"{number:.0f} B"


def times(numerator: float, denominator: float) -> str:
    """How many times as much: ``1.42x``; a dash where there is nothing to compare with."""
    return f"{numerator / denominator:.2f}×" if denominator else "–"


def number(value: float, shown: str, name: str = "") -> str:
    """A quantity as shown, with the exact one as its title and, for whoever reads the page by program, as data."""
    field = f' data-field="{text(name)}"' if name else ""
    exact = f"{value:,}" if isinstance(value, int) else repr(value)
    return f'<data value="{value}" title="{exact}"{field}>{text(shown)}</data>'


def bar(value: float, largest: float, kind: str, label: str) -> str:
    """One bar, ``value`` of ``largest`` long.

    Args:
        value: not negative; a bar that stands for anything is never invisible.
        largest: what fills the whole width.
        kind: class of the bar: ``dense`` or ``sparse``.
        label: what a screen reader says.
    """
    share = 100 * value / largest if largest else 0.0
    least = ";min-width:1px" if value else ""
    return (
        f'<div class="track" role="img" aria-label="{text(label)}">'
        f'<div class="bar {kind}" style="width:{share:.3f}%{least}"></div></div>'
    )


def stacked(parts: Mapping[str, float], largest: float, label: str) -> str:
    """One bar of several parts side by side, each with its class ``part-NAME``."""
    pieces = "".join(
        f'<div class="bar part-{text(name)}" style="width:{100 * value / largest if largest else 0.0:.3f}%" '
        f'title="{text(name)}: {value:,}"></div>'
        for name, value in parts.items()
        if value
    )
    return f'<div class="track tall" role="img" aria-label="{text(label)}">{pieces}</div>'


def _short(value: float, units: tuple[tuple[int, str], ...]) -> str:
    for factor, unit in units:
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"
