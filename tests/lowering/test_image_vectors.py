"""Images side by side between sparse convolutions: which calls take part, what the graph becomes, and the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_compiler import dynamo
from sift_compiler.lowering import image_vectors
from sift_compiler.nn import SparseConv2d
from sift_compiler.runtimes.tvm.target import host_cpu

TOLERANCE = 1e-5
LANES = host_cpu().lanes


class Stage(nn.Module):
    """A pooled input, a residual block with a shortcut, one without, a head."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((4, 6, 3, 2), (6, 6, 3, 1), (4, 6, 1, 2), (6, 6, 3, 1))
        self.layers = nn.ModuleList(
            SparseConv2d(i, o, k, stride=s, padding=k // 2, sparsity=0.5) for i, o, k, s in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in sizes)
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2)
        y = F.relu(self.norms[0](self.layers[0](x)))
        y = F.relu(self.norms[1](self.layers[1](y)) + self.norms[2](self.layers[2](x)))
        y = F.relu(self.norms[3](self.layers[3](y)) + y)
        return y.mean((2, 3))


class Then(nn.Module):
    """Two layers and a function of the first one's output and the second layer."""

    def __init__(self, then) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.one, self.two, self.then = SparseConv2d(4, 4, 3, sparsity=0.5), SparseConv2d(4, 4, 1, sparsity=0.5), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.one(x), self.two)


def run(model: nn.Module, x: Tensor, *, runtime: str = "tvm", rest: str = "eager") -> tuple[float, int]:
    """Error relative to the largest output in eager mode, and how many calls took part."""
    torch._dynamo.reset()
    before = set(dynamo.compilations())
    compiled = torch.compile(model.eval(), backend="sift", options={"runtime": runtime, "rest": rest})
    with torch.no_grad():
        y, expected = compiled(x), model(x)
    (made,) = (made for made in dynamo.compilations() if made not in before)
    assert y.shape == expected.shape
    return float((y - expected).abs().max() / expected.abs().max()), made.side_by_side


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_a_stage_of_residual_blocks_stays_side_by_side(rest: str) -> None:
    torch.manual_seed(0)
    error, count = run(Stage(), torch.randn(2 * LANES, 4, 14, 18), rest=rest)
    assert error < TOLERANCE
    assert count == 4


def test_a_batch_that_fills_no_vectors_stays_as_it_is() -> None:
    torch.manual_seed(0)
    error, count = run(Stage(), torch.randn(LANES + 1, 4, 14, 18))
    assert error < TOLERANCE
    assert count == 0


def test_a_runtime_without_such_kernels_stays_as_it_is() -> None:
    torch.manual_seed(0)
    assert run(Stage(), torch.randn(LANES, 4, 14, 18), runtime="eager")[1] == 0


@pytest.mark.parametrize(
    ("then", "count"),
    [
        (lambda y, two: two(y), 2),
        (lambda y, two: two(y).sum() + y.sum(), 2),
        (lambda y, two: two(F.max_pool2d(y, 2)), 2),
        (lambda y, two: two(F.max_pool2d(y, (3, 2), stride=(2, 1), padding=1)), 2),
        (lambda y, two: two(torch.max_pool2d(y, 2, padding=[1])), 2),
        (lambda y, two: two(F.max_pool2d(y, 2, ceil_mode=True)), 0),
        (lambda y, two: two(F.max_pool2d(y, 2, dilation=2)), 0),
        (lambda y, two: two(F.max_pool2d(y, 2, return_indices=True)[0]), 0),
        (lambda y, two: two(F.avg_pool2d(y, 2)), 0),
        (lambda y, two: two(torch.sigmoid(y)), 0),
        (lambda y, two: two(y).mul_(2) + y, 0),
    ],
    ids=[
        "next to each other",
        "read by others too",
        "a pool between",
        "other sizes",
        "of torch",
        "rounded up",
        "dilated",
        "with places",
        "another pool between",
        "a function between",
        "changed in place",
    ],
)
def test_neighbours_only(then, count: int) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    error, taken = run(Then(then), torch.randn(LANES, 4, 9, 8))
    assert error < TOLERANCE
    assert taken == count


def test_training_keeps_the_usual_layout() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    before = set(dynamo.compilations())
    compiled = torch.compile(Then(lambda y, two: two(y)), backend="sift", options={"rest": "eager"})
    compiled(torch.randn(LANES, 4, 9, 8)).sum().backward()
    assert [made.side_by_side for made in dynamo.compilations() if made not in before] == [0]


@pytest.mark.parametrize(
    ("head", "taken"),
    [
        (lambda y: F.adaptive_avg_pool2d(y, 1), True),
        (lambda y: F.adaptive_avg_pool2d(y, (1, 1)).flatten(1), True),
        (lambda y: y.mean((2, 3)), True),
        (lambda y: torch.mean(y, dim=[-1, -2], keepdim=True), True),
        (lambda y: F.adaptive_avg_pool2d(y, (1, 2)), False),
        (lambda y: y.mean((1, 3)), False),
        (lambda y: y.mean((2, 3), dtype=torch.float64), False),
        (lambda y: y.mean(2), False),
        (lambda y: y.mean(), False),
    ],
)
def test_an_average_over_positions_is_taken_where_images_lie(head, taken, monkeypatch) -> None:
    torch.manual_seed(0)
    usual = []
    original = image_vectors.from_image_vectors
    monkeypatch.setattr(image_vectors, "from_image_vectors", lambda y: usual.append(1) or original(y))
    model = Then(lambda y, layer: head(layer(y)))
    error, together = run(model, torch.randn(2 * LANES, 4, 7, 5))
    assert error < TOLERANCE
    assert together == 2
    assert (not usual) == taken
