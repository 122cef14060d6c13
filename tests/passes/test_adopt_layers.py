"""Bare weights become layers: what moves where, and what stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.nn import SparseLinear
from sift_compiler.options import SparseWide
from sift_compiler.passes.adopt_layers import AdoptLayers
from sift_compiler.rewrite import rewrite


class Bare(nn.Module):
    """A product of each kind; one weight read twice, one also read by something else, one by calls with different biases."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.kernel = nn.Parameter(torch.randn(8, 8))
        self.shared = nn.Parameter(torch.randn(8, 8))
        self.both = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        x = self.first(x)
        x = F.linear(torch.relu(x), self.in_proj_weight, self.in_proj_bias)
        x = F.linear(torch.relu(x), self.in_proj_weight, self.in_proj_bias)
        x = torch.relu(x) @ self.kernel
        x = F.linear(x, self.shared) * self.shared.mean()
        x = F.linear(x, self.both) + F.linear(x, self.both, self.in_proj_bias)
        return self.last(x)


def test_products_become_linear_layers():
    x, model = torch.randn(3, 4), Bare().double()
    graph_module = capture(model, x.double())
    kernel = graph_module.kernel
    result = AdoptLayers()(graph_module)
    assert result.changes == ("kernel → kernel",), "in_proj_bias has another reader, shared and both have two"
    assert torch.equal(graph_module.get_submodule("kernel").weight, kernel.t())
    torch.testing.assert_close(graph_module(x.double()), model(x.double()), rtol=1e-12, atol=1e-12)


def test_attention_of_torch(architectures):
    model, inputs = architectures.multihead_attention()
    graph_module = capture(model, inputs)
    weight = graph_module.attention.in_proj_weight
    result = AdoptLayers()(graph_module)
    assert result.changes == ("attention.in_proj_weight → attention.in_proj",)
    assert graph_module.attention.in_proj.weight is weight
    assert "attention.in_proj_bias" not in graph_module.state_dict()
    calls = [node for node in graph_module.graph.nodes if node.target == "attention.in_proj"]
    assert len(calls) == 2, "the module is called twice, and stays one"
    assert torch.equal(graph_module(**inputs)[0], model(**inputs)[0])


def test_conv1d_of_gpt2(architectures):
    model, inputs = architectures.gpt2()
    graph_module = capture(model, inputs)
    assert AdoptLayers()(graph_module).applied == 8
    layer = graph_module.get_submodule("transformer.h.1.mlp.c_fc")
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (128, 32)
    torch.testing.assert_close(graph_module(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert AdoptLayers()(graph_module).applied == 0, "nothing is left"


@pytest.mark.parametrize("name", ["gpt2", "multihead_attention"])
def test_sparsity_zero_leaves_names_and_values(architectures, name):
    model, inputs = architectures.ARCHITECTURES[name]()
    same = rewrite(model, inputs, SparseWide(sparsity=0))
    assert list(same.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in same.state_dict().items())


def test_adopted_layers_become_sparse(architectures):
    model, inputs = architectures.gpt2()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.5))
    for block in (0, 1):
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            assert isinstance(sparse.get_submodule(f"transformer.h.{block}.{path}"), SparseLinear)
    assert sparse.get_submodule("transformer.h.0.mlp.c_fc").weight_shape == (184, 48)
    assert sparse.lm_head.weight is sparse.transformer.wte.weight


def test_what_stays_dense_goes_back(architectures):
    model, inputs = architectures.gpt2()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.5, dense=("*.attn.c_attn",)))
    weight = sparse.get_parameter("transformer.h.0.attn.c_attn.weight")
    assert weight.shape == (48, 144), "[in, out] as before, as wide as its neighbours"
    assert isinstance(sparse.get_submodule("transformer.h.0.mlp.c_fc"), SparseLinear)
    assert sparse(**inputs).logits.shape == (2, 8, 96)
