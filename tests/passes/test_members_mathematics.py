"""Sparse Parallel, Factorized, Doped and low rank compute their formulas: values and gradients against float64 torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sift_compiler.nn import SparseConv2d, SparseLayer, SparseLinear
from sift_compiler.options import LowRank, SparseDoped, SparseFactorized, SparseParallel
from sift_compiler.rewrite import rewrite

GEOMETRY = {"stride": (2, 1), "padding": (2, 0), "dilation": (2, 1)}
"""Of the 3x2 convolution under test."""
KINDS = [("conv", 1), ("conv", 2), ("linear", 1)]


class Around(nn.Module):
    """A convolution or linear layer between a first layer and a classifier, which stay dense."""

    def __init__(self, kind, groups=1):
        super().__init__()
        self.kind = kind
        if kind == "conv":
            self.first, self.layer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, (3, 2), groups=groups, **GEOMETRY)
        else:
            self.first, self.layer = nn.Embedding(20, 8), nn.Linear(8, 12)
        self.last = nn.Linear(12, 2)

    def forward(self, x):
        y = self.layer(self.first(x))
        return self.last(y.mean((2, 3)) if self.kind == "conv" else y)


def made(kind, groups, options):
    torch.manual_seed(0)
    model = Around(kind, groups).double()
    x = torch.randn(3, 3, 7, 6, dtype=torch.float64) if kind == "conv" else torch.randint(0, 20, (3, 5))
    return model, x, rewrite(model, x, options)


def sigma_of(name, layer, part):
    if name == "bn_relu":
        norm = layer.get_submodule(f"{part}_norm")
        return lambda y: F.relu(F.batch_norm(y, None, None, norm.weight, norm.bias, True, 0.0, norm.eps))
    return {"relu": F.relu, "gelu": F.gelu, "identity": lambda y: y}[name]


def formula(kind, groups, member, sigma, layer, weights):
    """The layer's value from its input, of dense weights by part, in plain torch."""

    def full(part):
        if kind == "linear":
            return lambda x: x @ weights[part].T
        return lambda x: F.conv2d(x, weights[part], None, groups=groups, **GEOMETRY)

    def point(part):
        return lambda x: x @ weights[part].T if kind == "linear" else F.conv2d(x, weights[part], groups=groups)

    def act(part):
        return sigma_of(sigma, layer, part)

    bias = layer.bias if member is SparseParallel else layer.v.bias
    shift = bias if kind == "linear" else bias.view(-1, 1, 1)
    if member is SparseParallel:
        return lambda x: sum(act(part)(full(part)(x)) for part in weights) + shift
    if member is SparseDoped:
        return lambda x: point("v")(act("u")(full("u")(x))) + act("w")(full("w")(x)) + shift
    return lambda x: point("v")(act("u")(full("u")(x))) + shift


def dense_weights(layer):
    found = {}
    for name, part in layer.named_children():
        if isinstance(part, SparseLayer):
            found[name] = part.dense_weight().detach().requires_grad_()
        elif isinstance(part, (nn.Conv2d, nn.Linear)):
            found[name] = part.weight.detach().clone().requires_grad_()
    return found


@pytest.mark.parametrize(
    ("kind", "groups", "sigma"),
    [
        ("conv", 1, "bn_relu"), ("conv", 1, "relu"), ("conv", 1, "identity"), ("conv", 2, "bn_relu"), ("conv", 2, "gelu"),
        ("linear", 1, "relu"), ("linear", 1, "gelu"), ("linear", 1, "identity"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("member", [SparseParallel, SparseFactorized, SparseDoped, LowRank])
def test_values_and_gradients(kind, groups, sigma, member):
    sparsity = 0.5 if member is LowRank else 0.75  # widened by 2, four groups leave no whole rank
    _, x, sparse = made(kind, groups, member(sparsity=sparsity, sigma=sigma))
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    layer, weights = sparse.layer, dense_weights(sparse.layer)
    reference = copy.deepcopy(sparse)
    compute = formula(kind, groups, member, sigma, reference.layer, weights)
    hidden = reference.first(x)
    y = compute(hidden)
    expected = reference.last(y.mean((2, 3)) if kind == "conv" else y)
    expected.square().sum().backward()
    found = sparse(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sparse.first.weight.grad, reference.first.weight.grad, rtol=1e-8, atol=1e-9)
    for name, weight in weights.items():
        part = layer.get_submodule(name)
        grad = weight.grad
        if isinstance(part, SparseLayer):
            torch.testing.assert_close(part.values.grad, grad.reshape(-1)[part.index.long()], rtol=1e-8, atol=1e-9)
        else:
            torch.testing.assert_close(part.weight.grad, grad, rtol=1e-8, atol=1e-9)
    bias = layer.bias if member is SparseParallel else layer.v.bias
    same = reference.layer.bias if member is SparseParallel else reference.layer.v.bias
    torch.testing.assert_close(bias.grad, same.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("kind", "groups"), KINDS)
def test_the_geometry_is_on_u_and_v_is_a_point(kind, groups):
    model, _, sparse = made(kind, groups, SparseFactorized(sparsity=0.5))
    u, v = sparse.layer.u, sparse.layer.v
    assert isinstance(u, SparseConv2d if kind == "conv" else SparseLinear)
    assert u.bias is None
    assert torch.equal(v.bias, model.layer.bias), "the bias is kept, once"
    if kind == "conv":
        assert (u.kernel_size, u.stride, u.padding, u.dilation, u.groups) == ((3, 2), (2, 1), (2, 0), (2, 1), groups)
        assert (v.kernel_size, v.stride, v.padding, v.dilation, v.groups) == ((1, 1), (1, 1), (0, 0), (1, 1), groups)


@pytest.mark.parametrize(("kind", "expected"), [("conv", nn.BatchNorm2d), ("linear", None)])
@pytest.mark.parametrize("member", [SparseParallel, SparseFactorized, SparseDoped])
def test_sigma_by_default(kind, expected, member):
    _, _, sparse = made(kind, 1, member(sparsity=0.5))
    norms = [part for name, part in sparse.layer.named_children() if name.endswith("_norm")]
    count = {SparseParallel: 2, SparseFactorized: 1, SparseDoped: 2}[member]
    assert [type(norm) for norm in norms] == ([expected] * count if expected else [])
    operators = [node.target for node in sparse.graph.nodes if node.op == "call_function"]
    wanted = torch.ops.aten.relu.default if expected else torch.ops.aten.gelu.default
    assert operators.count(wanted) == count


def test_train_and_eval_follow():
    _, x, sparse = made("conv", 1, SparseParallel(sparsity=0.5))
    before = sparse.layer.branch0_norm.running_mean.clone()
    sparse.train()(x)
    assert not torch.equal(sparse.layer.branch0_norm.running_mean, before)
    sparse.eval()
    moved = sparse.layer.branch0_norm.running_mean.clone()
    first = sparse(x)
    assert torch.equal(sparse.layer.branch0_norm.running_mean, moved)
    assert torch.equal(sparse(x), first)
    assert all(not module.training for module in sparse.modules())


def test_doped_keeps_the_values_of_what_it_keeps():
    model, _, sparse = made("conv", 1, SparseDoped(sparsity=0.75))
    kept = sparse.layer.w
    assert torch.equal(kept.values, model.layer.weight.reshape(-1)[kept.index.long()])


def test_branches_start_different():
    _, _, sparse = made("conv", 1, SparseParallel(sparsity=0.75))
    branches = [sparse.layer.get_submodule(f"branch{number}") for number in range(4)]
    assert len({tuple(branch.index.tolist()) for branch in branches}) == 4
    assert len({float(branch.values.detach().sum()) for branch in branches}) == 4


class TwiceCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.layer(torch.relu(self.layer(self.first(x)))))


@pytest.mark.parametrize("member", [SparseParallel, SparseFactorized, SparseDoped])
def test_a_layer_called_twice_is_written_twice_on_the_same_parts(member):
    torch.manual_seed(0)
    model, x = TwiceCalled().double(), torch.randint(0, 20, (2, 5))
    sparse = rewrite(model, x, member(sparsity=0.5, sigma="relu"))
    part = {SparseParallel: "branch0", SparseFactorized: "u", SparseDoped: "w"}[member]
    assert sum(node.target == f"layer.{part}" for node in sparse.graph.nodes) == 2
    weights = dense_weights(sparse.layer)
    compute = formula("linear", 1, member, "relu", sparse.layer, weights)
    expected = sparse.last(compute(torch.relu(compute(sparse.first(x)))))
    torch.testing.assert_close(sparse(x), expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    sparse(x).square().sum().backward()
    values, index = sparse.get_submodule(f"layer.{part}").values, sparse.get_submodule(f"layer.{part}").index
    torch.testing.assert_close(values.grad, weights[part].grad.reshape(-1)[index.long()], rtol=1e-8, atol=1e-9)
