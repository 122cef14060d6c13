"""Operators called as plain functions: what changes between calls is followed, and nothing but plain tensors is taken."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import sift_compiler as sift
from sift_compiler.lowering.direct_calls import call_directly
from sift_compiler.nn import fused, live
from sift_compiler.nn.fused import Finish, KeptNorm


class Network(nn.Module):
    """Convolutions with norms, max pooling, a linear layer with a norm."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3))
        self.first, self.second, self.third = convolutions
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(12), nn.BatchNorm2d(12)])
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.first(x)).relu()
        x = self.pool(self.norms[1](self.second(x)).relu())
        return self.head(self.norms[2](self.third(x)).relu().mean((2, 3)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("batch", [2, 16])
def test_changes_between_calls_are_followed(freeze: bool, batch: int) -> None:
    torch.manual_seed(0)
    model = sift.rewrite(Network(), (torch.randn(2, 3, 12, 12),), sift.SparseWide(sparsity=0.5, init="default")).eval()
    compiled = torch.compile(model, backend="sift", options={"rest": "eager", "freeze": freeze})
    x = torch.randn(batch, 3, 12, 12)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.1)
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_norm_is_kept_until_it_changes() -> None:
    mean, variance, weight, bias = (torch.rand(5) + 0.5 for _ in range(4))
    kept = KeptNorm()

    def check(*norm: torch.Tensor | None) -> Finish:
        got, expected = kept.finish(norm, 1e-5, None), Finish.of_norm(*norm, 1e-5, None)  # type: ignore[arg-type]
        torch.testing.assert_close((got.scale, got.shift), (expected.scale, expected.shift), rtol=0, atol=0)
        return got

    first = check(mean, variance, weight, bias)
    assert check(mean, variance, weight, bias) is first
    residual = torch.randn(2, 5)
    assert kept.finish((mean, variance, weight, bias), 1e-5, residual).residual is residual
    for tensor in (mean, variance, weight, bias):
        tensor.add_(1)
        assert check(mean, variance, weight, bias) is not first
    check(mean.clone(), variance, weight, bias)
    check(mean, variance, None, None)
    assert kept.finish((None, None, None, None), 0.0, residual).scale is None


def test_only_kernels_and_plain_tensors() -> None:
    def graph(handle: int) -> fx.Graph:
        made = fx.Graph()
        x = made.placeholder("x")
        arguments = (x, [2, 2], [2, 2], [0, 0], handle)
        made.output(made.call_function(torch.ops.sift.max_pool2d.default, arguments))
        return made

    class Kernel:
        def __call__(self, x: torch.Tensor, *geometry: object) -> torch.Tensor:
            return x[..., ::2, ::2] + 1

    class Wrapped(torch.Tensor):
        pass

    kernel, x = Kernel(), torch.randn(1, 1, 4, 4)
    handle = live.register(kernel)
    assert call_directly(graph(live.REFERENCE), (x,), False) == 0
    assert call_directly(graph(handle), (x.as_subclass(Wrapped),), False) == 0
    direct = graph(handle)
    assert call_directly(direct, (x,), False) == 1
    assert torch.equal(fx.GraphModule(nn.Module(), direct)(x), x[..., ::2, ::2] + 1)


def test_a_kernel_that_is_gone_is_an_error() -> None:
    handle = live.register(lambda *_: torch.zeros(1))
    with pytest.raises(sift.RuntimeBuildError):
        fused.direct(True)(torch.zeros(1), *(None,) * 7, 0.0, None, "none", handle)
