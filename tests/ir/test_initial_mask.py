"""Random masks of depthwise and grouped convolutions leave no channel without a weight; those of other layers are as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sift_compiler.ir.initial_mask import initial_pattern
from sift_compiler.ir.mask_structure import NM, UNSTRUCTURED, Block, ConstantFanIn
from sift_compiler.nn import SparseConv2d
from sift_compiler.options import SparseWide
from sift_compiler.rewrite import rewrite


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 40), inputs=st.integers(1, 3), kernel=st.integers(1, 3), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_output_keeps_a_weight_where_the_count_allows_it(outputs, inputs, kernel, share, seed):
    shape = (outputs, inputs, kernel, kernel)
    nnz = round(share * outputs * inputs * kernel**2)
    pattern = initial_pattern(UNSTRUCTURED, shape, nnz, 2, generator(seed))
    UNSTRUCTURED.check(pattern)
    assert pattern.nnz == nnz
    alive = int(pattern.mask().flatten(1).any(1).sum())
    assert alive == min(outputs, nnz)
    again = initial_pattern(UNSTRUCTURED, shape, nnz, 2, generator(seed))
    assert torch.equal(pattern.index, again.index)


def test_what_is_left_over_is_random():
    """Of 3 kept of 9, each position is kept a third of the time, and outputs differ in what they keep."""
    mask = initial_pattern(UNSTRUCTURED, (3000, 1, 3, 3), 9000, 3000, generator()).mask().flatten(1).float()
    assert mask.mean(0).tolist() == pytest.approx([1 / 3] * 9, abs=0.04)
    assert mask.sum(1).min() == 1
    assert mask.sum(1).max() > 5


def test_structures_keep_their_shape():
    grouped = initial_pattern(NM(1, 4), (32, 4, 3, 3), 100, 8, generator())
    NM(1, 4).check(grouped)
    assert bool(grouped.mask().flatten(1).any(1).all())
    for structure in (Block(2, 2), ConstantFanIn()):
        nnz = structure.kept((32, 4, 3, 3), 0.75)
        found = initial_pattern(structure, (32, 4, 3, 3), nnz, 8, generator())
        assert torch.equal(found.index, structure.random((32, 4, 3, 3), nnz, generator()).index)


def test_other_layers_draw_as_before():
    found = initial_pattern(UNSTRUCTURED, (16, 8, 3, 3), 40, 1, generator())
    assert torch.equal(found.index, UNSTRUCTURED.random((16, 8, 3, 3), 40, generator()).index)


def test_no_channel_of_a_mobile_network_is_dead():
    class Mobile(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 96, 1)
            self.depthwise, self.down = nn.Conv2d(96, 96, 3, groups=96), nn.Conv2d(96, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.down(self.depthwise(self.up(self.stem(x)))))

    sparse = rewrite(Mobile(), torch.randn(2, 3, 6, 6), SparseWide(sparsity=0.9))
    assert isinstance(sparse.depthwise, SparseConv2d)
    assert sparse.depthwise.pattern.sparsity > 0.6
    assert bool(sparse.depthwise.pattern.mask().flatten(1).any(1).all())
