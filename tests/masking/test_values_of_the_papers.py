"""Defaults and laws as the papers give them, and first masks of exact counts for every structure."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sift_compiler.errors import UserError
from sift_compiler.ir.mask_structure import NM, Block, Channel, ConstantFanIn, TransposableNM, Unstructured
from sift_compiler.masking import distributions, methods, schedules
from sift_compiler.masking.snip import snip
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.nn.storage import compact, dense_storage
from sift_compiler.options import Static
from sift_compiler.schedule import schedule

STRUCTURES = (Unstructured(), NM(2, 4), TransposableNM(2, 4), Block(2, 4), ConstantFanIn(), Channel())

DEFAULTS = {
    "SET": {"delta_t": 100, "begin_step": 0, "drop_fraction": 0.3, "decay": "cosine"},
    "RigL": {"delta_t": 100, "begin_step": 0, "drop_fraction": 0.3, "decay": "cosine", "skip_step": "keep", "exclude_just_dropped": False},
    "SNFS": {"drop_fraction": 0.3, "momentum": 0.9},
    "GraNet": {"delta_t": 1000, "drop_fraction": 0.5},
    "SRigL": {"delta_t": 800, "ablation": 0.3, "drop_fraction": 0.3},
    "SRSTE": {"penalty": 2e-4, "delta_t": 1},
    "MEST": {"drop_fraction": 0.3, "stages": ()},
    "BiDST": {"delta_t": 100},
    "BAME": {"delta_t": 100, "drop_fraction": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name):
    fields = {field.name: field.default for field in dataclasses.fields(methods.METHODS[name])}
    assert {key: fields[key] for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize(
    ("decay", "power"),
    [("linear", 1), ("exponential", 3)],
)
def test_drop_fractions_that_fall_as_powers(decay, power):
    for step in (0, 10, 50, 99, 100, 120):
        expected = 0.3 * max(0.0, 1 - step / 100) ** power
        assert schedules.drop_fraction(step, initial=0.3, end=100, decay=decay) == pytest.approx(expected)


def test_sparsity_rises_by_the_cubic_law():
    # s_f + (s_i - s_f)(1 - p)³
    for step, passed in ((0, 0.0), (10, 0.0), (35, 0.25), (60, 0.5), (110, 1.0), (200, 1.0)):
        expected = 0.9 + (0.2 - 0.9) * (1 - passed) ** 3
        assert schedules.cubic(step, begin=10, last=110, initial=0.2, final=0.9) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6),
    sparsity=st.floats(0, 0.98),
    kernels=st.booleans(),
)  # fmt: skip
def test_er_and_erk_densities_are_proportional_to_sums_over_products(shapes, sparsity, kernels):
    law = distributions.erdos_renyi_kernel if kernels else distributions.erdos_renyi
    densities = law(shapes, sparsity)
    raw = [
        sum(shape) / math.prod(shape) if kernels else (shape[0] + shape[1]) / (shape[0] * shape[1]) for shape in shapes
    ]
    sparse = [(density, score) for density, score in zip(densities, raw, strict=True) if density < 1]
    for density, score in sparse:
        assert density / score == pytest.approx(sparse[0][0] / sparse[0][1])
    for density, score in zip(densities, raw, strict=True):
        assert density == 1 or all(score <= other for full, other in zip(densities, raw, strict=True) if full == 1)
    sizes = [math.prod(shape) for shape in shapes]
    kept = sum(density * size for density, size in zip(densities, sizes, strict=True))
    uniform = sum(distributions.active_weights(shapes, distributions.uniform(shapes, sparsity)))
    assert kept == pytest.approx(uniform) or not sparse


def network(structure, sparsity):
    more = {"sparsity": sparsity, "structure": structure}
    return nn.Sequential(
        SparseConv2d(4, 8, 3, padding=1, **more), nn.AdaptiveAvgPool2d(2), nn.Flatten(), SparseLinear(32, 8, **more)
    )


def exact(layer, sparsity):
    layer.structure.check(layer.pattern)
    return layer.pattern.nnz == layer.structure.kept(layer.weight_shape, sparsity)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@settings(max_examples=10, deadline=None)
@given(sparsity=st.floats(0.05, 0.98), seed=st.integers(0, 2**31))
def test_first_masks_keep_exactly_what_their_structure_can(structure, sparsity, seed):
    torch.manual_seed(seed)
    model = network(structure, sparsity)
    assert exact(model[0], sparsity)
    assert exact(model[3], sparsity)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_static_masks_rest(structure):
    torch.manual_seed(0)
    model = network(structure, 0.6)
    before = [layer.index.clone() for layer in (model[0], model[3])]
    optimizer = torch.optim.AdamW(model.parameters())
    masks = schedule(model, optimizer, Static())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 5, 5)).square().sum().backward()
        optimizer.step()
    assert masks.updates == []
    for layer, index in zip((model[0], model[3]), before, strict=True):
        assert torch.equal(layer.index, index)
        assert exact(layer, 0.6)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_snip_keeps_counts_and_structures_and_refuses_what_it_cannot(structure, scope):
    def chosen():
        torch.manual_seed(0)
        model = dense_storage(network(structure, 0.6))
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(3, 4, 5, 5, generator=generator) for _ in range(2)]
        return compact(snip(model, batches, lambda module, x: module(x).square().mean(), scope=scope))

    if scope == "global" and structure != Unstructured():
        with pytest.raises(UserError, match=r"global.*moves weights between layers.*scope=.layer."):
            chosen()
        return
    model, again = chosen(), chosen()
    if scope == "layer":
        assert exact(model[0], 0.6)
        assert exact(model[3], 0.6)
    layers = (model[0], model[3])
    assert sum(each.pattern.nnz for each in layers) == sum(
        each.structure.kept(each.weight_shape, 0.6) for each in layers
    )
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
