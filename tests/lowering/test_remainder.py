"""What remains beside sparse kernels: how it is judged, and who runs it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sift_compiler import dynamo
from sift_compiler.lowering.remainder import CALL_BYTES, Traffic, traffic
from sift_compiler.nn import SparseConv2d, SparseLinear

TOLERANCE = 1e-5


def traced(function, *inputs: Tensor) -> fx.Graph:  # type: ignore[no-untyped-def]
    """The graph as Dynamo hands it to a backend."""
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, _: object):  # type: ignore[no-untyped-def]
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=keep)(*inputs)
    (graph,) = graphs
    return graph


X, SIZE = torch.randn(8, 16, 4, 4), 4 * 8 * 16 * 4 * 4
WEIGHT = torch.randn(16, 16, 1, 1)


@pytest.mark.parametrize(
    ("function", "whole", "saved"),
    [
        (lambda x: torch.sigmoid(x), 2 * SIZE + CALL_BYTES, CALL_BYTES),
        # The second reads what the first returned.
        (lambda x: torch.sigmoid(x) * 2, 4 * SIZE + 2 * CALL_BYTES, 2 * SIZE + 2 * CALL_BYTES),
        (lambda x: torch.sigmoid(x).flatten(1) * 2, 4 * SIZE + 3 * CALL_BYTES, 2 * SIZE + 3 * CALL_BYTES),
        (lambda x: torch.sigmoid(x).relu_(), 4 * SIZE + 2 * CALL_BYTES, 2 * SIZE + 2 * CALL_BYTES),
        # Products are fused with nothing.
        (lambda x: F.conv2d(x, WEIGHT), 2 * SIZE + 4 * 256 + CALL_BYTES, 0),
        (lambda x: torch.sigmoid(F.conv2d(x, WEIGHT)), 4 * SIZE + 4 * 256 + 2 * CALL_BYTES, CALL_BYTES),
        (lambda x: F.conv2d(x, WEIGHT) @ x, 5 * SIZE + 4 * 256 + 2 * CALL_BYTES, 0),
        (lambda x: x.transpose(2, 3), CALL_BYTES, CALL_BYTES),
        (lambda x: x.chunk(2, 1)[0] * 2, SIZE + 3 * CALL_BYTES, 3 * CALL_BYTES),
    ],
    ids=["one", "two", "a view between", "in place", "product", "product and one", "products", "view", "pieces"],
)
def test_bytes_read_written_and_saved(function, whole: int, saved: int) -> None:  # type: ignore[no-untyped-def]
    assert traffic(traced(function, X)) == Traffic(whole, saved)


def test_a_graph_with_a_subgraph_is_not_judged() -> None:
    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    assert traffic(traced(branch, X)) is None


def test_sizes_that_are_free_are_not_guarded() -> None:
    def layer(x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    torch._dynamo.reset()
    found: list[Traffic | None] = []

    def keep(module: fx.GraphModule, _: object):  # type: ignore[no-untyped-def]
        found.append(traffic(module.graph))
        return module.forward

    run = torch.compile(layer, backend=keep, dynamic=True)
    with torch.no_grad():
        for size in (8, 5, 64):
            run(torch.randn(size, 16, 4, 4))
    assert found == [Traffic(2 * SIZE + CALL_BYTES, CALL_BYTES)]


class Network(nn.Module):
    """Sparse convolutions, ``between`` them a function, behind them a head."""

    def __init__(self, between) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.one, self.two = (SparseConv2d(i, 48, 3, padding=1, sparsity=0.8) for i in (8, 48))
        self.norms = nn.ModuleList(nn.BatchNorm2d(48) for _ in range(2))
        self.between, self.head = between, SparseLinear(48, 5, sparsity=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(F.relu(self.norms[0](self.one(x))))
        y = F.relu(self.norms[1](self.two(y)))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def rest_of(model: nn.Module, x: Tensor, **options: str) -> str:
    """Who ran the rest, once the numbers are seen to be right."""
    torch._dynamo.reset()
    before = set(dynamo.compilations())
    run = torch.compile(model, backend="sift", options={"threads": 1, **options})
    y, expected = run(x).detach(), model(x).detach()
    assert float((y - expected).abs().max() / expected.abs().max()) < TOLERANCE
    (made,) = (made for made in dynamo.compilations() if made not in before)
    return made.rest


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch):  # type: ignore[no-untyped-def]
    """Whether it is asked is what is tested here, not what it makes of a graph."""
    monkeypatch.setattr(dynamo, "_inductor", lambda module, _: module.forward)


def test_where_nothing_is_left_to_fuse_nothing_is_compiled() -> None:
    torch.manual_seed(0)
    model, x = Network(lambda y: y).eval(), torch.randn(3, 8, 48, 48)
    with torch.no_grad():
        assert rest_of(model, x).startswith("eager: fusing the rest would save at most")
        assert rest_of(model, x, rest="inductor") == "inductor"


def test_where_functions_follow_each_other_inductor_fuses_them() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        assert rest_of(Network(lambda y: torch.sin(torch.exp(-y))).eval(), torch.randn(3, 8, 48, 48)) == "inductor"


def test_training_and_graphs_without_sparse_layers_are_compiled() -> None:
    assert rest_of(Network(lambda y: y).eval(), torch.randn(2, 8, 48, 48)) == "inductor"
    with torch.no_grad():
        assert rest_of(nn.Conv2d(8, 8, 3), torch.randn(2, 8, 48, 48), prune_threshold=None) == "inductor"  # type: ignore[arg-type]


def test_what_runs_operation_by_operation_keeps_aliases_and_writes() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SparseConv2d(8, 48, 3, padding=1, sparsity=0.8)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.count.add_(1)
            return self.layer(x), x.view(-1)

    model, x = Writes().eval(), torch.randn(2, 8, 48, 48)
    torch._dynamo.reset()
    run = torch.compile(model, backend="sift", options={"threads": 1})
    with torch.no_grad():
        for turn in range(3):
            y, seen = run(x)
            assert seen.data_ptr() == x.data_ptr()
            assert model.count == turn + 1
            torch.testing.assert_close(y, model.layer(x), rtol=1e-5, atol=1e-5)
