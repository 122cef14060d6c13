"""The program of a mask, unpacked again, is the mask."""

from __future__ import annotations

import numpy as np
import pytest

from sift_compiler.lowering.program import Program, pack
from sift_compiler.lowering.specification import LayerSpec


def unpack(program: Program, spec: LayerSpec, rows: int, channels: int, offsets: np.ndarray, stride: int) -> np.ndarray:
    """Flat dense position of every packed value, by walking the program as a kernel does."""
    kept = spec.kernel_size[0] * spec.kernel_size[1]
    where = {int(offsets[tap]) + c * stride: (c, tap) for c in range(channels) for tap in range(kept)}
    found = np.full(spec.nnz, -1)
    patterns = 2**rows - 1
    for block in range(program.blocks):
        for group in range(program.groups):
            for p in range(1, patterns + 1):
                bucket = (block * program.groups + group) * patterns + p - 1
                value = program.value_start[bucket]
                for k in range(program.column_start[bucket], program.column_start[bucket + 1]):
                    c, tap = where[int(program.offsets[k])]
                    for r in range(rows):
                        if p >> r & 1:
                            row = group * rows + r
                            channel = (
                                block * channels + c - row // (spec.out_channels // spec.groups) * spec.weight_shape[1]
                            )
                            found[value] = (row * spec.weight_shape[1] + channel) * kept + tap
                            value += 1
                assert value == program.value_start[bucket + 1]
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 4, 16])
@pytest.mark.parametrize(
    ("shape", "groups", "nnz"),
    [
        ((7, 10, 3, 3), 1, 200),
        ((12, 3, 3, 1), 4, 50),
        ((9, 30), 1, 100),
        ((9, 30), 1, 270),
        ((50, 60), 1, 3),
        ((5, 4), 1, 0),
    ],
)
def test_a_program_holds_every_kept_weight_once(
    rows: int, channels: int, shape: tuple[int, ...], groups: int, nnz: int
) -> None:
    rng = np.random.default_rng(0)
    index = rng.permutation(int(np.prod(shape)))[:nnz].astype(np.int32)
    spec = LayerSpec(kind="conv2d" if len(shape) == 4 else "linear", weight_shape=shape, groups=groups, nnz=nnz)
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    offsets = rng.permutation(taps * 3)[:taps].astype(np.int32)
    program = pack(index, spec, rows, channels, offsets, taps * 3)
    assert program.offsets.dtype == program.order.dtype == program.column_start.dtype == np.int32
    assert np.array_equal(unpack(program, spec, rows, channels, offsets, taps * 3), index[program.order])
    assert np.array_equal(np.sort(program.order), np.arange(nnz))
    assert program.column_start[-1] == len(program.offsets)
    assert program.value_start[-1] == nnz


def test_the_order_of_the_index_carries_no_meaning() -> None:
    rng = np.random.default_rng(0)
    index = rng.permutation(8 * 90)[:300].astype(np.int32)
    spec = LayerSpec(kind="conv2d", weight_shape=(8, 10, 3, 3), nnz=300)
    offsets = np.arange(9, dtype=np.int32)
    a, b = (pack(i, spec, 3, 4, offsets, 9) for i in (index, np.sort(index)))
    assert np.array_equal(a.offsets, b.offsets)
    assert np.array_equal(a.value_start, b.value_start)
    assert np.array_equal(index[a.order], np.sort(index)[b.order])
