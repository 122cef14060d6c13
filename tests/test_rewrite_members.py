"""All members of Sparse-IFT through rewrite: equal FLOPs, distributions, several in one model, saved, compiled, trained, refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch._dynamo
from torch import nn

import sift_compiler as sift
from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import count_flops
from sift_compiler.ir.verify import problems
from sift_compiler.nn import SparseLayer
from sift_compiler.options import LowRank, SparseDoped, SparseFactorized, SparseParallel, SparseWide
from sift_compiler.rewrite import plan, rewrite

MEMBERS = [SparseWide, SparseParallel, SparseFactorized, SparseDoped]
LOCAL = MEMBERS[1:]


def planned_ratio(model, x, transform):
    """FLOPs of a plan over those of the model: every layer at the density it would keep."""
    graph_module = plan(model, x, transform)
    now = count_flops(graph_module, (x,))
    density = {
        path: each.kept / math.prod(each.widened_shape)
        for path, each in notes.decisions(graph_module).items()
        if each.sparse
    }
    cost = sum(flops * density.get(path, 1) for path, flops in now.modules.items())
    return cost / count_flops(model, (x,)).total, graph_module


def ratio(model, x, sparse):
    return count_flops(sparse, (x,)).total / count_flops(model, (x,)).total


def image(batch=4):
    return torch.randn(batch, 1, 8, 8)


# --- equal FLOPs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("member", [*LOCAL, LowRank])
def test_resnet18_is_iso_flop(models, member, sparsity):
    model, x = models.resnet18_cifar(), torch.randn(2, 3, 32, 32)
    found, graph_module = planned_ratio(model, x, member(sparsity=sparsity))
    assert abs(found - 1) < 1e-3
    assert len(notes.replacements(graph_module)) == 19
    struck = notes.balance(graph_module)
    if member is SparseParallel:
        assert struck.sparsity == pytest.approx(sparsity, abs=1e-9), "nothing but the hidden layers changed"
    elif member is SparseFactorized:
        assert sparsity <= struck.sparsity < sparsity + 0.002, "d' is rounded up"
    elif member is SparseDoped:
        assert sparsity - 0.01 < struck.sparsity <= sparsity, "d' is rounded down"


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_perceptron_is_iso_flop(models, member, sparsity):
    model, x = models.mlp(), torch.randn(4, 64)
    sparse = rewrite(model, x, member(sparsity=sparsity))
    assert abs(ratio(model, x, sparse) - 1) < 1e-3
    assert problems(sparse) == []
    sparse(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())


def test_a_low_rank_perceptron_is_iso_flop_to_within_a_rank(models):
    model, x = models.mlp(), torch.randn(4, 64)
    for sparsity in (0.5, 0.75, 0.9):
        sparse = rewrite(model, x, LowRank(sparsity=sparsity))
        one_rank = 2 * len(x) * (sparse.get_submodule("1.u").in_features + sparse.get_submodule("1.v").out_features)
        assert 0 <= count_flops(model, (x,)).total - count_flops(sparse, (x,)).total < one_rank


def test_the_balance_is_the_closed_form(models):
    """s* = 1 - (F - D) / S of the actual integer sizes; batch norms cost nothing, the 1x1 V does."""
    model, x = models.small_cnn(), image()
    graph_module = plan(model, x, SparseDoped(sparsity=0.9))
    struck, layer = notes.balance(graph_module), graph_module.block1.conv1
    rank = layer.u.out_channels
    assert rank == 25
    pixels = 4 * 8 * 8
    assert count_flops(graph_module, (x,)).of("block1.conv1.v") == 2 * pixels * 32 * rank
    dense = {"conv1": 9 * 32 * 64, "fc": 640, "block1": 2 * rank * (288 + 32) * 64}
    ranks = {
        path: graph_module.get_submodule(f"block2.{path}.u").out_channels for path in ("conv1", "conv2", "downsample.0")
    }
    dense["block2"] = sum(
        ranks[path] * (fan + 64) * 16 for path, fan in (("conv1", 288), ("conv2", 576), ("downsample.0", 32))
    )
    assert struck.kept_dense_flops == 2 * 4 * sum(dense.values())
    assert struck.sparsifiable_flops == struck.dense_flops - 2 * 4 * (dense["conv1"] + dense["fc"])
    assert struck.sparsity == 1 - (struck.dense_flops - struck.kept_dense_flops) / struck.sparsifiable_flops


# --- how densities differ -------------------------------------------------------------------------------------------


def densities(graph_module):
    return {
        path: each.kept / math.prod(each.widened_shape)
        for path, each in notes.decisions(graph_module).items()
        if each.sparse
    }


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("distribution", ["er", "erk", {"block1.*": 0.95, "block2.conv1*": 0.5}])
def test_every_distribution_is_iso_flop(models, member, distribution):
    model, x = models.small_cnn(), image()
    found, graph_module = planned_ratio(model, x, member(sparsity=0.9, distribution=distribution))
    assert abs(found - 1) < 1e-3
    assert len({round(density, 3) for density in densities(graph_module).values()}) > 1


def test_densities_keep_their_proportions(models):
    graph_module = plan(models.small_cnn(), image(), SparseWide(sparsity=0.9, distribution={"block1.*": 0.95}))
    found = densities(graph_module)
    assert found["block1.conv1"] == pytest.approx(found["block2.conv2"] / 2, rel=1e-3)
    erk = densities(plan(models.small_cnn(), image(), SparseParallel(sparsity=0.9, distribution="erk")))
    assert erk["block2.conv1.branch3"] / erk["block2.conv2.branch0"] == pytest.approx(
        ((64 + 32 + 6) / (64 * 32 * 9)) / ((64 + 64 + 6) / (64 * 64 * 9)), rel=1e-2
    )


def test_a_layer_that_would_keep_more_than_everything_stays_dense(models):
    options = SparseDoped(sparsity=0.5, distribution={"block1.conv1": 0.0, "block*": 0.7})
    found, graph_module = planned_ratio(models.small_cnn(), image(), options)
    decision = notes.decisions(graph_module)["block1.conv1.w"]
    assert (decision.sparse, decision.reason) == (False, "it keeps all its weights when FLOPs balance")
    assert abs(found - 1) < 1e-3
    assert isinstance(rewrite(models.small_cnn(), image(), options).block1.conv1.w, nn.Conv2d)


# --- several in one model -------------------------------------------------------------------------------------------


def mix():
    return {
        "block1.conv1": SparseParallel(sparsity=0.6, sigma="relu"),
        "block1.*": None,
        "block2.downsample.*": SparseDoped(sparsity=0.75),
        "block2.*": SparseWide(sparsity=0.75),
    }


def test_every_layer_gets_what_its_first_pattern_says(models):
    model, x = models.small_cnn(), image()
    sparse = rewrite(model, x, mix())
    assert abs(ratio(model, x, sparse) - 1) < 1e-3
    reasons = {path: each.reason for path, each in notes.decisions(sparse).items()}
    assert reasons["block1.conv1.branch2"] == "branch 3 of 3"
    assert reasons["block1.conv2"] == "its pattern keeps it as it is"
    assert reasons["block2.downsample.0.w"] == "doped with a product of rank 16"
    assert sparse.block1.conv2.weight.shape == (32, 32, 3, 3)
    assert sparse.block2.conv1.weight_shape == (128, 32, 3, 3), "only the width between the two may grow"
    assert sparse.block2.conv2.weight_shape == (64, 128, 3, 3)
    assert sparse.block1.conv1.branch0.sparsity == pytest.approx(2 / 3, abs=1e-3), "each balances its own layers"
    assert sparse.block2.conv1.sparsity == pytest.approx(1 / 2, abs=1e-3)


def test_a_layer_that_no_pattern_names_stays(models):
    sparse = rewrite(models.small_cnn(), image(), {"block1.*": SparseFactorized(sparsity=0.5)})
    assert notes.decisions(sparse)["block2.conv1"].reason == "no pattern names it"
    assert sorted(notes.replacements(sparse)) == ["block1.conv1", "block1.conv2"]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"layer1.*": SparseDoped(sparsity=0.5)}, r"'layer1\.\*' names no layer of the model\. Its layers: conv1, "),
        ({"*": SparseDoped(sparsity=0.5), "block1.*": None}, r"named by an earlier one \('\*' has 'block1.conv1'\)"),
        ({"fc": SparseDoped(sparsity=0.5)}, r"stays dense \(fc: classifier"),
        ({"block1.*": SparseWide(sparsity=0.5), "block2.*": SparseWide(sparsity=0.75)}, "one SparseWide"),
        ({"block1.*": LowRank(sparsity=0.5), "block2.*": SparseDoped(sparsity=0.5)}, "cannot be mixed"),
        ({"block1.*": SparseDoped(sparsity=0.5, seed=1), "block2.*": SparseDoped(sparsity=0.5)}, "share one seed"),
        ({"block1.*": None}, "no transformation in it"),
        ({"block1.*": 0.5}, "'block1.*': 0.5 is not possible"),
        (0.9, "not float"),
        (SparseDoped(sparsity=0.5, distribution={"layer1.*": 0.5}), "names no layer that becomes sparse. Those are: block1.conv1"),
    ],
)  # fmt: skip
def test_refusals(models, transform, message):
    with pytest.raises(UserError, match=message):
        rewrite(models.small_cnn(), image(), transform)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "at least 0 and below 1"),
        ({"sparsity": 0.5, "sigma": "rleu"}, "Did you mean 'relu'"),
        ({"sparsity": 0.5, "distribution": "erq"}, "Unknown distribution"),
        ({"sparsity": 0.5, "distribution": {"a": 1.0}}, "a map of patterns to sparsities"),
        ({"sparsity": 0.5, "init": "papre"}, "Did you mean 'paper'"),
    ],
)
def test_wrong_options_are_refused_where_they_are_made(options, message):
    with pytest.raises(UserError, match=message):
        SparseParallel(**options)


# --- what comes after -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [SparseFactorized(sparsity=0.5), mix()], ids=["factorized", "mix"])
def test_saved_and_loaded(models, transform, tmp_path):
    model, x = models.small_cnn(), image()
    sparse = rewrite(model, x, transform)
    sift.save(sparse, tmp_path / "sparse.pt2")
    loaded = sift.load(tmp_path / "sparse.pt2")
    assert list(loaded.state_dict()) == list(sparse.state_dict())
    assert torch.equal(loaded.eval()(x), sparse.eval()(x))
    assert sift.report(model, loaded, x).layers == sift.report(model, sparse, x).layers
    assert sift.report(model, loaded, x).replacements == sift.report(model, sparse, x).replacements
    loaded.train()(image(3)).sum().backward()


def test_compiled_on_the_eager_runtime_and_trained_with_moving_masks(models):
    torch._dynamo.reset()
    torch.manual_seed(0)
    sparse = rewrite(
        models.small_cnn(widths=(8, 16)), image(),
        {
            "block1.conv1": SparseParallel(sparsity=0.75),
            "block1.conv2": SparseFactorized(sparsity=0.75),
            "*": SparseDoped(sparsity=0.75),
        },
    )  # fmt: skip
    optimizer = torch.optim.SGD(sparse.parameters(), 0.05, momentum=0.9)
    masks = sift.schedule(sparse, optimizer, sift.RigL(delta_t=2, end_step=100))
    compiled = torch.compile(sparse, backend="sift", options={"runtime": "eager", "rest": "eager"})
    x, y = image(8), torch.randint(0, 10, (8,))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    layers = sum(isinstance(module, SparseLayer) for module in sparse.modules())
    assert len(masks.updates[0].layers) == layers
    assert masks.updates[0].grown > 0
    torch.testing.assert_close(compiled.eval()(x), sparse(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("member", "available"),
    [(SparseParallel, 4 * 64 * 64 * 9), (SparseFactorized, 231 * (64 * 9 + 64)), (SparseDoped, 64 * 64 * 9)],
)
def test_the_report_groups_what_stands_for_a_layer(models, member, available):
    model, x = models.small_cnn(), image()
    found = sift.report(model, rewrite(model, x, member(sparsity=0.75)), x)
    whole = next(each for each in found.replacements if each.path == "block2.conv2")
    assert whole.search_space == available, "the cardinality of the paper"
    assert whole.shape_before == (64, 64, 3, 3)
    assert whole.flops_before == 2 * 4 * 16 * 64 * 64 * 9
    assert whole.flops_after == pytest.approx(whole.flops_before, rel=0.02)
    assert found.search_space == sum(each.search_space for each in found.replacements)
    line = next(line for line in str(found).splitlines() if line.startswith("block2.conv2 "))
    assert line.endswith(whole.summary)
    assert {**whole.to_plain(), "shape_before": [64, 64, 3, 3]} in json.loads(found.to_json())["replacements"]
