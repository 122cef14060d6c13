"""rewrite: iso-FLOP on real networks, identity at sparsity 0, the model untouched, and refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sift_compiler import pipeline
from sift_compiler.capture import capture
from sift_compiler.errors import PassError, UnsupportedError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import count_flops
from sift_compiler.ir.printer import printed
from sift_compiler.ir.verify import problems, verify
from sift_compiler.nn import SparseConv2d, SparseLayer, SparseLinear
from sift_compiler.options import SparseWide, Static
from sift_compiler.rewrite import rewrite


class DenseBlocks(nn.Module):
    """DenseNet-like: every layer sees the concatenation of all before it; flatten after the last convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16 + 8 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3)])
        self.transition = nn.Conv2d(40, 32, 1)
        self.hidden, self.head = nn.Linear(32 * 16, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        x = F.max_pool2d(self.transition(x), 2)
        return self.head(F.relu(self.hidden(x.view(x.size(0), -1))))


class Sequence(nn.Module):
    """Tied embedding and head, a feed-forward block with a residual and layer norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        x = self.embedding(words)
        return self.head(self.norm(x + self.down(F.relu(self.up(x)))))


class Inverted(nn.Module):
    """Inverted bottleneck with squeeze-and-excitation, resizing and padding."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.expand, self.depthwise = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 5, 1, 2, groups=64)
        self.squeeze, self.excite, self.project = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.hardswish(self.norm(self.stem(x)))
        y = F.relu6(self.depthwise(F.hardswish(self.expand(x))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y * gate)
        x = F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (1, 1, 1, 1))
        return self.head(F.dropout(x, 0.1, self.training).mean((2, 3)))


def encoder():
    """Two of torch's encoder layers, with attention dropout, between two linear layers."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 32), stack, nn.Linear(32, 3))


def sparse_layers(graph_module):
    return [path for path, module in graph_module.named_modules() if isinstance(module, SparseLayer)]


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_resnet18_is_iso_flop(models, sparsity):
    model, x = models.resnet18_cifar(), torch.randn(2, 3, 32, 32)
    sparse = rewrite(model, x, SparseWide(sparsity=sparsity))
    dense, after = count_flops(model, (x,)).total, count_flops(sparse, (x,)).total
    assert abs(after / dense - 1) < 1e-3
    assert len(sparse_layers(sparse)) == 19
    assert sparse.conv1.weight.shape[0] == {0.5: 88, 0.75: 128, 0.9: 200}[sparsity]
    assert sparse.fc.weight.shape[0] == model.fc.weight.shape[0]
    assert problems(sparse) == []
    parameters = [sum(p.numel() for p in each.parameters()) for each in (model, sparse)]
    assert parameters[1] < 1.05 * parameters[0], "only kept weights are parameters"


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_resnet18_with_the_large_stem_balances(models, sparsity):
    """Up to the balance only: no mask is drawn and no wide weight ever exists."""
    model, x = models.resnet18(), (torch.randn(2, 3, 224, 224),)
    dense, graph_module = count_flops(model, x), capture(model, x)
    pipeline.run(graph_module, pipeline.planning({"*": SparseWide(sparsity=sparsity)}, dense, x))
    wide, balance = count_flops(graph_module, x), notes.balance(graph_module)
    kept = {
        path: each.kept / math.prod(each.widened_shape)
        for path, each in notes.decisions(graph_module).items()
        if each.sparse
    }
    assert len(kept) == 19
    assert abs(sum(flops * kept.get(path, 1) for path, flops in wide.modules.items()) / dense.total - 1) < 1e-3
    assert balance.sparsity > sparsity, "the wider stem and head are paid for"


def builders(models):
    return {
        "mlp": (models.mlp, torch.randn(4, 1, 8, 8), 2),
        "small_cnn": (models.small_cnn, torch.randn(4, 1, 8, 8), 5),
        "dense_blocks": (DenseBlocks, torch.randn(4, 3, 8, 8), 5),
        "sequence": (Sequence, torch.randint(0, 50, (4, 7)), 2),
        "inverted": (Inverted, torch.randn(4, 3, 16, 16), 5),
        "encoder": (encoder, torch.randn(4, 5, 8), 9),
    }


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
@pytest.mark.parametrize("name", ["mlp", "small_cnn", "dense_blocks", "sequence", "inverted", "encoder"])
def test_small_networks_are_iso_flop_and_train(models, name, sparsity):
    build, x, count = builders(models)[name]
    model = build()
    sparse = rewrite(model, x, SparseWide(sparsity=sparsity))
    assert abs(count_flops(sparse, (x,)).total / count_flops(model, (x,)).total - 1) < 1e-3
    assert len(sparse_layers(sparse)) == count
    again = torch.cat([x, x])
    assert sparse(again).shape == model(again).shape, "another batch size"
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    for _ in range(2):  # a zero-initialised norm lets gradients through from the second step on
        optimizer.zero_grad()
        sparse(again).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in sparse.parameters())
    assert sum(bool(p.grad.any()) for p in sparse.parameters()) > 0.7 * len(list(sparse.parameters()))


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "dense_blocks", "sequence"])
def test_sparsity_zero_is_the_identity(models, name):
    build, x, _ = builders(models)[name]
    model = build()
    same = rewrite(model, x, SparseWide(sparsity=0))
    assert sparse_layers(same) == []
    assert list(same.state_dict()) == list(model.state_dict())
    for key, tensor in same.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert torch.equal(same.train()(x), model.train()(x))
    assert torch.equal(same.eval()(x), model.eval()(x))


def test_the_sparse_graph(models):
    model, x = models.small_cnn().eval(), torch.randn(2, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    sparse = rewrite(model, x, SparseWide(sparsity=0.75, dense=("block2.downsample.0",), round_to=4))
    shortcut = sparse.get_submodule("block2.downsample.0")
    assert isinstance(shortcut, nn.Conv2d)
    assert isinstance(sparse.block1.conv2, SparseConv2d)
    assert shortcut.weight.shape == (128, 64, 1, 1), "dense on request, but as wide as its neighbours"
    assert not sparse.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    text = printed(sparse)
    assert "block1.conv2<SparseConv2d 64x64x3x3" in text
    assert "# first convolution" in text
    assert "%x: [s" in text, "the batch is free"


def test_captured_graphs_and_exported_programs_are_accepted(models):
    model, x = models.mlp(), torch.randn(4, 64)
    options = SparseWide(sparsity=0.75)
    captured = capture(model, x)
    keys = list(captured.state_dict())
    exported = torch.export.export(model.train(), (x,), strict=False)
    results = [rewrite(each, x, options) for each in (model, captured, exported)]
    for result in results[1:]:
        for name, tensor in results[0].state_dict().items():
            assert torch.equal(tensor, result.state_dict()[name]), name
    assert list(captured.state_dict()) == keys


def test_precision_and_copies(models):
    model, x = models.small_cnn().double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    sparse = rewrite(model, x, SparseWide(sparsity=0.9))
    assert {p.dtype for p in sparse.parameters()} == {torch.float64}
    copied = copy.deepcopy(sparse)
    assert torch.equal(copied(x), sparse(x))
    assert copied.block1.conv1.values is not sparse.block1.conv1.values


def test_the_mask_is_the_function(models):
    """The sparse graph equals a dense one with masked weights, in float64 and with gradients."""
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    sparse = rewrite(models.small_cnn().double(), x, SparseWide(sparsity=0.75, init="default"))
    dense = copy.deepcopy(sparse)
    for path in sparse_layers(dense):
        layer = dense.get_submodule(path)
        conv = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=False
        ).double()
        conv.weight = nn.Parameter(layer.dense_weight().detach())
        parent, _, name = path.rpartition(".")
        dense.get_submodule(parent)._modules[name] = conv
    for training in (True, False):
        torch.testing.assert_close(sparse.train(training)(x), dense.train(training)(x), rtol=1e-10, atol=1e-10)
    sparse(x).square().sum().backward()
    dense(x).square().sum().backward()
    layer, masked = sparse.block2.conv1, dense.block2.conv1
    expected = masked.weight.grad.reshape(-1)[layer.index.long()]
    torch.testing.assert_close(layer.values.grad, expected, rtol=1e-9, atol=1e-9)


def test_verify_finds_what_is_wrong(models):
    sparse = rewrite(models.small_cnn(), torch.randn(2, 1, 8, 8), SparseWide(sparsity=0.75))
    sparse.block1.conv1.index[0] = sparse.block1.conv1.index[1]
    sparse.block2.conv1 = SparseConv2d(64, 72, 3, stride=2, padding=1, bias=False)
    found = problems(sparse)
    assert any("names an entry twice" in problem for problem in found)
    assert any("its layer gives 72" in problem for problem in found)
    assert any("its decision says" in problem for problem in found)
    with pytest.raises(PassError, match="not sound"):
        verify(sparse)


class Unruly(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(self.b(self.up(self.a(x))))


@pytest.mark.parametrize(
    ("build", "shape", "options", "error", "words"),
    [
        (Unruly, (2, 3, 4, 4), SparseWide(sparsity=0.5), UnsupportedError, r"conv_transpose2d.*'up'.*Three ways out"),
        (Unruly, (2, 3, 4, 4), Static(), UserError, "must be options such as"),
        (Unruly, (2, 4, 4, 4), SparseWide(sparsity=0.5), UserError, "does not run on the example inputs"),
        (DenseBlocks, (2, 3, 8, 8), SparseWide(sparsity=0.5, dense=("blocks*",)), UserError, "names no layer"),
        (lambda: nn.Sequential(SparseLinear(4, 4), nn.Linear(4, 2)), (2, 4), SparseWide(sparsity=0.5), UserError, "already"),
        (lambda: torch.relu, (2, 4), SparseWide(sparsity=0.5), UserError, "torch.nn.Module or an ExportedProgram"),
    ],
)  # fmt: skip
def test_refusals(build, shape, options, error, words):
    with pytest.raises(error, match=words):
        rewrite(build(), torch.randn(shape), options)


def test_a_pinned_operator_keeps_its_sizes():
    sparse = rewrite(Unruly(), torch.randn(2, 3, 4, 4), SparseWide(sparsity=0.75, pin=("up",)))
    assert sparse.up.weight.shape == (8, 8, 2, 2)
    assert sparse_layers(sparse) == ["b"]
    assert sparse.b.weight_shape == (16, 8, 1, 1)
