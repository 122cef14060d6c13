"""Capture of mobile networks and transformers: the captured graph is the model, bit for bit, in outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sift_compiler.capture import capture

NAMES = [
    "resnet", "resnext", "mobilenet_v2", "mobilevit", "convnext", "vit", "bert", "gpt2", "llama", "encoder",
    "multihead_attention",
]  # fmt: skip

SUMMED_IN_ANOTHER_ORDER = ["llama"]
"""Autograd adds the gradients of a tensor with several uses in another order; outputs are still the same bit for bit."""


def results(module, inputs, training):
    """Outputs, and gradients by name."""
    module = copy.deepcopy(module).train(training)
    torch.manual_seed(0)
    outputs = module(**inputs)
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    sum(leaf.square().sum() for leaf in leaves if leaf.requires_grad).backward()
    return outputs, leaves, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_the_captured_graph_is_the_model(architectures, name):
    model, inputs = architectures.ARCHITECTURES[name]()
    graph_module = capture(model, inputs)
    assert list(graph_module.state_dict()) == list(model.state_dict())
    other_batch = {key: torch.cat([value, value[:1]]) for key, value in inputs.items()}
    for given, training in ((inputs, True), (other_batch, False)):
        expected, leaves, gradients = results(model, given, training)
        found, found_leaves, found_gradients = results(graph_module, given, training)
        assert type(expected) is type(found)
        for one, other in zip(leaves, found_leaves, strict=True):
            assert torch.equal(one, other)
        for parameter, gradient in gradients.items():
            other = found_gradients[parameter]
            assert (gradient is None) == (other is None), parameter
            if gradient is not None and name in SUMMED_IN_ANOTHER_ORDER:
                torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
            else:
                assert gradient is None or torch.equal(gradient, other), parameter


def test_every_architecture_is_tested(architectures):
    assert sorted(architectures.ARCHITECTURES) == sorted(NAMES)


def test_ties_survive_and_layers_are_modules(architectures):
    model, inputs = architectures.gpt2()
    graph_module = capture(model, inputs)
    assert graph_module.lm_head.weight is graph_module.transformer.wte.weight
    assert isinstance(graph_module.transformer.h, nn.Module)
    assert isinstance(graph_module.get_submodule("transformer.h.0.ln_1"), nn.LayerNorm)
    assert graph_module.get_parameter("transformer.h.0.attn.c_attn.weight").shape == (32, 96), "as the model holds it"
    products = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.addmm.default]
    assert len(products) == 8


def test_a_module_called_twice_stays_one(architectures):
    model, inputs = architectures.multihead_attention()
    graph_module = capture(model, inputs)
    names = [name for name, _ in graph_module.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    calls = [node for node in graph_module.graph.nodes if node.target == "attention.out_proj"]
    assert len(calls) == 2


def test_dropout_follows_the_mode(architectures):
    """With dropout everywhere, attention included, the graph draws the same numbers in train mode and none in eval mode."""
    model, inputs = architectures.gpt2(dropout=0.1)
    graph_module = capture(model, inputs)
    for training in (True, False):
        expected, found = results(model, inputs, training), results(graph_module, inputs, training)
        assert torch.equal(expected[1][0], found[1][0])
    graph_module.train()
    with torch.no_grad():
        one, other = graph_module(**inputs), graph_module(**inputs)
    assert not torch.equal(one.logits, other.logits)


def test_compiled_with_a_structured_output(architectures):
    model, inputs = architectures.vit()
    graph_module = capture(model, inputs)
    compiled = torch.compile(graph_module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs).logits, model.train()(**inputs).logits)
