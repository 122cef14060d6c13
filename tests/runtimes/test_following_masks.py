"""What a layer's kernels do when its mask has moved: as little packing as there are orders, and the numbers of the new mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sift_compiler.ir.pattern import EMPTY, asleep
from sift_compiler.lowering import input_gradient
from sift_compiler.lowering.input_gradient import TransposedLayer
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import reference
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.mask_packer import MaskPacker
from sift_compiler.runtimes.tvm.target import host_cpu

SPEC = LayerSpec(kind="conv2d", weight_shape=(10, 6, 3, 3), padding=(1, 1), nnz=60)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry with every mask that is packed."""
    calls: list[int] = []
    pack = MaskPacker.pack

    def counted(self: MaskPacker, index: torch.Tensor) -> object:
        calls.append(index.numel())
        return pack(self, index)

    monkeypatch.setattr(MaskPacker, "pack", counted)
    return calls


def drawn(seed: int) -> torch.Tensor:
    return torch.randperm(540, generator=torch.Generator().manual_seed(seed))[:60].int()


def check(kernel: TvmKernel, index: torch.Tensor, *, forward_first: bool = True) -> None:
    """Output and gradient of the values, in either order, are those of the reference."""
    lanes = host_cpu().lanes
    x, dy, values = torch.randn(lanes, 6, 4, 4), torch.randn(lanes, 10, 4, 4), torch.randn(60)
    geometry = ((10, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1)

    def forward() -> None:
        expected = reference.conv2d(x, values, index, None, *geometry)
        torch.testing.assert_close(kernel(x, values, index, None), expected, rtol=1e-4, atol=1e-5)

    if forward_first:
        forward()
    expected = reference.gather(reference.conv2d_weight_gradient(dy, x, *geometry), index)
    torch.testing.assert_close(kernel.values_gradient(dy, x, index), expected, rtol=1e-4, atol=1e-4)
    forward()


def test_the_gradient_of_values_takes_the_program_of_the_forward_pass(packed: list[int]) -> None:
    kernel, index = TvmKernel(SPEC, "layer", 1, host_cpu()), drawn(0)
    check(kernel, index)
    assert len(packed) == 1
    for seed in (1, 2):
        index.copy_(drawn(seed))
        check(kernel, index)
        assert len(packed) == 1 + seed
    index[::4] = EMPTY
    check(kernel, index)
    assert len(packed) == 4


def test_it_packs_the_mask_itself_where_the_forward_pass_has_another_or_none_yet(packed: list[int]) -> None:
    kernel, index = TvmKernel(SPEC, "layer", 1, host_cpu()), drawn(0)
    check(kernel, index)
    index.copy_(drawn(1))
    check(kernel, index, forward_first=False)
    assert len(packed) == 3
    index[::3] = asleep(index[::3])
    check(kernel, index)
    assert len(packed) == 5


@pytest.mark.parametrize(("stride", "groups"), [((1, 1), 1), ((2, 1), 2), ((3, 2), 3)])
def test_transposed_places_piece_by_piece(
    stride: tuple[int, int], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LayerSpec(
        kind="conv2d", weight_shape=(12, 4, 3, 2), stride=stride, dilation=(1, 2), padding=(1, 0), groups=groups, nnz=200
    )  # fmt: skip
    layer = TransposedLayer(spec, (9, 8))
    index = np.random.default_rng(0).permutation(288)[:200].astype(np.int32)
    whole = layer.index(index)
    # Output and input channel change places, within their group.
    row, rest = np.divmod(index.astype(np.int64), 24)
    inward = np.divmod(whole.astype(np.int64), layer.spec.weight_shape[1] * np.prod(layer.spec.kernel_size))
    out = inward[1] // np.prod(layer.spec.kernel_size)
    assert (out == row % (12 // groups)).all()
    assert (inward[0] % 4 == rest // 6).all()
    assert (inward[0] // (layer.spec.weight_shape[0] // groups) == row // (12 // groups)).all()
    assert len(set(whole.tolist())) == 200
    monkeypatch.setattr(input_gradient, "_PIECE", 7)
    assert np.array_equal(layer.index(index), whole)
    gone = np.where(np.arange(200) % 3 == 0, -1 - index, index).astype(np.int32)
    assert np.array_equal(layer.index(gone), np.where(gone < 0, -1, whole))
    assert layer.index(index[:0]).shape == (0,)
