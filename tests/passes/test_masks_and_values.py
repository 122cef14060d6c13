"""Layers chosen, masks attached, values drawn, hooks inserted and stripped, dead code removed."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.errors import PassError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.nn import MaskHook, SparseConv2d, SparseLinear
from sift_compiler.options import SparseWide
from sift_compiler.passes.attach_masks import AttachMasks
from sift_compiler.passes.clean import Clean
from sift_compiler.passes.initialise import Initialise, kaiming_deviation, residual_norms
from sift_compiler.passes.schedule_masks import ScheduleMasks
from sift_compiler.passes.select_layers import SelectLayers
from sift_compiler.passes.strip_hooks import StripHooks
from sift_compiler.rewrite import rewrite


def selected(model, x, **options):
    graph_module = capture(model, x)
    SelectLayers(**options)(graph_module)
    return graph_module, {path: each.reason for path, each in notes.decisions(graph_module).items()}


def test_every_layer_gets_a_decision_with_its_reason(models):
    graph_module, reasons = selected(models.small_cnn(), torch.randn(2, 1, 8, 8), dense=("block1.*",))
    assert reasons == {
        "conv1": "first convolution",
        "block1.conv1": "kept dense on request",
        "block1.conv2": "kept dense on request",
        "block2.conv1": "hidden layer",
        "block2.conv2": "hidden layer",
        "block2.downsample.0": "hidden layer",
        "fc": "classifier (writes an output of the model)",
    }
    node = next(node for node in graph_module.graph.nodes if node.target == "block2.conv1")
    assert node.meta[notes.DECISIONS].sparse


def test_a_first_linear_layer_is_sparsified(models):
    _, reasons = selected(models.mlp(), torch.randn(2, 64))
    assert list(reasons.values()) == ["hidden layer", "hidden layer", "classifier (writes an output of the model)"]


class Special(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.one = nn.Conv1d(8, 8, 1)
        self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.plain = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.one(self.same(self.depthwise(self.stem(x))).flatten(2))
        return self.head(self.plain(self.other(self.tied(y))))


def test_what_cannot_be_sparse_says_why():
    _, reasons = selected(Special(), torch.randn(2, 3, 4, 4))
    assert reasons["depthwise"] == "depthwise"
    assert "pads with zeros" in reasons["same"]
    assert reasons["one"] == "there is no sparse conv1d"
    assert reasons["tied"] == reasons["other"] == "its weight is shared"
    assert reasons["plain"] == "hidden layer"


def test_selection_refuses(models):
    with pytest.raises(UserError, match=r"dense='layer1\.\*' names no layer.*block1.conv1"):
        selected(models.small_cnn(), torch.randn(2, 1, 8, 8), dense=("layer1.*",))
    with pytest.raises(UserError, match="No layer of the model can become sparse"):
        selected(models.mlp(64, ()), torch.randn(2, 64))
    with pytest.raises(UserError, match="nothing to make sparse"):
        selected(nn.Sequential(nn.ReLU()), torch.randn(3, 4))


def with_counts(graph_module, kept):
    made = {
        path: dataclasses.replace(each, kept=kept if each.sparse else None)
        for path, each in notes.decisions(graph_module).items()
    }
    notes.set_decisions(graph_module, made)


def test_attached_masks_are_exact_seeded_and_keep_values(models):
    model, x = models.small_cnn(), torch.randn(2, 1, 8, 8)
    captured, _ = selected(model, x)
    with_counts(captured, 100)
    first, again, other = (copy.deepcopy(captured) for _ in range(3))
    state = torch.get_rng_state()
    assert AttachMasks(0)(first).applied == 5
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    AttachMasks(0)(again)
    AttachMasks(1)(other)
    layer = first.block1.conv1
    assert isinstance(layer, SparseConv2d)
    assert layer.values.shape == (100,)
    assert torch.equal(layer.index, again.block1.conv1.index)
    assert not torch.equal(layer.index, other.block1.conv1.index)
    assert torch.equal(layer.values, model.block1.conv1.weight.reshape(-1)[layer.index.long()])
    expected = copy.deepcopy(captured)
    with torch.no_grad():
        for path, each in notes.decisions(first).items():
            if each.sparse:
                expected.get_submodule(path).weight.mul_(first.get_submodule(path).pattern.mask())
    torch.testing.assert_close(first(x), expected(x), rtol=1e-5, atol=1e-5)
    assert AttachMasks(0)(first).applied == 0


def test_a_layer_without_a_count_is_refused(models):
    captured, _ = selected(models.small_cnn(), torch.randn(2, 1, 8, 8))
    with pytest.raises(PassError, match="has no count"):
        AttachMasks()(captured)
    assert isinstance(captured.block1.conv1, nn.Conv2d)


def test_paper_initialisation(models):
    model = models.small_cnn(widths=(64, 128))
    sparse = rewrite(model, torch.randn(2, 1, 8, 8), SparseWide(sparsity=0.75))
    layer = sparse.block2.conv2
    assert float(layer.values.detach().std()) == pytest.approx(kaiming_deviation(layer.weight_shape), rel=0.03)
    assert kaiming_deviation(layer.weight_shape) == math.sqrt(2 / (256 * 9))
    assert residual_norms(sparse) == {"block1.bn2", "block2.bn2"}
    assert not sparse.block1.bn2.weight.any()
    assert bool((sparse.get_submodule("block2.downsample.1").weight == 1).all())
    assert bool((sparse.bn1.running_var == 1).all())
    assert torch.equal(sparse.fc.bias, model.fc.bias), "what kept its shape keeps its values"


def test_default_initialisation_and_seeds(models):
    model, x = models.small_cnn(), torch.randn(2, 1, 8, 8)
    options = SparseWide(sparsity=0.75, init="default")
    one, two = rewrite(model, x, options), rewrite(model, x, options)
    assert bool((one.block1.bn2.weight == 1).all())
    bound = 1 / math.sqrt(64 * 9)
    assert float(one.block1.conv1.values.detach().abs().max()) <= bound
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    other = rewrite(model, x, SparseWide(sparsity=0.75, init="default", seed=1))
    assert not torch.equal(one.block1.conv1.index, other.block1.conv1.index)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_initialise_draws_only_what_is_missing():
    graph_module = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4))
    bias = graph_module.get_submodule("0").bias
    graph_module.get_submodule("0").weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    result = Initialise()(graph_module)
    assert result.changes == ("0: weight",)
    assert graph_module.get_submodule("0").bias is bias


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b": SparseLinear(8, 8, sparsity=0.5)})
        self.a_b = SparseLinear(8, 8, sparsity=0.5)

    def forward(self, x):
        return self.a_b(self.a["b"](torch.relu(self.a["b"](x))))


def test_hooks_are_inserted_once_and_stripped():
    model, x = Twice(), torch.randn(3, 8)
    graph_module = capture(model, x)
    before, keys = graph_module(x), list(graph_module.state_dict())
    result = ScheduleMasks()(graph_module)
    assert result.applied == 3
    hooks = [name for name, module in graph_module.named_modules() if isinstance(module, MaskHook)]
    assert hooks == ["mask_hooks.a_b", "mask_hooks.a_b_2"]
    calls = [node for node in graph_module.graph.nodes if node.target in ("a.b", "a_b")]
    assert [str(node.args[1].target) for node in calls] == ["mask_hooks.a_b", "mask_hooks.a_b", "mask_hooks.a_b_2"]
    assert ScheduleMasks()(graph_module).applied == 0
    assert torch.equal(graph_module(x), before)
    assert list(graph_module.state_dict()) == keys
    probe = graph_module.get_submodule("mask_hooks.a_b").probe
    probe.arm()
    graph_module(x).sum().backward()
    assert probe.take().shape == (8, 8)
    assert StripHooks()(graph_module).applied == 3
    assert not any(isinstance(module, MaskHook) for module in graph_module.modules())
    assert torch.equal(graph_module(x), before)
    assert StripHooks()(graph_module).applied == 0


def test_clean_removes_what_nothing_uses():
    class Untidy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    graph_module = capture(Untidy(), torch.randn(2, 4))
    assert "unused.weight" in graph_module.state_dict()
    assert Clean()(graph_module).applied == 1
    assert "unused.weight" not in graph_module.state_dict()
    assert Clean()(graph_module).applied == 0
