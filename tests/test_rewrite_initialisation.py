"""New weights of a rewritten model are drawn by the scheme of the model given."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.nn import SparseLayer
from sift_compiler.options import LowRank, SparseDoped, SparseFactorized, SparseParallel, SparseWide
from sift_compiler.rewrite import rewrite

MEMBERS = [SparseWide, SparseParallel, SparseFactorized, SparseDoped, LowRank]
VOCABULARY, LAYERS = 3000, 2


@pytest.fixture(scope="module")
def gpt2(architectures):
    torch.manual_seed(0)
    model, inputs = architectures.gpt2(LAYERS, 192, 4, None, VOCABULARY, 32)
    return capture(model, inputs), inputs


def deviation(module):
    weight = module.values if isinstance(module, SparseLayer) else module.weight
    return float(weight.detach().std())


def starting_loss(model, inputs):
    labels = torch.randint(0, VOCABULARY, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(**inputs).logits
    return float(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize(("member", "init"), [*((member, "paper") for member in MEMBERS), (SparseWide, "sparse_aware")])
def test_gpt2_starts_at_the_loss_of_guessing(gpt2, member, init):
    model, inputs = gpt2
    assert starting_loss(model, inputs) == pytest.approx(math.log(VOCABULARY), abs=0.3)
    sparse = rewrite(model, inputs, member(sparsity=0.75, init=init))
    assert starting_loss(sparse, inputs) == pytest.approx(math.log(VOCABULARY), abs=0.3)


def test_gpt2_widened_keeps_its_deviations(gpt2):
    """Normal .02 for all sizes, .02 / (2 layers)^½ where a residual branch ends, zero biases, norms of one."""
    model, inputs = gpt2
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75))
    residual = 0.02 / math.sqrt(2 * LAYERS)
    for name, expected in (
        ("attn.c_attn", 0.02), ("attn.c_proj", residual), ("mlp.c_fc", 0.02), ("mlp.c_proj", residual),
    ):  # fmt: skip
        layer = sparse.get_submodule(f"transformer.h.1.{name}")
        assert deviation(layer) == pytest.approx(expected, rel=0.03), name
        assert float(layer.values.detach().abs().max()) > 3 * expected, "normal, not uniform"
        assert not layer.bias.any()
    assert bool((sparse.get_submodule("transformer.h.1.ln_1").weight == 1).all())
    assert deviation(sparse.transformer.wte) == pytest.approx(0.02, rel=0.03)
    assert deviation(sparse.transformer.wpe) == pytest.approx(0.02, rel=0.05)


def test_sparse_aware_keeps_the_variance_of_the_model_given(gpt2):
    model, inputs = gpt2
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75, init="sparse_aware"))
    layer = sparse.get_submodule("transformer.h.0.mlp.c_fc")
    x = torch.randn(400, layer.weight_shape[1])
    assert float(layer(x).detach().var()) == pytest.approx(192 * 0.02**2, rel=0.1)


def test_branches_and_products_have_the_deviation_of_the_layer(gpt2):
    model, inputs = gpt2
    parallel = rewrite(model, inputs, SparseParallel(sparsity=0.75)).get_submodule("transformer.h.0.mlp.c_fc")
    assert [deviation(getattr(parallel, f"branch{j}")) for j in range(4)] == pytest.approx([0.02] * 4, rel=0.03)
    low = rewrite(model, inputs, LowRank(sparsity=0.5)).get_submodule("transformer.h.0.mlp.c_fc")
    assert float((low.v.weight @ low.u.weight).detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not low.v.bias.any()


def test_a_trained_model_is_drawn_as_its_constructor_draws_it(architectures):
    torch.manual_seed(0)
    model, inputs = architectures.gpt2(LAYERS, 64, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    state = torch.get_rng_state()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75))
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    assert deviation(sparse.get_submodule("transformer.h.0.attn.c_attn")) == pytest.approx(0.02, rel=0.05)
    assert deviation(sparse.get_submodule("transformer.h.0.attn.c_proj")) == pytest.approx(0.01, rel=0.1)
    assert deviation(sparse.transformer.wte) == pytest.approx(0.02, rel=0.1)
    assert bool((sparse.get_submodule("transformer.h.0.ln_1").weight == 1).all())


def test_a_trained_model_of_an_unknown_maker_is_told_so(caplog):
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight.normal_()
        model[3].weight.normal_()
    with caplog.at_level(logging.WARNING):
        sparse = rewrite(model, torch.randn(4, 8), SparseWide(sparsity=0.75))
    assert "give it as its constructor made it" in caplog.text
    assert deviation(sparse.get_submodule("3")) == pytest.approx(1 / math.sqrt(3 * 128), rel=0.05), "torch's default"


def test_schemes_of_other_authors(architectures):
    """A patch embedding is a convolution of a transformer; Xavier follows both fans; what starts at zero does so again."""
    torch.manual_seed(0)
    vit, inputs = architectures.vit()
    sparse = rewrite(vit, inputs, SparseWide(sparsity=0.75))
    patches = next(module for module in sparse.modules() if isinstance(module, nn.Conv2d))
    assert patches.weight.shape[0] == 64
    assert deviation(patches) == pytest.approx(0.02, rel=0.05)
    attending, inputs = architectures.multihead_attention()
    layer = rewrite(attending, inputs, SparseWide(sparsity=0.75)).get_submodule("attention.in_proj")
    bound = math.sqrt(6 / (64 + 192))
    assert bound * 0.98 < float(layer.values.detach().abs().max()) <= bound
    zero = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 2))
    nn.init.zeros_(zero[2].weight)
    assert not rewrite(zero, torch.randn(4, 8), SparseWide(sparsity=0.75)).get_submodule("2").values.any()
    product = rewrite(zero, torch.randn(4, 8), SparseFactorized(sparsity=0.75)).get_submodule("2")
    assert bool(product.u.values.all())
    assert not product.v.values.any()


def test_convolutions_without_attention_are_the_papers(models):
    model = models.small_cnn(widths=(64, 128))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, 0.3)
    sparse = rewrite(model, torch.randn(2, 1, 8, 8), SparseWide(sparsity=0.75))
    assert deviation(sparse.block2.conv2) == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.03)
