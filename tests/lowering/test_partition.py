"""Partition of a graph: specifications, reasons, handles."""

import pytest
import torch
from torch import fx

from sift_compiler import nn as sift_nn
from sift_compiler.lowering.partition import assign_handle, partition, plain_module_path


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(sift_nn.SparseConv2d(4, 6, 3, 2, 1, bias=False, sparsity=0.5), torch.nn.ReLU())
        self.head = sift_nn.SparseLinear(6, 3, sparsity=0.5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def exported() -> fx.GraphModule:
    return torch.export.export(Net(), (torch.randn(2, 4, 8, 8),)).module()


def test_each_sparse_node_gets_its_specification_and_the_runtimes_answer():
    graph_module = exported()
    first, second = partition(graph_module.graph, lambda spec, device: "no" if spec.kind == "linear" else None)
    assert (first.name, first.spec.kind, first.refusal, first.device) == ("body.0", "conv2d", None, "cpu")
    assert first.spec.weight_shape == (6, 4, 3, 3)
    assert (first.spec.stride, first.spec.padding, first.spec.bias) == ((2, 2), (1, 1), False)
    assert first.spec.nnz == 108
    assert first.spec.output_size(8, 8) == (4, 4)
    assert (second.name, second.spec.kind, second.refusal, second.spec.bias) == ("head", "linear", "no", True)


def test_a_handle_reaches_the_kernel_behind_it():
    from sift_compiler.nn import live

    graph_module = exported()
    x = torch.randn(2, 4, 8, 8)
    expected = graph_module(x)
    calls = []

    class Double:
        def __call__(self, x, values, index, bias):
            calls.append(tuple(x.shape))
            return 2 * (x @ torch.zeros(6, 3) + 1)

    kernel = Double()
    _, head = partition(graph_module.graph, lambda spec, device: None)
    assign_handle(head, live.register(kernel))
    graph_module.recompile()
    assert not torch.equal(graph_module(x), expected)
    assert torch.equal(graph_module(x), torch.full((2, 3), 2.0))
    assert calls[0] == (2, 6)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].layer1.0.conv1", "layer1.0.conv1"),
        ("L['fn']._modules['layer1']._modules['0']", "layer1.0"),
        ("L['self'].layer1[0].conv1", "layer1.0.conv1"),
        ("getattr(getattr(L.self.layer2, '0').downsample, '0')", "layer2.0.downsample.0"),
        ("body.0", "body.0"),
        ("L['self']", ""),
    ],
)
def test_module_paths_are_read_from_every_spelling(source, path):
    assert plain_module_path(source) == path
