"""Workers that share the rows of one tile: layers with fewer tiles than workers, against a float64 oracle."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from sift_compiler.nn.image_vectors import from_image_vectors, to_image_vectors
from sift_compiler.runtimes.tvm import lane_part, part
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.target import host_cpu
from tests.runtimes.test_conformance import TOLERANCE, layer, sparse_mask


@pytest.fixture(params=[2, 3, 7])
def threads(request: pytest.FixtureRequest) -> int:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize(("batch", "size"), [(1, (4, 5)), (2, (7, 7)), (16, (5, 3)), (17, (14, 7))])
def test_convolutions(batch: int, size: tuple[int, int], threads: int) -> None:
    one = layer(sparse_mask((19, 10, 3, 3)), padding=(1, 1))
    with mock.patch.object(part, "WORTH_A_WORKER", 1):
        assert one.error(one.kernel("tvm", threads), torch.randn(batch, 10, *size)) < TOLERANCE


def test_fewer_groups_of_rows_than_workers(threads: int) -> None:
    one = layer(sparse_mask((2, 10, 3, 3), sparsity=0.2), padding=(1, 1))
    with mock.patch.object(part, "WORTH_A_WORKER", 1):
        assert one.error(one.kernel("tvm", threads), torch.randn(1, 10, 4, 4)) < TOLERANCE


def test_images_side_by_side(threads: int) -> None:
    one, cpu = layer(sparse_mask((19, 10, 3, 3)), padding=(1, 1)), host_cpu()
    kernel, x = TvmKernel(one.spec, "layer", threads, cpu), torch.randn(cpu.lanes, 10, 5, 3)
    with mock.patch.object(lane_part, "WORTH_A_WORKER", 1):
        y = kernel(to_image_vectors(x, cpu.lanes), one.values, one.index, one.bias)
    expected = one.oracle(x)
    assert float((from_image_vectors(y).double() - expected).abs().max() / expected.abs().max()) < TOLERANCE
