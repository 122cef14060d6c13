"""report: totals, layers, text and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from sift_compiler.errors import UserError
from sift_compiler.ir.flops import count_flops
from sift_compiler.options import SparseWide
from sift_compiler.report import report
from sift_compiler.rewrite import rewrite


@pytest.fixture(scope="module")
def made(models):
    model, x = models.small_cnn(), torch.randn(4, 1, 8, 8)
    sparse = rewrite(model, x, SparseWide(sparsity=0.9))
    return model, sparse, x, report(model, sparse, x)


def test_flops_count_two_per_multiply_add_of_kept_weights(made):
    _, sparse, _, found = made
    before, kept = 4 * 64 * 2 * 32 * 32 * 9, sparse.block1.conv1.values.numel()
    layer = next(layer for layer in found.layers if layer.path == "block1.conv1")
    assert layer.flops_before == before
    assert layer.flops_after == 4 * 64 * 2 * kept
    assert (layer.shape_before, layer.shape_after) == ((32, 32, 3, 3), (104, 104, 3, 3))
    assert layer.kept == kept
    assert layer.sparsity == 1 - kept / (104 * 104 * 9)
    assert layer.reason == "hidden layer"
    assert layer.kind == "SparseConv2d"


def test_totals(made):
    model, sparse, _, found = made
    assert found.dense_flops == sum(layer.flops_before for layer in found.layers)
    assert found.sparse_flops == sum(layer.flops_after for layer in found.layers)
    assert found.ratio == found.sparse_flops / found.dense_flops
    assert abs(found.ratio - 1) < 1e-3
    assert found.dense_parameters == sum(p.numel() for p in model.parameters())
    assert found.sparse_parameters == sum(p.numel() for p in sparse.parameters())
    assert found.dense_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    hidden = [layer for layer in found.layers if layer.kind == "SparseConv2d"]
    assert len(hidden) == 5
    assert found.search_space == sum(torch.Size(layer.shape_after).numel() for layer in hidden)
    assert found.sparsity == pytest.approx(0.9047, abs=1e-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.dense_flops = 0


def test_json_and_text(made):
    *_, found = made
    data = json.loads(found.to_json())
    assert data["ratio"] == found.ratio
    assert [layer["path"] for layer in data["layers"]] == [layer.path for layer in found.layers]
    assert data["layers"][1]["shape_after"] == [104, 104, 3, 3]
    lines = str(found).splitlines()
    assert lines[0].startswith("layer")
    assert len({line.index("x") for line in lines[2:7] if "x3x3" in line}) >= 1
    starts = {line.find("Conv2d") - (6 if "SparseConv2d" in line else 0) for line in lines[2:8]}
    assert len(starts) == 1, "columns are aligned"
    assert f"ratio {found.ratio:.6f}" in str(found)


def test_a_dense_model_against_itself(models):
    model, x = models.mlp(), torch.randn(1, 64)
    found = report(model, model, x)
    assert found.ratio == 1
    assert found.search_space == 0
    assert found.sparsity == 0
    assert {layer.reason for layer in found.layers} == {""}


def test_attention_products_count():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            q = self.linear(x)
            return q @ q.transpose(1, 2)

    model, x = Attention().train(), torch.randn(2, 5, 8)
    count = count_flops(model, (x,))
    assert count.modules == {"linear": 2 * 2 * 5 * 8 * 8, "": 2 * 2 * 5 * 5 * 8}
    assert count.total == sum(count.modules.values())
    assert model.training


def test_an_exported_program_is_accepted(made):
    model, sparse, x, found = made
    exported = torch.export.export(model.train(), (x,), strict=False)
    assert report(exported, sparse, x).layers == found.layers


def test_counting_leaves_buffers_alone(made):
    model, _, x, _ = made
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    count_flops(model.train(), (x,))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_refusals(made):
    model, sparse, x, _ = made
    with pytest.raises(UserError, match=r"sparse .* does not run on the example inputs"):
        report(nn.Flatten(), sparse, torch.randn(4, 3))
    with pytest.raises(UserError, match="no ratio"):
        report(nn.Flatten(), nn.Flatten(), x)
    with pytest.raises(UserError, match=r"must be a torch\.nn\.Module"):
        report(model, "sparse", x)
