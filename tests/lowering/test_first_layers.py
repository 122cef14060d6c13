"""The first, dense convolution of a sparse network: taken by the kernels of the sparse ones, or left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_compiler import dynamo
from sift_compiler.nn import SparseConv2d
from sift_compiler.runtimes.tvm.target import host_cpu

TOLERANCE = 1e-5
LANES = host_cpu().lanes


class Stem(nn.Module):
    """A dense convolution, what may stand behind it, and two sparse convolutions."""

    def __init__(self, *, channels: int = 3, between=None, **options: object) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 5, **options)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(6)
        self.one, self.two = SparseConv2d(6, 5, 3, sparsity=0.5), SparseConv2d(5, 4, 1, sparsity=0.5)
        self.between = between or self.usual
        nn.init.normal_(self.norm.running_mean)
        nn.init.normal_(self.norm.weight)

    def usual(self, x: Tensor) -> Tensor:
        return torch.ops.aten.max_pool2d.default(F.relu(self.norm(x)), [3, 3], [2, 2], [1, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.between(self.first(x))))


def run(model: nn.Module, x: Tensor, *, rest: str = "eager") -> tuple[float, list[str], object]:
    """Error relative to the largest output in eager mode, the layers that run on kernels, and the compiled function."""
    torch._dynamo.reset()
    before = set(dynamo.compilations())
    compiled = torch.compile(model.eval(), backend="sift", options={"rest": rest})
    with torch.no_grad():
        y, expected = compiled(x), model(x)
    (made,) = (made for made in dynamo.compilations() if made not in before)
    error = float((y - expected).abs().max() / expected.abs().max())
    return error, [kernel.name for kernel in (*made.first, *made.kernels)], compiled


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("options", [{"stride": 2, "padding": 2}, {"bias": False, "padding": (0, 3)}])
def test_it_runs_on_a_kernel_with_norm_activation_and_pooling_side_by_side(
    rest: str, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    error, names, _ = run(Stem(**options), torch.randn(LANES, 3, 21, 18), rest=rest)
    assert error < TOLERANCE
    assert names == ["first", "one", "two"]


def test_weights_that_change_are_seen() -> None:
    torch.manual_seed(0)
    model = Stem()
    x = torch.randn(LANES, 3, 15, 15)
    _, _, compiled = run(model, x)
    with torch.no_grad():
        model.first.weight.mul_(-2).add_(0.1)
        y, expected = compiled(x), model(x)  # type: ignore[operator]
    assert (y - expected).abs().max() / expected.abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "model",
    [
        Stem(channels=8),
        Stem(between=lambda x: torch.sigmoid(x)),
        Stem(between=lambda x: F.max_pool2d(x, 2, ceil_mode=True).flip(2)),
    ],
    ids=["many channels", "a function between", "another order of rows between"],
)
def test_others_stay_dense(model: Stem) -> None:
    torch.manual_seed(0)
    error, names, _ = run(model, torch.randn(LANES, model.first.in_channels, 16, 16))
    assert error < TOLERANCE
    assert names == ["one", "two"]


@pytest.mark.parametrize("batch", [1, 3, LANES + 1])
def test_any_batch_will_do(batch: int) -> None:
    torch.manual_seed(0)
    error, names, _ = run(Stem(stride=2, padding=2), torch.randn(batch, 3, 19, 16))
    assert error < TOLERANCE
    assert names == ["first", "one", "two"]
