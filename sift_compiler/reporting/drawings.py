"""Small pictures of what each transformation makes of a weight: a dense block before, blocks with a mask after. Inline SVG.

All are drawn iso-FLOP: the block before has 16 cells, and so many are filled after.
"""

from __future__ import annotations

from collections.abc import Mapping

_HEIGHT = 84
_CELL = 8
_DENSE, _SPARSE = "var(--dense)", "var(--sparse)"


def drawing(member: str) -> str:
    """The picture of a transformation, or nothing for a name that is not known."""
    picture = _PICTURES.get(member)
    if picture is None:
        return ""
    pieces, width = picture
    before = f"{_block(0, 4, 4, None)}{_arrow(41)}"
    return (
        f'<svg class="drawing" width="{width}" height="{_HEIGHT}" viewBox="0 0 {width} {_HEIGHT}" aria-hidden="true">'
        f"{before}{pieces}</svg>"
    )


def _block(x: int, rows: int, columns: int, keep: int | None) -> str:
    """A weight of ``rows`` x ``columns`` cells, centred at half height, of which a mask keeps ``keep``; all are kept without a mask."""
    top = (_HEIGHT - rows * _CELL) // 2
    colour = _DENSE if keep is None else "var(--track)"
    frame = f'<rect x="{x}" y="{top}" width="{columns * _CELL}" height="{rows * _CELL}" rx="2" fill="{colour}"/>'
    # Multiples of a number without a common factor with the modulus: spread like a random mask, and the same every time.
    kept = sorted(range(rows * columns), key=lambda cell: (cell * 29 + 7) % 97)[: keep or 0]
    cells = "".join(
        f'<rect x="{x + cell % columns * _CELL + 1}" y="{top + cell // columns * _CELL + 1}" width="{_CELL - 2}" '
        f'height="{_CELL - 2}" fill="{_SPARSE}"/>'
        for cell in kept
    )
    return frame + cells


def _sign(x: int, sign: str) -> str:
    return f'<text x="{x}" y="{_HEIGHT // 2 + 5}" font-size="15" fill="var(--soft)">{sign}</text>'


def _arrow(x: int) -> str:
    return _sign(x, "→")


_PICTURES: Mapping[str, tuple[str, int]] = {
    "SparseWide": (_block(68, 8, 8, 16), 132),
    "SparseParallel": (f"{_block(68, 4, 4, 8)}{_sign(106, '+')}{_block(122, 4, 4, 8)}", 154),
    "SparseFactorized": (f"{_block(68, 4, 9, 8)}{_sign(145, '·')}{_block(156, 9, 4, 8)}", 188),
    "SparseDoped": (f"{_block(68, 4, 4, 8)}{_sign(106, '+')}{_block(122, 4, 1, None)}{_sign(135, '·')}{_block(145, 1, 4, None)}", 177),
    "LowRank": (f"{_block(68, 8, 1, None)}{_sign(81, '·')}{_block(91, 1, 8, None)}", 155),
}  # fmt: skip
