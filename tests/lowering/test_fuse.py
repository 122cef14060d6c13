"""Fusion of what follows a sparse layer: what is fused, what is left, and the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_compiler import dynamo
from sift_compiler.capture import raise_exported
from sift_compiler.nn import SparseConv2d, SparseLinear

TOLERANCE = 1e-5


class Block(nn.Module):
    """A residual block with a shortcut of its own, in place wherever that is usual."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.short = (SparseConv2d(6, 6, k, padding=k // 2, sparsity=0.5) for k in (3, 3, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.head = SparseLinear(6, 5, sparsity=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.one(x)), inplace=True)
        y = self.norms[1](self.two(y))
        y += self.norms[2](self.short(x))
        return F.gelu(self.head(F.relu(y, inplace=True).mean((2, 3))))


class Chain(nn.Module):
    """A linear layer and a function of it and its input."""

    def __init__(self, then) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.layer, self.norm, self.then = SparseLinear(6, 6, sparsity=0.5), nn.BatchNorm1d(6), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x), x, self.norm)


def statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def compiled(model: nn.Module, runtime: str, rest: str = "eager"):  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    before = set(dynamo.compilations())
    run = torch.compile(model, backend="sift", options={"runtime": runtime, "rest": rest})
    return run, lambda: [made.fused for made in dynamo.compilations() if made not in before]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("runtime", "rest"), [("eager", "eager"), ("tvm", "inductor")])
def test_a_residual_block_becomes_four_calls(runtime: str, rest: str) -> None:
    model = statistics(Block()).eval()
    run, fused = compiled(model, runtime, rest)
    x = torch.randn(16, 6, 5, 5)
    for _ in range(2):  # the second time after statistics, a mask and values have changed
        with torch.no_grad():
            expected = model(x.clone())
            assert float((run(x.clone()) - expected).abs().max() / expected.abs().max()) < TOLERANCE
        statistics(model)
        model.one.index.copy_(torch.randperm(6 * 54)[: len(model.one.index)].int())
        model.two.values.data.mul_(-2)
    assert [[what for _, what in made] for made in fused()] == [
        ["batch norm + relu", "batch norm + add + relu", "batch norm", "gelu"]
    ]


def test_a_graph_of_aten_operators_is_fused_as_the_functions_it_came_from() -> None:
    model = statistics(Block()).eval()
    x = torch.randn(16, 6, 5, 5)
    program = torch.export.export(model.train(), (x,))
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.aten.relu_.default in targets
    assert torch.ops.aten.add_.Tensor in targets
    raised, model = raise_exported(program).eval(), model.eval()
    run, fused = compiled(raised, "eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)
    assert [[what for _, what in made] for made in fused()] == [
        ["batch norm + relu", "batch norm + add + relu", "batch norm", "gelu"]
    ]


@pytest.mark.parametrize(
    ("then", "activation"),
    [
        (torch.ops.aten.hardtanh.default, "hard tanh"),
        (lambda y: torch.ops.aten.hardtanh_.default(y, 0, 6), "relu6"),
        (torch.ops.aten.relu6.default, "relu6"),
        (torch.ops.aten.silu_.default, "silu"),
        (torch.ops.aten.hardswish.default, "hard_swish"),
        (lambda y: torch.ops.aten.gelu.default(y, approximate="tanh"), "gelu_tanh"),
        (lambda y: torch.ops.aten.add.Tensor(y, y.new_ones(4, 6), alpha=2), "scaled addition"),
    ],
)
def test_activations_of_aten(then, activation) -> None:  # type: ignore[no-untyped-def]
    model = Chain(lambda y, x, norm: then(y)).eval()
    run, fused = compiled(model, "eager")
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)
    expected = [] if activation in ("hard tanh", "scaled addition") else [activation]
    assert [what for made in fused() for _, what in made] == expected


def test_nothing_is_fused_where_gradients_are_needed() -> None:
    model = statistics(Block()).eval()
    run, fused = compiled(model, "eager")
    run(torch.randn(2, 6, 5, 5)).sum().backward()
    assert fused() == [()]
    assert model.one.values.grad is not None
    model.requires_grad_(False)
    run(torch.randn(2, 6, 5, 5))
    assert sorted(len(made) for made in fused()) == [0, 4]


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (lambda y, x, norm: F.relu(y) + y, []),  # another use of the sums
        (lambda y, x, norm: norm(F.relu(y)), ["relu"]),  # the other order
        (lambda y, x, norm: y + x[:1], []),  # another shape
        (lambda y, x, norm: F.hardtanh(y, -1, 1), []),
        (lambda y, x, norm: F.hardtanh(y, 0, 6), ["relu6"]),
        (lambda y, x, norm: F.relu6(x + norm(y)), ["batch norm + add + relu6"]),
        (lambda y, x, norm: F.gelu(y, approximate="tanh").add_(x), ["gelu_tanh"]),
        (lambda y, x, norm: norm(y) + x.mul_(2), ["batch norm"]),  # the layer's input changes before the sum
        (lambda y, x, norm: x.mul_(2) + norm(y), []),  # and here before the norm
        (lambda y, x, norm: torch.add(y, x, alpha=2), []),
        (lambda y, x, norm: F.batch_norm(y, None, None, training=True), []),
        (lambda y, x, norm: y.double().relu(), []),
    ],
)
def test_only_what_is_safe_is_fused(then, expected) -> None:  # type: ignore[no-untyped-def]
    model = statistics(Chain(then)).eval()
    run, fused = compiled(model, "eager")
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(run(x.clone()), model(x.clone()), rtol=1e-5, atol=1e-5)
    assert [what for made in fused() for _, what in made] == expected


def test_a_batch_norm_in_training_is_left_alone() -> None:
    model = statistics(Chain(lambda y, x, norm: norm(y))).train()
    run, fused = compiled(model, "eager")
    with torch.no_grad():
        torch.testing.assert_close(run(torch.ones(4, 6)), model(torch.ones(4, 6)), rtol=1e-5, atol=1e-5)
    assert fused() == [()]


def test_autocast_is_left_alone() -> None:
    model = statistics(Chain(lambda y, x, norm: F.relu(y))).eval()
    run, fused = compiled(model, "eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(torch.randn(4, 6)).dtype == torch.bfloat16
    assert fused() == [()]
