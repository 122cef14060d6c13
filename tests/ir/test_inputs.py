"""Arguments by position and by name, and the FLOPs of attention on every device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.errors import UserError
from sift_compiler.ir.flops import count_flops
from sift_compiler.ir.inputs import as_inputs, positional
from sift_compiler.options import SparseWide
from sift_compiler.report import report
from sift_compiler.rewrite import rewrite


class Named(nn.Module):
    """Two optional arguments; a dict comes out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x, scale=None, bias=None):
        y = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return {"y": y if bias is None else y + bias}


def test_keyword_arguments_through_capture_rewrite_and_report():
    model = Named()
    inputs = {"bias": torch.randn(3, 4), "x": torch.randn(3, 8)}
    graph_module = capture(model, inputs)
    assert torch.equal(graph_module(**inputs)["y"], model(**inputs)["y"])
    again = {"x": torch.randn(5, 8), "bias": torch.randn(5, 4)}
    assert torch.equal(graph_module(**again)["y"], model(**again)["y"]), "any order, any batch"
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75))
    assert sparse(**again)["y"].shape == (5, 4)
    assert abs(report(model, sparse, inputs).ratio - 1) < 1e-3


def test_positions_from_names():
    x, bias = torch.randn(3, 8), torch.randn(3, 4)
    assert positional(Named(), {"bias": bias, "x": x}) == (x, None, bias)
    assert positional(Named(), {"x": x}) == (x,)
    assert positional(Named(), (x,)) == (x,)
    with pytest.raises(UserError, match="does not take the example inputs"):
        positional(Named(), {"words": x})


@pytest.mark.parametrize(
    ("given", "words"), [({1: torch.ones(1)}, "their names"), ({"k": 1}, "at least one tensor"), ({}, "tensor")]
)
def test_inputs_refused(given, words):
    with pytest.raises(UserError, match=words):
        as_inputs(given)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_both_products(device, masked):
    class Attention(nn.Module):
        def forward(self, q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, mask)

    q, k, v = (torch.empty(size, device=device) for size in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)))
    mask = torch.ones(5, 7, dtype=torch.bool, device=device) if masked else None
    assert count_flops(Attention(), (q, k, v, mask)).total == 2 * 2 * 3 * 5 * 7 * (8 + 8)
