"""Tiles worth a measurement, beside the one the rules chose: other rows, other shapes, other blocks. Pure; see runtimes.tvm.tune."""

from __future__ import annotations

import dataclasses
import math

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile
from sift_compiler.options import Tune

_MOST = {"quick": 7, "full": 24}
"""Candidates of a level, the rules' tile included."""
_WORKING_REGISTERS = 4
"""Registers that hold x and a weight and cannot hold partial sums."""


def candidates(spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, level: Tune) -> tuple[Tile, ...]:
    """Tiles to time for one part of a batch, those first that are likely to be fast.

    Args:
        spec: the layer.
        choice: what the rules chose; its tile comes first, the lanes of all others are the same.
        size: height and width of the input; (1, 1) for a linear layer.
        cpu: the processor.
        level: ``"quick"`` or ``"full"``; with ``"off"``, and for row programs, there is only the rules' tile.
    """
    tile = choice.tile
    if level == "off" or tile.lanes not in ("batch", "space", "pairs", "winograd"):
        return (tile,)
    if tile.lanes == "winograd":
        return (tile, *choice.rivals)
    if tile.lanes == "pairs":
        return _pairs(tile, spec, choice.count, cpu)[: _MOST[level]]
    output = (1, 1) if spec.kind == "linear" else spec.output_size(*size)
    shapes = [tile, *_reshaped(tile, spec, output, cpu, choice.count)]
    blocks = [_with_block(tile, spec, factor) for factor in (2.0, 0.5)]
    found = dict.fromkeys((tile, *choice.rivals, *blocks, *shapes))
    if level == "full":
        found.update(dict.fromkeys(_with_block(shape, spec, factor) for shape in shapes for factor in (2.0, 0.5)))
    return tuple(found)[: _MOST[level]]


def _pairs(tile: Tile, spec: LayerSpec, tokens: int, cpu: CpuFacts) -> tuple[Tile, ...]:
    """Other widths, the window as large; then other blocks."""
    most = min((cpu.registers - _WORKING_REGISTERS) // 2, max(1, tokens // tile.vector))
    widths = sorted(set(range(1, most + 1)) - {tile.width}, key=lambda width: abs(math.log(width / tile.width)))
    reshaped = [
        dataclasses.replace(
            tile, width=width, channels=min(spec.in_channels, max(1, tile.channels * tile.width // width))
        )
        for width in widths
    ]
    blocks = [_with_block(shape, spec, factor) for factor in (1.25, 0.8) for shape in (tile, *reshaped)]
    return tuple(dict.fromkeys((tile, *reshaped[:4], *blocks[:2], *reshaped, *blocks)))


def _reshaped(tile: Tile, spec: LayerSpec, output: tuple[int, int], cpu: CpuFacts, count: int) -> list[Tile]:
    """The best two shapes of each number of rows, by :func:`_merit`; the window, and so the block, stays about as large. More than three rows
    only if the rules took them: they saw that the mask shares loads."""
    made: list[tuple[float, Tile]] = []
    for rows in sorted({1, 2, 3, tile.rows}):
        most = max(1, (cpu.registers - _WORKING_REGISTERS) // rows)
        if spec.kind == "linear":
            # A kernel computes whole tiles, the last one together with tokens before it.
            most = min(most, max(1, count // tile.vector))
        shapes = [
            (height, width)
            for height in range(1, (output[0] if _of_images(tile, spec) else 1) + 1)
            for width in range(1, (output[1] if _of_images(tile, spec) else most) + 1)
            if height * width <= most and (height, width, rows) != (tile.height, tile.width, tile.rows)
        ]
        shapes.sort(key=lambda shape: -_merit(shape[0], shape[1], output if _of_images(tile, spec) else None))
        for height, width in shapes[:2]:
            channels = min(spec.in_channels, max(1, tile.channels * tile.vectors // (height * width)))
            other = dataclasses.replace(tile, rows=rows, height=height, width=width, channels=channels)
            merit = _merit(height, width, output if _of_images(tile, spec) else None)
            made.append((merit - 0.1 * abs(rows - tile.rows), other))
    return [other for _, other in sorted(made, key=lambda each: -each[0])]


def _of_images(tile: Tile, spec: LayerSpec) -> bool:
    return spec.kind == "conv2d" and tile.lanes == "batch"


def _merit(height: int, width: int, output: tuple[int, int] | None) -> float:
    """Share of a tile's time that is useful: vectors share the fixed cost of a kept weight, and tiles over the border are lost."""
    useful = 1.0
    if output is not None:
        useful = output[0] * output[1] / (-(-output[0] // height) * height * (-(-output[1] // width) * width))
    return useful / (1 + 0.9 / (height * width))


def _with_block(tile: Tile, spec: LayerSpec, factor: float) -> Tile:
    """The same tile with about ``factor`` times as many input channels in a block, all blocks alike."""
    most = min(spec.in_channels, max(1, round(tile.channels * factor)))
    return dataclasses.replace(tile, channels=-(-spec.in_channels // -(-spec.in_channels // most)))
