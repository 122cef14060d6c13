"""In-place operators become functional; operator calls become module calls again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sift_compiler.errors import UnsupportedError
from sift_compiler.passes.raise_modules import RaiseModules
from sift_compiler.passes.remove_mutation import RemoveMutation

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y *= self.gain
        return torch.nn.functional.conv2d(y, self.conv.weight.transpose(0, 1))


def exported(model, *inputs):
    module = torch.export.export(model.train(), inputs, strict=False).module()
    graph_module = torch.fx.GraphModule(module, module.graph)
    graph_module.train()
    return graph_module


def test_mutation_is_removed_and_modules_are_raised():
    model, x = Model(), torch.randn(2, 2, 6, 6)
    graph_module = exported(model, x)
    result = RemoveMutation()(graph_module)
    assert result.changes == ("removed _guards_fn", "relu_ is functional", "mul_ is functional")
    targets = [node.target for node in graph_module.graph.nodes]
    assert aten.relu.default in targets
    assert aten.mul.Tensor in targets
    assert aten.add_.Tensor in targets, "the count of batches is the model's own until batch norm is raised"
    raised = RaiseModules()(graph_module)
    assert [change.split(" → ")[1] for change in raised.changes] == ["conv", "bn"]
    targets = [node.target for node in graph_module.graph.nodes]
    assert aten.add_.Tensor not in targets
    assert aten.conv2d.default in targets, "a convolution with a computed weight belongs to no module"
    assert type(graph_module.bn) is nn.BatchNorm2d
    assert graph_module.bn.weight is model.bn.weight
    assert torch.equal(graph_module.eval()(x), model.eval()(x))
    assert RemoveMutation()(graph_module).applied == 0
    assert RaiseModules()(graph_module).applied == 0


def test_shared_memory_is_refused_only_where_it_is_read_afterwards():
    class Viewing(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.linear, self.read = nn.Linear(4, 4), read

        def forward(self, x):
            y = self.linear(x)
            z = y.view(-1, 2)
            z.mul_(2)
            return z + y.view(-1, 2) if self.read else z

    x = torch.randn(3, 4)
    fine = exported(Viewing(False), x)
    assert RemoveMutation()(fine).applied == 2
    shared = exported(Viewing(True), x)
    code = shared.code
    with pytest.raises(UnsupportedError, match=r"'mul_' .* writes in place into memory that 'linear' shares"):
        RemoveMutation()(shared)
    assert shared.code == code


def test_training_that_no_module_owns_is_refused():
    class Functional(nn.Module):
        def forward(self, x):
            return torch.nn.functional.rrelu(x, training=True)

    graph_module = exported(Functional(), torch.randn(2, 3, 4))
    with pytest.raises(UnsupportedError, match="behaves differently in training and evaluation"):
        RaiseModules()(graph_module)
