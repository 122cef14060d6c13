"""Capture: the captured graph is the model, bit for bit, and the model is left alone."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from sift_compiler.capture import capture, raise_exported
from sift_compiler.errors import UnsupportedError, UserError


class Tied(nn.Module):
    """Tied weights, a module called twice, dropout by module and by function, an unused module, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.bare = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("offset", torch.arange(8.0), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x, extra):
        y = self.drop(self.norm(self.first(x)))
        y = F.dropout(self.second(self.first(y)), 0.2, self.training)
        return {"a": F.linear(y, self.bare), "b": (y + self.offset, extra["k"] * 2)}


class InPlace(nn.Module):
    """In-place operators on activations, and a counter that is the model's own business."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same")
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout2d(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        y = self.bn(self.conv(x)).relu_()
        y = self.drop(y) * 2
        y += 1
        return y.flatten(1).clamp_(max=3)


class Words(nn.Module):
    """Embedding, convolution over words, batch norm of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.bn = nn.BatchNorm1d(6)

    def forward(self, words):
        return self.bn(self.conv(self.embedding(words).transpose(1, 2))).mean(-1)


class Attention(nn.Module):
    """Attention with dropout, which must follow .eval() although it is a number in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        p = 0.3 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True).transpose(1, 2).flatten(2)


def same(model, graph_module, inputs, training):
    a, b = copy.deepcopy(model).train(training), copy.deepcopy(graph_module).train(training)
    torch.manual_seed(0)
    expected = a(*inputs)
    torch.manual_seed(0)
    found = b(*inputs)
    assert pytree.tree_structure(expected) == pytree.tree_structure(found)
    for y, z in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        assert torch.equal(y, z)
    for result in (expected, found):
        sum(leaf.square().sum() for leaf in pytree.tree_leaves(result) if leaf.requires_grad).backward()
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, p), (_, q) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert torch.equal(p, q), name


def cases(models):
    return {
        "small_cnn": (models.small_cnn(), (torch.randn(3, 1, 8, 8),)),
        "mlp": (models.mlp(), (torch.randn(3, 1, 8, 8),)),
        "tied": (Tied(), (torch.randn(3, 8), {"k": torch.randn(3)})),
        "in_place": (InPlace(), (torch.randn(3, 2, 5, 5),)),
        "words": (Words(), (torch.randint(0, 11, (3, 7)),)),
        "attention": (Attention(), (torch.randn(3, 5, 8),)),
        "root": (nn.Linear(3, 3), (torch.randn(2, 3),)),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["small_cnn", "mlp", "tied", "in_place", "words", "attention", "root"])
def test_round_trip_is_bit_identical(models, name):
    model, inputs = cases(models)[name]
    graph_module = capture(model, inputs)
    assert list(graph_module.state_dict()) == list(model.state_dict())
    assert list(copy.deepcopy(graph_module).state_dict()) == list(model.state_dict())
    for training in (True, False):
        same(model, graph_module, inputs, training)


def test_raised_modules_are_at_their_paths_and_shared(models):
    graph_module = capture(Tied(), (torch.randn(3, 8), {"k": torch.randn(3)}))
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    assert calls == ["first", "norm", "drop", "first", "second", "dropout_1"]
    assert graph_module.first.weight is graph_module.second.weight
    assert isinstance(graph_module.norm, nn.LayerNorm)
    operators = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.linear.default in operators, "a call on a bare parameter stays an operator"


def test_the_model_is_left_alone(models):
    model = models.small_cnn().eval()
    model.block1.train()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    graph_module = capture(model, torch.randn(2, 1, 8, 8))
    assert [module.training for module in model.modules()] == flags
    assert not graph_module.training
    theirs = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    with torch.no_grad():
        for name, tensor in graph_module.state_dict(keep_vars=True).items():
            assert id(tensor) not in theirs, name
            tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("batch", [1, 4])
def test_the_batch_is_free(models, batch):
    graph_module = capture(models.small_cnn(), torch.randn(batch, 1, 8, 8))
    for size in (1, 2, 7):
        assert graph_module(torch.randn(size, 1, 8, 8)).shape == (size, 10)


def test_a_fixed_batch_is_reported(caplog):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, 3, 2)

    with caplog.at_level(logging.WARNING):
        capture(nn.Sequential(nn.Linear(6, 6), Fixed()), torch.randn(4, 6))
    assert "first dimension" in caplog.text


def test_captured_model_compiles(models):
    graph_module = capture(models.small_cnn(), torch.randn(2, 1, 8, 8))
    x = torch.randn(3, 1, 8, 8)
    compiled = torch.compile(graph_module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), graph_module(x), rtol=1e-5, atol=1e-5)


def test_a_frozen_batch_norm_stays_frozen():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
            self.conv.weight.requires_grad_(False)

        def train(self, mode=True):
            super().train(mode)
            self.bn.eval()
            return self

        def forward(self, x):
            return self.bn(self.conv(x))

    model, x = Frozen(), torch.randn(2, 2, 5, 5)
    graph_module = capture(model, x).train()
    model.train()
    assert torch.equal(graph_module(x), model(x))
    assert torch.equal(graph_module.bn.running_mean, torch.zeros(4))
    assert not graph_module.conv.weight.requires_grad


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class Guarded(nn.Module):
    """Batch norm in a region without gradients, which export makes a graph of its own."""

    def __init__(self):
        super().__init__()
        self.bn, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            x = self.bn(x)
        return self.linear(x)


class Assigning(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        y[:, 0] = 0
        return y


@pytest.mark.parametrize(
    ("model", "inputs", "error", "words"),
    [
        (Branching(), torch.randn(2, 4), UnsupportedError, "torch.where"),
        (Assigning(), torch.randn(2, 4), UnsupportedError, "in place"),
        (Guarded(), torch.randn(2, 4), UnsupportedError, "no module owns it"),
        (nn.Linear(4, 4), torch.randn(2, 5), UserError, "does not run on the example inputs"),
        (nn.Linear(4, 4), (torch.randn(2, 4), torch.randn(2)), UserError, "positional"),
        (nn.Linear(4, 4), "picture", UserError, "example_inputs must be a tensor"),
        (torch.relu, torch.randn(2), UserError, "torch.nn.Module"),
    ],
)
def test_refusals_say_why(model, inputs, error, words):
    with pytest.raises(error, match=words):
        capture(model, inputs)


def test_an_exported_program_is_raised(models):
    model, x = models.small_cnn().train(), torch.randn(3, 1, 8, 8)
    exported = torch.export.export(model, (x,), strict=False)
    graph_module = raise_exported(exported)
    assert isinstance(graph_module.block1.bn1, nn.BatchNorm2d)
    assert graph_module.conv1.weight is not model.conv1.weight
    same(model, graph_module, (x,), False)
