"""Max pooling in both layouts against torch's, and which poolings of a graph it takes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_compiler import dynamo
from sift_compiler.nn import SparseConv2d
from sift_compiler.nn.image_vectors import from_image_vectors, max_pool2d, to_image_vectors
from sift_compiler.runtimes.tvm import pool_kernel
from sift_compiler.runtimes.tvm.pool_kernel import MaxPool
from sift_compiler.runtimes.tvm.target import cpu_facts, ensure_pool, host_cpu

LANES = host_cpu().lanes
PROCESSORS = ("host", *(name for name, lanes in (("haswell", 8), ("x86-64", 4)) if lanes < LANES))


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((9, 11), ([3, 3], [2, 2], [1, 1])),
        ((40, 71), ([3, 3], [2, 2], [1, 1])),
        ((8, 7), ([2, 3], [1, 2], [0, 1])),
        ((33, 18), ([5, 2], [3, 1], [2, 1])),
        ((1, 1), ([1, 1], [1, 1], [0, 0])),
        ((1, 37), ([1, 4], [1, 3], [0, 2])),
    ],
)
def test_equals_torch_bit_for_bit(processor: str, threads: int, size: tuple[int, int], geometry) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    ensure_pool(threads)
    cpu = host_cpu() if processor == "host" else cpu_facts(processor)
    pool = MaxPool(cpu, threads)
    x = torch.randn(2 * cpu.lanes, 3, *size)
    x[3, 1, size[0] // 2, size[1] // 2], x[1, 0, -1, -1], x[2] = math.nan, math.inf, -math.inf
    expected = F.max_pool2d(x, *geometry)
    usual, side_by_side = pool(x[:5], *geometry), pool(to_image_vectors(x, cpu.lanes), *geometry)
    torch.testing.assert_close(usual, expected[:5], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(from_image_vectors(side_by_side), expected, rtol=0, atol=0, equal_nan=True)
    assert usual.is_contiguous()
    assert side_by_side.is_contiguous()
    assert pool(x[:0], *geometry).shape == expected[:0].shape


def test_more_numbers_than_32_bits_count_are_left_to_torch(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pool_kernel, "_MOST", 100)
    x = torch.randn(1, 2, 9, 9)
    assert torch.equal(MaxPool(host_cpu(), 1)(x, [2, 2], [2, 2], [0, 0]), F.max_pool2d(x, 2))


def test_the_operator_is_well_behaved() -> None:
    for x in (torch.randn(2, 3, 9, 8), torch.randn(1, 3, 9, 8, 4)):
        torch.library.opcheck(max_pool2d, (x, [3, 3], [2, 2], [1, 1]))


class Pools(nn.Module):
    """Poolings of several kinds as a rewrite leaves them, before and behind a sparse layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SparseConv2d(4, 6, 3, padding=1, sparsity=0.5)

    def forward(self, x: Tensor) -> Tensor:
        pool = torch.ops.aten.max_pool2d.default
        y = pool(self.layer(pool(x, [3, 3], [2, 2], [1, 1])), [2, 2])
        return pool(pool(y, [3, 3], [1, 1], [1, 1], [2, 2]), [2, 2], [2, 2], [0, 0], [1, 1], True)


@pytest.mark.parametrize(
    ("runtime", "batch", "rest"),
    [("tvm", 3, "eager"), ("tvm", LANES, "eager"), ("tvm", LANES, "inductor"), ("eager", LANES, "eager")],
)
def test_plain_poolings_of_a_graph_are_taken(runtime: str, batch: int, rest: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x, before = Pools().eval(), torch.randn(batch, 4, 31, 29), set(dynamo.compilations())
    run = torch.compile(model, backend="sift", options={"runtime": runtime, "rest": rest, "threads": 1})
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
        (made,) = (made for made in dynamo.compilations() if made not in before)
        assert (made.pool is not None) == (runtime == "tvm")
