"""Sizes of Sparse Parallel, Factorized, Doped and of the low-rank baseline, and how a budget is spent on whole numbers."""

from __future__ import annotations

import math

import pytest
from torch import nn

from sift_compiler.ir.flops import FlopCount
from sift_compiler.passes.balance_flops import scaled_densities
from sift_compiler.passes.ranks import affordable_ranks, doped_rank, factorized_rank, full_rank, weights_per_rank
from sift_compiler.passes.sparse_parallel import branches

SPARSITIES = (0.5, 0.75, 0.9)


def conv(size_in, size_out, kernel=3, groups=1):
    return (size_out, size_in // groups, kernel, kernel)


def test_branches():
    assert [branches(sparsity) for sparsity in SPARSITIES] == [2, 4, 10]
    assert [branches(sparsity) for sparsity in (0.0, 0.3, 0.34, 0.6, 0.8, 0.99)] == [1, 1, 2, 3, 5, 100]


@pytest.mark.parametrize(
    ("size_in", "size_out", "widths"),
    [(64, 64, (116, 231, 576)), (64, 128, (210, 419, 1048)), (128, 128, (231, 461, 1152)), (256, 512, (838, 1676, 4190))],
)  # fmt: skip
def test_factorized_convolutions(size_in, size_out, widths):
    assert tuple(factorized_rank(conv(size_in, size_out), sparsity) for sparsity in SPARSITIES) == widths


def test_the_released_code_adds_one_where_a_tenth_is_not_exact():
    """57.6 / (1 - .9) is 576.0000000000001 in binary: the paper's code rounds 576 and 1152 up to 577 and 1153."""
    for size, released, exact in ((64, 577, 576), (128, 1153, 1152)):
        assert math.ceil(9 * size * size / ((1 - 0.9) * (9 * size + size))) == released
        assert factorized_rank(conv(size, size), 0.9) == exact


@pytest.mark.parametrize(
    ("size", "ranks"), [(64, (28, 43, 51)), (128, (57, 86, 103)), (512, (230, 345, 414))]
)  # fmt: skip
def test_doped_convolutions(size, ranks):
    assert tuple(doped_rank(conv(size, size), sparsity) for sparsity in SPARSITIES) == ranks


def test_linear_layers():
    assert [factorized_rank((768, 768), sparsity) for sparsity in SPARSITIES] == [768, 1536, 3840]
    assert [doped_rank((768, 768), sparsity) for sparsity in SPARSITIES] == [192, 288, 345]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_leave_the_budget_as_it_is(groups):
    """d' depends on channels, not on groups: K c_in c_out / (K c_in + c_out); whole channels per group."""
    shape = conv(32, 48, 3, groups)
    assert full_rank(shape, groups) == pytest.approx(9 * 32 * 48 / (9 * 32 + 48))
    assert weights_per_rank(shape, groups) == 9 * 32 // groups + 48 // groups
    assert factorized_rank(shape, 0.5, groups) % groups == doped_rank(shape, 0.5, groups) % groups == 0
    assert (
        factorized_rank(shape, 0.5, groups) - doped_rank(shape, 0.5, groups) >= full_rank(shape, groups) * 1.5 - groups
    )


@pytest.mark.parametrize(("sparsity", "widening"), [(0.5, 2**0.5), (0.75, 2.0), (0.9, 10**0.5)])
def test_a_low_rank_layer_costs_what_the_dense_one_does(sparsity, widening):
    """r = d_in d_out / (k (d_in + d_out)) of a layer widened by k; 100 layers leave less than a rank unspent."""
    wide = round(768 * widening)
    layers = {str(number): nn.Linear(wide, wide, device="meta") for number in range(100)}
    dense = FlopCount(100 * 2 * 768 * 768, dict.fromkeys(layers, 2 * 768 * 768))
    present = FlopCount(100 * 2 * wide * wide, dict.fromkeys(layers, 2 * wide * wide))
    ranks = affordable_ranks(layers, dense, present, dense.total)
    assert sum(ranks.values()) / 100 == pytest.approx(768 / (2 * wide / 768), rel=1e-3)
    assert max(ranks.values()) - min(ranks.values()) <= 1
    spent = sum(rank * 2 * 2 * wide for rank in ranks.values())
    assert 0 <= dense.total - spent < 2 * 2 * wide


def test_densities_scale_until_full():
    costs = {"a": 100, "b": 100, "c": 100}
    assert scaled_densities({"a": 0.1, "b": 0.2, "c": 0.1}, costs, 80) == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.2})
    found = scaled_densities({"a": 0.1, "b": 0.8, "c": 0.1}, costs, 150)
    assert found == pytest.approx({"a": 0.25, "b": 1.0, "c": 0.25})
    assert scaled_densities({"a": 0.5, "b": 0.1, "c": 0.1}, costs, 400) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert scaled_densities({}, {}, 10) == {}
