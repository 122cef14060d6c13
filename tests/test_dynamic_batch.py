"""Batches of any size through one compiled model: how often anything is compiled, and the numbers."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from torch import nn

from sift_compiler import dynamo
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.runtimes.tvm import build

TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        SparseConv2d(3, 12, 3, stride=2, padding=1, sparsity=0.5, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), SparseLinear(12, 5, sparsity=0.5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("dynamic", "rest", "graphs"),
    # Dynamo never lets a free size be 1; without a hint it learns from the second size that the first was one of many.
    [(True, "eager", 2), (None, "eager", 3), (True, "inductor", 2)],
)
def test_no_size_of_batch_compiles_a_graph_of_its_own(dynamic, rest, graphs, monkeypatch):
    model = network()
    before, made = set(dynamo.compilations()), []
    real = build.compile_anew
    monkeypatch.setattr(build, "compile_anew", lambda *a, **k: (made.append(a[0].__name__), real(*a, **k))[1])
    monkeypatch.setattr(build, "_compiled", {})
    run = torch.compile(model, backend="sift", dynamic=dynamic, options={"rest": rest, "threads": 1})
    # 16 first: Dynamo takes sizes that are equal when it traces for one and the same, and the image has 7 and 9.
    sizes = [16, *((5, 65, 1, 15, 32, 9) if dynamic and rest == "eager" else (1, 33, 7))]
    seen: list[int] = []
    with torch.no_grad():
        for size in sizes * 2:
            x = torch.randn(size, 3, 7, 9)
            y, expected = run(x), model(x)
            assert float((y - expected).abs().max() / expected.abs().max()) < TOLERANCE, size
            seen.append(len(made))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs
    assert not torch._dynamo.utils.counters["recompile_limit"]
    assert seen[len(sizes) :] == [len(made)] * len(sizes), "a size that has been seen compiles nothing"
    # Code is shared by sizes: lanes over images once, lanes over positions once per width of a tile.
    assert len(made) < 30
    kernels = [kernel for each in dynamo.compilations() if each not in before for kernel in each.kernels]
    for kernel in kernels:
        shapes = {tuple(plan.input_shape) for plan in kernel.plans}
        assert len(shapes) == len(kernel.plans), "each size is planned once"
    assert max(len(kernel.plans) for kernel in kernels) >= len(sizes) - 3


def test_sizes_share_the_program_of_a_mask_and_follow_it():
    layer = SparseConv2d(6, 9, 3, padding=1, sparsity=0.6, bias=False)
    run = torch.compile(layer, backend="sift", dynamic=True, options={"rest": "eager", "threads": 1})
    before = set(dynamo.compilations())
    with torch.no_grad():
        for turn in range(2):
            for size in (16, 32, 48, 3, 19, 35):
                x = torch.randn(size, 6, 8, 8)
                torch.testing.assert_close(run(x), layer(x), rtol=TOLERANCE, atol=TOLERANCE)
            kernels = [kernel for each in dynamo.compilations() if each not in before for kernel in each.kernels]
            assert sum(len(kernel.plans) for kernel in kernels) == 6
            assert sum(kernel.programs for kernel in kernels) <= 3, (
                "one for whole vectors of images, one for three images"
            )
            layer.index.copy_(torch.randperm(6 * 9 * 9)[: layer.index.numel()].int())
            assert turn == 0 or all(kernel.specialisations.repacks for kernel in kernels)
