"""Choose tiles for a layer, an input shape and a processor: a pure function with a reason in words.

The rules come from measurements (docs/performance.md). Loads cost time beside multiply-adds: up to about 65 % sparsity three rows share every
load of x, four and five where vectors lie across cache lines; above, few columns are shared, and a wider tile with fewer rows wins. Where a
mask shares more loads between R rows than a random one would, as masks in blocks of R rows do, R rows are weighed by what they save.
"""

from __future__ import annotations

import dataclasses

from sift_compiler.lowering.choose_pairs import choose_pairs
from sift_compiler.lowering.choose_rows import choose_rows
from sift_compiler.lowering.choose_winograd import Fallback, of_image_vectors, of_positions
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.sharing import MOST_ROWS, Loads, unstructured_loads
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile

_SHARED = 0.8
"""Sparsity up to which rows of a random mask share loads worth the while."""
_LINE = 16
"""float32 numbers of a cache line."""
_SAVED = 0.1
"""Share of the loads of x that a mask must save against a random one before its rows are weighed by it: less is chance."""
_FEW_LOADS = 0.3
_PASSING = 54
"""Vector multiply-adds at full speed in whose time a vector is fetched, or finished and stored."""
_POSITIONS = 1.2
"""Time with lanes over positions beside that with lanes over images of the same cost."""
_WORTH_ZEROS = 0.95
"""Winograd's convolution is taken where it takes at most this share of the time: it needs more memory, and its errors are larger."""
_WORTH_COLD_ZEROS = 0.85
"""The same in the usual order: its weights are read for few tiles, and a network that is called now and then finds them in no cache."""
_WORTH_OF_A_LOAD = 0.5
"""Time that a tile saves with every load of x per kept weight that it saves (measured)."""


def _saved(spec: LayerSpec, loads: Loads | None) -> dict[int, float]:
    """Loads of x per kept weight that 1 to 4 rows save against a random mask of the same density; 0 where it is as good as random."""
    random = unstructured_loads(1 - spec.sparsity)
    saved = (0.0,) * MOST_ROWS if loads is None else (r - one for r, one in zip(random, loads, strict=True))
    return {rows: one if one > _SAVED else 0.0 for rows, one in enumerate(saved, 1)}


def _rows(spec: LayerSpec, saved: dict[int, float]) -> tuple[int, ...]:
    """Rows worth a try. Three share loads best; but their partial sums leave room for fewer vectors, and above 80 % little is shared,
    unless the mask has blocks of rows."""
    random = (3, 2) if spec.sparsity <= _SHARED else (2, 1)
    return (*random, *(rows for rows, one in saved.items() if one and rows not in random))


def _most_vectors(rows: int, cpu: CpuFacts) -> int:
    """Vectors per row. With one row and with three, partial sums may take two thirds of the registers: beyond that they measure slower
    although they would fit. Otherwise all that x and the weights leave, up to 14."""
    sums = cpu.registers * 22 // 32 if rows in (1, 3) else cpu.registers - rows - 1
    return max(1, min({1: 16, 2: 14}.get(rows, 8), sums // rows))


def _block(spec: LayerSpec, vectors: int, bytes_per_channel: int, cpu: CpuFacts, saved: float) -> int:
    """Input channels per block.

    The window should share the first-level cache with partial sums that stream by. But a block must keep some weights per row (18 to
    40, the more the fewer vectors each serves), or going back to the partial sums costs more than reading some of x from the second
    level; up to twice the first level pays, and so it does where few loads are left (``saved`` per kept weight).
    """
    kept_per_channel = max(1 - spec.sparsity, 1e-6) * spec.kernel_size[0] * spec.kernel_size[1] / spec.groups
    comfortable = (2.0 if saved > _FEW_LOADS else 0.87) * cpu.l1_bytes / bytes_per_channel
    most = min(
        max(comfortable, max(18, 42 - 2 * vectors) / kept_per_channel),
        2 * cpu.l1_bytes / bytes_per_channel,
        spec.in_channels,
    )
    return -(-spec.in_channels // -(-spec.in_channels // max(1, int(most))))


def _cost(spec: LayerSpec, rows: int, waste: float, vectors: int, channels: int, saved: float) -> float:
    """Relative time per useful multiply-add: ``waste`` vectors per useful one, a fixed cost per kept weight and tile that ``vectors`` share,
    one per row and block that the kept weights of ``channels`` share, and what ``saved`` loads of x spare (constants fitted to measurements)."""
    density = 1 - spec.sparsity
    fewer_shared = 1 + 0.25 * max(0.0, density - 0.25) * (3 - rows)
    more_loops = 1.05 if density < 0.2 and rows > 1 and not saved else 1.0
    kept = max(density, 1e-6) * spec.kernel_size[0] * spec.kernel_size[1] * channels / spec.groups
    return waste * (1 + 0.9 / vectors) * (1 + 5 / kept) * fewer_shared * more_loops * (1 - _WORTH_OF_A_LOAD * saved)


def _space_cost(
    spec: LayerSpec, rows: int, waste: float, vectors: int, channels: int, saved: float, lanes: int
) -> float:
    """The same with lanes over positions, where vectors of x lie across cache lines: loads decide, so they are counted, and with them the
    loops of the row patterns. Constants fitted to 3×3 layers of 7² to 56² positions at 50, 75 and 90 % sparsity."""
    density = max(1 - spec.sparsity, 1e-6)
    kept = density * spec.kernel_size[0] * spec.kernel_size[1] * channels / spec.groups
    of_x = (1 - (1 - density) ** rows) / (rows * density) - saved
    across = 1 + 0.85 * (lanes - 1) / _LINE
    loads = of_x * (across + 1 / vectors) + 1 / vectors
    loops = 10 * (2**rows - 1) / (rows * kept * vectors)
    return waste * (0.55 + 0.63 * loads) * (1 + 5 / kept) * (1 + (0.0 if saved else loops))


def _copying(spec: LayerSpec, window: int, vectors: int) -> float:
    """Time with the copying of windows, of which a vector takes as long as twenty multiply-adds, over that without."""
    entries = spec.out_channels * spec.kernel_size[0] * spec.kernel_size[1] / spec.groups
    return 1 + 20 * window / (max(1 - spec.sparsity, 1e-6) * entries * vectors)


def _halo(spec: LayerSpec) -> tuple[int, int, int]:
    """Extra rows and columns of a window, and how many phases the taps read."""
    reach = [(spec.kernel_size[a] - 1) * spec.dilation[a] for a in (0, 1)]
    phases = 1
    for a in (0, 1):
        phases *= len({k * spec.dilation[a] % spec.stride[a] for k in range(spec.kernel_size[a])})
    return reach[0] // spec.stride[0], reach[1] // spec.stride[1], phases


def _image_tile(spec: LayerSpec, output: tuple[int, int], cpu: CpuFacts, loads: Loads | None) -> tuple[Tile, float]:
    """Best tile with lanes over images, and its cost (see :func:`_cost`)."""
    halo_y, halo_x, phases = _halo(spec)
    saved = _saved(spec, loads)

    def tile(rows: int, height: int, width: int) -> tuple[float, Tile]:
        vectors = height * width
        waste = -(-output[0] // height) * -(-output[1] // width) * vectors / (output[0] * output[1])
        window = (height + halo_y) * (width + halo_x) * phases
        channels = _block(spec, vectors, window * cpu.lanes * 4, cpu, saved[rows])
        made = Tile(lanes="batch", vector=cpu.lanes, rows=rows, height=height, width=width, channels=channels)
        return _cost(spec, rows, waste, vectors, channels, saved[rows]) * _copying(spec, window, vectors), made

    candidates = [
        tile(rows, height, width)
        for rows in _rows(spec, saved)
        for height in range(1, min(output[0], _most_vectors(rows, cpu)) + 1)
        for width in range(1, min(output[1], _most_vectors(rows, cpu) // height) + 1)
    ]
    cost, best = min(candidates, key=lambda candidate: candidate[0])
    return best, cost


def _space_tile(
    spec: LayerSpec, images: int, output: tuple[int, int], size: tuple[int, int], cpu: CpuFacts, loads: Loads | None
) -> tuple[Tile, float]:
    """Best tile with lanes over neighbouring positions of all images, and its cost."""
    halo_y, halo_x, phases = _halo(spec)
    pitch, saved = output[1] + halo_x, _saved(spec, loads)
    positions = ((images - 1) * (output[0] + halo_y) + output[0]) * pitch

    def tile(rows: int, width: int) -> tuple[float, Tile]:
        step = width * cpu.lanes
        waste = -(-positions // step) * step / (images * output[0] * output[1])
        channels = _block(spec, width, (step + halo_y * pitch + halo_x) * phases * 4, cpu, saved.get(rows, 0.0))
        made = Tile(lanes="space", vector=cpu.lanes, rows=rows, width=width, channels=channels)
        return _space_cost(spec, rows, waste, width, channels, saved.get(rows, 0.0), cpu.lanes), made

    several = (*_rows(spec, saved), *((4, 5) if spec.sparsity <= _SHARED else ()))
    candidates = [tile(rows, width) for rows in several for width in range(1, _most_vectors(rows, cpu) + 1)]
    cost, best = min(candidates, key=lambda candidate: candidate[0])
    return best, cost


def _describe(spec: LayerSpec, tile: Tile) -> str:
    return f"sparsity {spec.sparsity:.2f}: {tile.rows} rows share each load"


def _zeros_too(spec: LayerSpec, dense: Fallback, otherwise: float) -> str:
    return f"sparsity {spec.sparsity:.2f}: Winograd's convolution, zeros multiplied too, relative cost {dense.cost:.2f} against {otherwise:.2f}"


def _choose_images(
    spec: LayerSpec, shape: tuple[int, ...], cpu: CpuFacts, loads: Loads | None, largest: int, frozen: bool
) -> tuple[Choice, ...]:
    count, size = shape[0], (shape[2], shape[3])
    output, lanes = spec.output_size(*size), cpu.lanes
    groups, rest = divmod(count, lanes)
    images, image_cost = _image_tile(spec, output, cpu, loads)
    dense = of_positions(spec, output, count, largest, frozen, cpu)
    space, space_cost = _space_tile(spec, rest or count, output, size, cpu, loads)
    padded_cost = image_cost * lanes / rest if rest else image_cost
    if dense is not None:
        otherwise = _dense_cost(spec, image_cost if groups else min(space_cost * _POSITIONS, padded_cost))
        if dense.cost < _WORTH_COLD_ZEROS * otherwise:
            rivals = (space,) if not groups else ()
            return (
                Choice(tile=dense.tile, first=0, count=count, reason=_zeros_too(spec, dense, otherwise), rivals=rivals),
            )
    parts = []
    if groups:
        reason = f"{_describe(spec, images)}; lanes over {lanes} images, relative cost {image_cost:.2f}"
        parts.append(Choice(tile=images, first=0, count=groups * lanes, reason=reason))
    if rest and space_cost < padded_cost:
        reason = f"{_describe(spec, space)}; {rest} images fill no vector: lanes over positions, relative cost {space_cost:.2f} against {padded_cost:.2f}"
        rivals = (dense.tile,) if dense is not None and not groups else ()
        parts.append(Choice(tile=space, first=groups * lanes, count=rest, reason=reason, rivals=rivals))
    elif rest:
        reason = f"{_describe(spec, images)}; lanes over images although {rest} fill no vector, relative cost {padded_cost:.2f} against {space_cost:.2f}"
        parts.append(Choice(tile=images, first=max(0, count - lanes), count=lanes, reason=reason))
    return tuple(parts)


def _dense_cost(spec: LayerSpec, cost: float) -> float:
    """A cost of :func:`_cost` or :func:`_space_cost` in the unit of :class:`Fallback` (measured at 50, 75 and 90 % sparsity)."""
    density = 1 - spec.sparsity
    return density * (2.05 - density) * cost


def _passing(spec: LayerSpec) -> float:
    """The cost, in the unit of :class:`Fallback`, of input and output of many images, which pass through from memory and back."""
    return _PASSING * (1 / spec.in_channels + 1 / spec.out_channels) / (spec.kernel_size[0] * spec.kernel_size[1])


def _choose_image_vectors(
    spec: LayerSpec, shape: tuple[int, ...], cpu: CpuFacts, loads: Loads | None, largest: int, frozen: bool
) -> Choice:
    """The tile of a convolution whose input lies with images side by side: ``shape`` is (groups of images, C, H, W, lanes)."""
    output = spec.output_size(shape[2], shape[3])
    tile, cost = _image_tile(spec, output, cpu, loads)
    count, otherwise = shape[0] * shape[4], _dense_cost(spec, cost) + _passing(spec)
    dense = of_image_vectors(spec, output, count, largest, frozen, cpu)
    if dense is not None and dense.cost < _WORTH_ZEROS * otherwise:
        return Choice(tile=dense.tile, first=0, count=count, reason=_zeros_too(spec, dense, otherwise), rivals=(tile,))
    reason = f"{_describe(spec, tile)}; images stay side by side between sparse layers, relative cost {cost:.2f}"
    return Choice(tile=tile, first=0, count=count, reason=reason, rivals=() if dense is None else (dense.tile,))


def sparse_space(spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts) -> Choice:
    """``choice`` with lanes over positions and kept weights alone."""
    tile, _ = _space_tile(spec, choice.count, spec.output_size(*size), size, cpu, None)
    return dataclasses.replace(choice, tile=tile, reason=_describe(spec, tile))


def _choose_tokens(spec: LayerSpec, tokens: int, cpu: CpuFacts, loads: Loads | None) -> tuple[Choice, ...]:
    lanes, saved = cpu.lanes, _saved(spec, loads)

    def tile(rows: int, width: int) -> tuple[float, Tile]:
        step = width * lanes
        waste = -(-tokens // step) * step / tokens
        channels = _block(spec, width, step * 4, cpu, saved[rows])
        made = Tile(lanes="batch", vector=lanes, rows=rows, width=width, channels=channels)
        return _cost(spec, rows, waste, width, channels, saved[rows]), made

    candidates = [
        tile(rows, width)
        for rows in _rows(spec, saved)
        for width in range(1, min(_most_vectors(rows, cpu), max(1, tokens // lanes)) + 1)
    ]
    cost, best = min(candidates, key=lambda candidate: candidate[0])
    reason = f"{_describe(spec, best)}; lanes over tokens, relative cost {cost:.2f}"
    return (Choice(tile=best, first=0, count=max(tokens, lanes), reason=reason),)


def choose(
    spec: LayerSpec,
    input_shape: tuple[int, ...],
    cpu: CpuFacts,
    *,
    whole_vectors: bool = False,
    loads: Loads | None = None,
    largest: int = 0,
    frozen: bool = False,
) -> tuple[Choice, ...]:
    """Tiles for one layer.

    Args:
        spec: the layer.
        input_shape: ``(N, C, H, W)``, or ``(tokens, in)`` for a linear layer, or ``(N / lanes, C, H, W, lanes)`` with images side by side.
        cpu: the processor.
        whole_vectors: leave out what serves few tokens only: lanes are whole vectors of images, positions or tokens.
        loads: how many loads of x the mask needs (see :func:`sharing.measured_loads`); by default those of a random one.
        largest: tiles of Winograd's convolution at most, 0 for none (see lowering.winograd).
        frozen: values are seldom changed; what is made of them need not be made at every call.

    Returns:
        The parts of the batch and their tiles; empty for an empty batch. Where ``count`` reaches past the batch, the lanes that are
        left over compute what nobody reads.
    """
    if input_shape[0] == 0:
        return ()
    if spec.kind == "linear":
        few = None if whole_vectors else choose_rows(spec, input_shape[0], cpu)
        # Masks in blocks of rows share more by their patterns than pairs do.
        structured = any(_saved(spec, loads).values())
        many = few or (None if whole_vectors or structured else choose_pairs(spec, input_shape[0], cpu))
        return _choose_tokens(spec, input_shape[0], cpu, loads) if many is None else (many,)
    if len(input_shape) == 5:
        return (_choose_image_vectors(spec, input_shape, cpu, loads, largest, frozen),)
    return _choose_images(spec, input_shape, cpu, loads, largest, frozen)
