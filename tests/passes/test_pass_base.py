"""The pass base holds passes to their declarations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from sift_compiler.errors import PassError, UserError
from sift_compiler.passes.base import Condition, Pass, PassResult


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.relu(self.linear(x))


def graph():
    return fx.symbolic_trace(Model())


def no_relu(graph_module):
    found = any(node.target is torch.relu for node in graph_module.graph.nodes)
    return "there is a relu" if found else None


NO_RELU = Condition("the graph has no relu", no_relu)


class Tanh(Pass):
    """relu → tanh."""

    ensures = (NO_RELU,)

    def call(self, graph_module):
        changes = []
        for node in graph_module.graph.nodes:
            if node.target is torch.relu:
                node.target = torch.tanh
                changes.append(node.name)
        return PassResult(graph_module, tuple(changes))


class Lazy(Tanh):
    """Promises and does nothing."""

    def call(self, graph_module):
        return PassResult(graph_module)


class Breaking(Pass):
    """Replaces a module, then fails."""

    def call(self, graph_module):
        graph_module.linear = nn.Linear(1, 1)
        graph_module.meta["touched"] = True
        next(node for node in graph_module.graph.nodes if node.target is torch.relu).target = torch.tanh
        raise UserError("no")


class Copying(Tanh):
    in_place = False

    def call(self, graph_module):
        return super().call(copy.deepcopy(graph_module))


class Pretending(Tanh):
    """Says it returns a new graph module, and changes the one given as well."""

    in_place = False

    def call(self, graph_module):
        super().call(graph_module)
        return PassResult(copy.deepcopy(graph_module))


class Swapping(Tanh):
    """Says it is in place, and is not."""

    def call(self, graph_module):
        return super().call(copy.deepcopy(graph_module))


class Picky(Lazy):
    requires = (NO_RELU,)


def test_a_pass_applies_and_is_counted():
    given = graph()
    result = Tanh()(given)
    assert result.graph_module is given
    assert result.applied == 1
    x = torch.randn(2, 3)
    assert torch.equal(given(x), torch.tanh(given.linear(x)))
    assert Tanh()(given).applied == 0


def test_a_copying_pass_leaves_the_graph_given():
    given = graph()
    result = Copying()(given)
    assert result.graph_module is not given
    assert no_relu(given) is not None
    assert no_relu(result.graph_module) is None


@pytest.mark.parametrize(
    ("broken", "error", "words"),
    [
        (Lazy(), PassError, "Lazy promises that the graph has no relu, but: there is a relu"),
        (Picky(), PassError, "Picky requires"),
        (Pretending(), PassError, "changed the one given"),
        (Swapping(), PassError, "declared in place"),
        (Breaking(), UserError, "no"),
    ],
)
def test_a_failing_pass_leaves_the_graph_as_it_was(broken, error, words):
    given, x = graph(), torch.randn(2, 3)
    before, code, linear = given(x), given.code, given.linear
    with pytest.raises(error, match=words):
        broken(given)
    assert given.code == code
    assert given.linear is linear
    assert "touched" not in given.meta
    assert torch.equal(given(x), before)
