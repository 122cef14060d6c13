"""torch.compile(backend="sift") and Winograd's convolution: where the rules choose it, that the numbers stay, that training never takes it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_compiler import dynamo
from sift_compiler.nn import SparseConv2d

TOLERANCE = 1e-5
"""Of a layer, relative to its largest output."""
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Network(nn.Module):
    """How a ResNet begins: an image, 7 × 7 with stride 2, norm, ReLU and pooling; then two sparse layers."""

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.one = SparseConv2d(64, 128, 3, padding=1, bias=False, sparsity=sparsity)
        self.two = SparseConv2d(128, 128, 3, padding=1, bias=False, sparsity=sparsity)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (64, 128, 128))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)))
        x = torch.ops.aten.max_pool2d.default(x, [3, 3], [2, 2], [1, 1])
        x = F.relu(self.norms[1](self.one(x)))
        return F.relu(self.norms[2](self.two(x)) + x)


def compiled(model: nn.Module, x: Tensor, **options: object) -> tuple[Tensor, dynamo.Compilation]:
    """What a compiled model computes, and what became of it."""
    before = set(dynamo.compilations())
    function = torch.compile(model, backend="sift", options={"rest": "eager", "threads": 2, **options})
    y = function(x)
    (made,) = (made for made in dynamo.compilations() if made not in before)
    return y, made


def heights(made: dynamo.Compilation) -> dict[str, int]:
    """Layers that run Winograd's convolution, and how many rows a tile of each has."""
    kernels = (*(first.kernel for first in made.first), *made.kernels)
    tiles = {kernel.name: part.tile for kernel in kernels for plan in kernel.plans for part in plan.parts}  # type: ignore[attr-defined]
    assert {"one", "two"} <= set(tiles)
    return {name: tile.height for name, tile in tiles.items() if tile.lanes == "winograd"}


def error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    y, expected = y.detach(), expected.detach()
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("batch", "sparsity", "winograd", "freeze", "expected"),
    [
        (16, 0.5, 4, False, {"first": 3, "one": 4, "two": 4}),
        (16, 0.25, 2, True, {"one": 2, "two": 2}),
        (16, 0.5, 0, True, {}),
        (1, 0.25, 4, True, {"one": 4, "two": 4}),
    ],
)
def test_the_numbers_stay(batch: int, sparsity: float, winograd: int, freeze: bool, expected: dict[str, int]) -> None:
    size = 224 if batch == 1 else 112  # with one image the rules take it for large ones
    model, x = Network(sparsity).eval(), torch.randn(batch, 3, size, size)
    with torch.no_grad():
        y, made = compiled(model, x, winograd=winograd, freeze=freeze)
        assert error(y, model(x)) < TOLERANCE
    assert heights(made) == expected


def test_it_is_taken_unless_told_otherwise() -> None:
    model, x = Network(0.5).eval(), torch.randn(16, 3, 112, 112)
    with torch.inference_mode():
        y, made = compiled(model, x)
        assert error(y, model(x)) < TOLERANCE
        assert heights(made) == {"first": 3, "one": 4, "two": 4}


@pytest.mark.parametrize("training", [False, True])
def test_graphs_with_gradients_never_take_it(training: bool) -> None:
    model = Network(0.5).train(training)
    eager, x = copy.deepcopy(model), torch.randn(16, 3, 64, 64)
    y, made = compiled(model, x, winograd=4, freeze=True)
    expected = eager(x)
    assert error(y, expected) < TOLERANCE
    y.square().mean().backward()
    expected.square().mean().backward()
    assert heights(made) == {}
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        assert error(ours.grad, theirs.grad) < 1e-4, name
