"""Rewrites of single layers: how often they apply, what the graph is then, what stays as it is and why, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.errors import InfeasibleError, PassError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import count_flops
from sift_compiler.ir.printer import printed
from sift_compiler.nn import SparseConv2d
from sift_compiler.options import LowRank, SparseDoped, SparseFactorized, SparseParallel, SparseWide
from sift_compiler.passes import sparse_doped, sparse_factorized, sparse_parallel
from sift_compiler.passes.assign_rules import AssignRules
from sift_compiler.passes.select_layers import SelectLayers
from sift_compiler.rewrite import plan, rewrite

LOCAL = (SparseParallel, SparseFactorized, SparseDoped)


def image(batch=2):
    return torch.randn(batch, 1, 8, 8)


def assigned(model, x, options):
    graph_module = capture(model, x)
    SelectLayers()(graph_module)
    AssignRules({"*": options})(graph_module)
    return graph_module


def test_parallel_applies_to_every_hidden_layer(models):
    options = SparseParallel(sparsity=0.75)
    graph_module = assigned(models.small_cnn(), image(), options)
    result = sparse_parallel.SparseParallel(options, "*")(graph_module)
    assert result.applied == 5
    assert result.changes[0] == "block1.conv1: SparseParallel, 4 branches, σ bn_relu"
    text = printed(graph_module)
    block = text[text.index("block1.conv1:") : text.index("%block1_bn1")]
    assert [block.count(what) for what in ("<Conv2d 32x32x3x3>", "<BatchNorm2d 32>", "aten.relu", "aten.add")] == [
        4,
        4,
        4,
        3,
    ]
    assert [name for name, _ in graph_module.block1.conv1.named_children()] == [
        "branch0", "branch1", "branch2", "branch3", "branch0_norm", "branch1_norm", "branch2_norm", "branch3_norm",
    ]  # fmt: skip
    assert sparse_parallel.SparseParallel(options, "other")(graph_module).applied == 0


def test_factorized_and_doped_graphs(models):
    x = image()
    options = SparseFactorized(sparsity=0.5)
    graph_module = assigned(models.small_cnn(), x, options)
    dense = count_flops(graph_module, (x,))
    assert sparse_factorized.SparseFactorized(options, "*", dense)(graph_module).applied == 5
    targets = [str(node.target) for node in graph_module.graph.nodes if "block2.conv1" in str(node.target)]
    assert targets == ["block2.conv1.u", "block2.conv1.u_norm", "block2.conv1.v"]
    assert graph_module.block2.conv1.u.weight.shape == (105, 32, 3, 3)
    assert graph_module.block2.conv1.v.weight.shape == (64, 105, 1, 1)
    options = SparseDoped(sparsity=0.5)
    graph_module = assigned(models.small_cnn(), x, options)
    assert sparse_doped.SparseDoped(options, "*")(graph_module).applied == 5
    targets = [str(node.target) for node in graph_module.graph.nodes if "block2.conv1" in str(node.target)]
    assert targets == [f"block2.conv1.{part}" for part in ("u", "u_norm", "v", "w", "w_norm")]
    assert graph_module.block2.conv1.u.weight.shape == (26, 32, 3, 3)


def test_a_layer_without_a_transformation_is_refused_before_it_is_touched(models):
    graph_module = capture(models.small_cnn(), image())
    SelectLayers()(graph_module)
    with pytest.raises(PassError, match="every layer that becomes sparse has a transformation"):
        sparse_doped.SparseDoped(SparseDoped(sparsity=0.5), "*")(graph_module)
    assert isinstance(graph_module.block1.conv1, nn.Conv2d)


@pytest.mark.parametrize("member", [SparseWide, SparseParallel, SparseDoped])
def test_sparsity_0_is_the_identity(models, member):
    model, x = models.small_cnn(), image()
    captured, sparse = capture(model, x), rewrite(model, x, member(sparsity=0))
    assert [node.target for node in sparse.graph.nodes] == [node.target for node in captured.graph.nodes]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in sparse.state_dict().items())
    assert torch.equal(sparse(x), captured(x))
    assert {each.reason for each in notes.decisions(sparse).values() if each.path.startswith("block")} == {
        "sparsity 0: nothing to remove"
    }


def test_factorized_without_sparsity_is_a_dense_factorisation_within_the_budget(models):
    model, x = models.small_cnn(), image()
    dense, sparse = count_flops(model, (x,)), rewrite(model, x, SparseFactorized(sparsity=0))
    assert not any(isinstance(module, SparseConv2d) for module in sparse.modules())
    assert isinstance(sparse.block1.conv1.u, nn.Conv2d)
    assert sparse.block1.conv1.u.out_channels in (28, 29), "full rank is 28.8"
    assert 0.999 < count_flops(sparse, (x,)).total / dense.total <= 1


class Depthwise(nn.Module):
    def __init__(self, pointwise=8):
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.point, self.narrow = nn.Conv2d(8, pointwise, 1), nn.Conv2d(pointwise, 1, 1)
        self.last = nn.Linear(16, 2)

    def forward(self, x):
        return self.last(self.narrow(self.point(self.depthwise(self.first(x)))).flatten(1))


@pytest.mark.parametrize("member", LOCAL)
def test_depthwise_layers_stay(member):
    sparse = rewrite(Depthwise(), image(), member(sparsity=0.5))
    decision = notes.decisions(sparse)["depthwise"]
    assert (decision.sparse, decision.reason) == (False, "depthwise")
    assert type(sparse.depthwise) is nn.Conv2d


def test_a_layer_too_small_for_a_rank_stays_dense_and_says_so():
    decision = notes.decisions(plan(Depthwise(), image(), SparseDoped(sparsity=0.5)))["narrow"]
    assert (decision.sparse, decision.origin) == (False, "")
    assert decision.reason == "too small: what the sparsity removes does not pay for a rank of 1"


@pytest.mark.parametrize("member", LOCAL)
def test_the_bias_and_frozen_weights_are_kept(member):
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    model[1].weight.requires_grad_(False)
    sparse = rewrite(model, torch.randint(0, 9, (2, 3)), member(sparsity=0.5))
    biases = [
        parameter for name, parameter in sparse.named_parameters() if name.startswith("1.") and name.endswith("bias")
    ]
    assert [torch.equal(bias, model[1].bias) for bias in biases] == [True]
    trained = [name for name, parameter in sparse.named_parameters() if parameter.requires_grad]
    assert not [
        name for name in trained if name.endswith((".values", "u.weight", "v.weight")) and name.startswith("1.")
    ]


def test_batch_norm_inside_linear_layers_needs_a_batch_of_vectors(models):
    sparse = rewrite(models.mlp(), torch.randn(4, 64), SparseDoped(sparsity=0.5, sigma="bn_relu"))
    assert isinstance(sparse.get_submodule("3.w_norm"), nn.BatchNorm1d)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.raises(UserError, match=r"sigma='bn_relu' needs a batch of vectors.*module '1'"):
        rewrite(model, torch.randint(0, 9, (2, 3)), SparseParallel(sparsity=0.5, sigma="bn_relu"))


def test_one_branch_is_refused(models):
    with pytest.raises(UserError, match=r"stands for 1\.111 branches.*at least 0\.3334"):
        rewrite(models.mlp(), torch.randn(4, 64), SparseParallel(sparsity=0.1))


def test_low_rank_widens_and_factorizes_and_refuses_a_budget_that_the_head_exceeds(models):
    sparse = rewrite(models.small_cnn(), image(), LowRank(sparsity=0.75))
    assert sparse.conv1.out_channels == 64
    assert sparse.block1.conv1.u.in_channels == sparse.block1.conv1.v.out_channels == 64
    assert sparse.block1.conv1.u.out_channels == 14, "full rank 28.8 halved, and the stem and the classifier paid for"
    grouped = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 1, 1))
    with pytest.raises(
        InfeasibleError, match=r"layer '1' cannot be factorised: a rank of 1.*use a sparsity below 0\.\d"
    ):
        rewrite(grouped, image(), LowRank(sparsity=0.75))
    heady = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 1000))
    with pytest.raises(InfeasibleError, match=r"2 \(64,000\).*largest feasible widening"):
        rewrite(heady, torch.randn(1, 4), LowRank(sparsity=0.75))


def test_sparse_aware_values_keep_the_size_of_signals(models):
    """As a dense layer does at its own initialisation: (2 / fan in)^½ of convolutions, a third of the variance of linear layers."""
    options = SparseFactorized(sparsity=0.9, init="sparse_aware", sigma="identity", distribution="erk")
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    layer = rewrite(wide, torch.randn(2, 256), options).get_submodule("2.u")
    x = torch.randn(500, 256)
    assert float(layer(x).detach().var()) == pytest.approx(1 / 3, rel=0.1)
    bound = layer.pattern.mask().sum(1).clamp(min=1).rsqrt()
    assert bool((layer.dense_weight().abs().amax(1) <= bound).all())
    sparse = rewrite(models.small_cnn(widths=(64, 128)), image(), options)
    v = sparse.block2.conv2.v
    assert float(v(torch.randn(50, v.in_channels, 4, 4)).detach().var()) == pytest.approx(2, rel=0.1)
    assert not sparse.block2.bn2.weight.any(), "the last norm of a residual block starts at zero"
