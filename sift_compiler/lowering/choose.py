"""Choose tiles for a layer, an input shape and a processor: a pure function with a reason in words.

The rules come from measurements (docs/performance.md). Up to about 65 % sparsity the multiply-add units are the limit, so three rows
share every load of x; above, few columns are shared, loads and cache are the limit, and a wider tile with fewer rows wins.
"""

from __future__ import annotations

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile


def _sparsity(spec: LayerSpec) -> float:
    entries = spec.out_channels * spec.weight_shape[1] * spec.kernel_size[0] * spec.kernel_size[1]
    return 1 - spec.nnz / entries if entries else 0.0


def _rows(sparsity: float) -> int:
    return 3 if sparsity <= 0.8 else 2


def _most_vectors(rows: int, cpu: CpuFacts) -> int:
    """Vectors per row so that partial sums, one broadcast per row and one x fit the registers."""
    return max(1, min(8 if rows > 1 else 16, (cpu.registers - rows - 2) // rows))


def _budget(sparsity: float, cpu: CpuFacts) -> int:
    """Bytes of a block's window: beside it the partial sums stream through the first-level cache; with few kept weights per block
    going back to them costs more than reading some of x from the second level."""
    share = 0.87 if sparsity <= 0.65 else 1.0 if sparsity <= 0.8 else 1.2
    return int(share * cpu.l1_bytes)


def _block(channels: int, bytes_per_channel: int, budget: int) -> int:
    """Channels per block: as many as the budget holds, evenly spread over the blocks."""
    most = max(1, min(channels, budget // bytes_per_channel))
    return -(-channels // -(-channels // most))


def _halo(spec: LayerSpec) -> tuple[int, int, int]:
    """Extra rows and columns of a window, and how many phases the taps read."""
    reach = [(spec.kernel_size[a] - 1) * spec.dilation[a] for a in (0, 1)]
    phases = 1
    for a in (0, 1):
        phases *= len({k * spec.dilation[a] % spec.stride[a] for k in range(spec.kernel_size[a])})
    return reach[0] // spec.stride[0], reach[1] // spec.stride[1], phases


def _image_tile(spec: LayerSpec, output: tuple[int, int], cpu: CpuFacts) -> tuple[Tile, float]:
    """Best tile with lanes over images, and its cost: vectors computed per useful vector, small tiles charged for their overhead."""
    sparsity = _sparsity(spec)
    rows = _rows(sparsity)
    halo_y, halo_x, phases = _halo(spec)
    best: tuple[float, int, int] | None = None
    for height in range(1, min(output[0], 8) + 1):
        for width in range(1, min(output[1], _most_vectors(rows, cpu) // height) + 1):
            vectors = height * width
            down, across = -(-output[0] // height), -(-output[1] // width)
            waste = down * across * vectors / (output[0] * output[1])
            window = (height + halo_y) * (width + halo_x) / vectors
            cost = waste * (1 + 1.5 / vectors) * (1 + 0.02 * window)
            if best is None or cost < best[0]:
                best = (cost, height, width)
    assert best is not None
    cost, height, width = best
    per_channel = (height + halo_y) * (width + halo_x) * phases * cpu.lanes * 4
    tile = Tile(
        lanes="batch", vector=cpu.lanes, rows=rows, height=height, width=width,
        channels=_block(spec.in_channels, per_channel, _budget(sparsity, cpu)),
    )  # fmt: skip
    return tile, cost


def _space_tile(
    spec: LayerSpec, images: int, output: tuple[int, int], size: tuple[int, int], cpu: CpuFacts
) -> tuple[Tile, float]:
    """Best tile with lanes over neighbouring positions of all images, and its cost in vectors per useful vector of positions."""
    sparsity = _sparsity(spec)
    rows = _rows(sparsity)
    halo_y, halo_x, phases = _halo(spec)
    pitch = output[1] + halo_x
    positions = ((images - 1) * (output[0] + halo_y) + output[0]) * pitch
    best: tuple[float, int] | None = None
    for width in range(1, _most_vectors(rows, cpu) + 1):
        step = width * cpu.lanes
        waste = -(-positions // step) * step / (images * output[0] * output[1])
        cost = waste * (1 + 1.5 / width) * 1.08
        if best is None or cost < best[0]:
            best = (cost, width)
    assert best is not None
    cost, width = best
    per_channel = (width * cpu.lanes + halo_y * pitch + halo_x) * phases * 4
    tile = Tile(
        lanes="space", vector=cpu.lanes, rows=rows, width=width,
        channels=_block(spec.in_channels, per_channel, _budget(sparsity, cpu)),
    )  # fmt: skip
    return tile, cost


def _describe(sparsity: float, rows: int) -> str:
    return f"sparsity {sparsity:.2f}: {rows} rows share each load"


def _choose_images(spec: LayerSpec, shape: tuple[int, ...], cpu: CpuFacts) -> tuple[Choice, ...]:
    count, size = shape[0], (shape[2], shape[3])
    output, lanes = spec.output_size(*size), cpu.lanes
    why = _describe(_sparsity(spec), _rows(_sparsity(spec)))
    groups, rest = divmod(count, lanes)
    image_tile, image_cost = _image_tile(spec, output, cpu)
    parts = []
    if groups:
        parts.append(Choice(
            tile=image_tile, first=0, count=groups * lanes, reason=f"{why}; lanes over {lanes} images, {image_cost:.2f} vectors per useful one"
        ))  # fmt: skip
    if rest:
        space_tile, space_cost = _space_tile(spec, rest, output, size, cpu)
        if space_cost * rest < image_cost * lanes:
            reason = f"{why}; {rest} images fill no vector, so lanes over positions ({space_cost:.2f} against {image_cost * lanes / rest:.2f})"
            parts.append(Choice(tile=space_tile, first=groups * lanes, count=rest, reason=reason))
        else:
            reason = f"{why}; lanes over {lanes} images although {rest} are left ({image_cost * lanes / rest:.2f} against {space_cost:.2f})"
            first = max(0, count - lanes)
            parts.append(Choice(tile=image_tile, first=first, count=lanes, reason=reason))
    return tuple(parts)


def _choose_tokens(spec: LayerSpec, tokens: int, cpu: CpuFacts) -> tuple[Choice, ...]:
    sparsity, lanes = _sparsity(spec), cpu.lanes
    rows = _rows(sparsity)
    most = min(_most_vectors(rows, cpu), max(1, tokens // lanes))

    def cost(width: int) -> float:
        step = width * lanes
        return -(-tokens // step) * step / tokens * (1 + 1.5 / width)

    width = min(range(1, most + 1), key=cost)
    tile = Tile(
        lanes="batch", vector=lanes, rows=rows, width=width,
        channels=_block(spec.in_channels, width * lanes * 4, _budget(sparsity, cpu)),
    )  # fmt: skip
    reason = f"{_describe(sparsity, rows)}; lanes over tokens, {cost(width):.2f} vectors per useful one"
    return (Choice(tile=tile, first=0, count=max(tokens, lanes), reason=reason),)


def choose(spec: LayerSpec, input_shape: tuple[int, ...], cpu: CpuFacts) -> tuple[Choice, ...]:
    """Tiles for one layer.

    Args:
        spec: the layer.
        input_shape: ``(N, C, H, W)``, or ``(tokens, in)`` for a linear layer.
        cpu: the processor.

    Returns:
        The parts of the batch and their tiles; empty for an empty batch. Where ``count`` reaches past the batch, the lanes that are
        left over compute what nobody reads.
    """
    if input_shape[0] == 0:
        return ()
    if spec.kind == "linear":
        return _choose_tokens(spec, input_shape[0], cpu)
    return _choose_images(spec, input_shape, cpu)
