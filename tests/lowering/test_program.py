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
    at = value = 0
    for block in range(program.blocks):
        assert program.block_column[block] == at
        assert program.block_value[block] == value
        for group in range(program.groups):
            for p in range(1, 2**rows):
                while program.stream[at] >= 0:
                    c, tap = where[int(program.stream[at])]
                    for row in (group * rows + r for r in range(rows) if p >> r & 1):
                        channel = (
                            block * channels + c - row // (spec.out_channels // spec.groups) * spec.weight_shape[1]
                        )
                        found[value] = (row * spec.weight_shape[1] + channel) * kept + tap
                        value += 1
                    at += 1
                at += 1
    assert at == len(program.stream)
    assert value == spec.nnz
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
    assert {a.dtype for a in (program.stream, program.block_column, program.block_value, program.order)} == {
        np.dtype(np.int32)
    }
    assert np.array_equal(unpack(program, spec, rows, channels, offsets, taps * 3), index[program.order])
    assert np.array_equal(np.sort(program.order), np.arange(nnz))


def test_the_order_of_the_index_carries_no_meaning() -> None:
    rng = np.random.default_rng(0)
    index = rng.permutation(8 * 90)[:300].astype(np.int32)
    spec = LayerSpec(kind="conv2d", weight_shape=(8, 10, 3, 3), nnz=300)
    offsets = np.arange(9, dtype=np.int32)
    a, b = (pack(i, spec, 3, 4, offsets, 9) for i in (index, np.sort(index)))
    assert np.array_equal(a.stream, b.stream)
    assert np.array_equal(a.block_value, b.block_value)
    assert np.array_equal(index[a.order], np.sort(index)[b.order])
