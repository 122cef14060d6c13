"""The compiled packer of masks equals the one in NumPy, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sift_compiler.lowering.program import SKIP, Program, pack
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.mask_packer import MaskPacker
from sift_compiler.runtimes.tvm.target import host_cpu


def assert_equal(made: Program, expected: Program) -> None:
    for field in ("stream", "block_column", "block_value", "order"):
        one, other = getattr(made, field), getattr(expected, field)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other), field
    assert (made.groups, made.blocks) == (expected.groups, expected.blocks)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("channels", [1, 4, 64])
@pytest.mark.parametrize(
    ("shape", "groups", "nnz"),
    [
        ((7, 10, 3, 3), 1, 200),
        ((12, 3, 3, 1), 4, 50),
        ((9, 1, 3, 3), 9, 40),
        ((64, 30), 1, 100),
        ((9, 200), 1, 1800),
        ((50, 60), 1, 1),
        ((5, 4), 1, 0),
    ],
)
def test_every_entry_is_that_of_the_reference(
    rows: int, channels: int, shape: tuple[int, ...], groups: int, nnz: int
) -> None:
    rng = np.random.default_rng(0)
    spec = LayerSpec(kind="conv2d" if len(shape) == 4 else "linear", weight_shape=shape, groups=groups, nnz=nnz)
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    offsets = rng.permutation(taps * 3)[:taps].astype(np.int32)
    packer = MaskPacker(spec, rows, channels, offsets, taps * 3, host_cpu().name, segments=3)
    for empty in (0, 3, 1):  # three masks in turn: nothing of one may be left for the next
        index = rng.permutation(int(np.prod(shape)))[:nnz].astype(np.int32)
        if empty:
            index[::empty] = -1 - index[::empty]
        expected = pack(index, spec, rows, channels, offsets, taps * 3, segments=3)
        assert_equal(packer.pack(torch.from_numpy(index)), expected)


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("block", [2, 4])
def test_blocks_of_rows_skip_empty_buckets(rows: int, block: int) -> None:
    mask = (np.random.default_rng(0).random((6, 10, 3, 3)) < 0.2).repeat(block, 0)
    index = np.random.default_rng(1).permutation(np.flatnonzero(mask)).astype(np.int32)
    spec = LayerSpec(kind="conv2d", weight_shape=mask.shape, nnz=index.size)
    offsets = np.arange(9, dtype=np.int32) * 16
    packer = MaskPacker(spec, rows, 4, offsets, 9 * 16, host_cpu().name, segments=2)
    made = packer.pack(torch.from_numpy(index))
    assert_equal(made, pack(index, spec, rows, 4, offsets, 9 * 16, segments=2))
    if block % rows == 0:
        assert np.count_nonzero(made.stream == SKIP) == made.groups * made.blocks


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_layer_of_ordinary_size(sparsity: float) -> None:
    shape = (256, 256, 3, 3)
    rng = np.random.default_rng(0)
    index = rng.permutation(int(np.prod(shape)))[: int(np.prod(shape) * (1 - sparsity))].astype(np.int32)
    spec = LayerSpec(kind="conv2d", weight_shape=shape, nnz=index.size)
    offsets = np.arange(9, dtype=np.int32) * 16
    packer = MaskPacker(spec, 3, 16, offsets, 9 * 16, host_cpu().name)
    assert_equal(packer.pack(torch.from_numpy(index)), pack(index, spec, 3, 16, offsets, 9 * 16))
