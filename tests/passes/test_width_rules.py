"""Width rules operator by operator, and the property that widening keeps every graph of supported operators whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.passes.infer_widths import InferWidths
from sift_compiler.passes.select_layers import SelectLayers
from sift_compiler.passes.sparse_wide import SparseWide


class Between(nn.Module):
    """``middle`` between two layers; both sides of it are free unless it says otherwise."""

    def __init__(self, first, middle, last):
        super().__init__()
        self.first, self.last, self.middle = first, last, middle

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def linear(middle, inner=8, outer=8):
    return Between(nn.Linear(4, inner), middle, nn.Linear(outer, 3)), torch.randn(2, 6, 4)


def image(middle, inner=8, outer=8):
    return Between(nn.Conv2d(3, inner, 1), middle, nn.Conv2d(outer, 2, 1)), torch.randn(2, 3, 6, 6)


WIDENED = {
    # name: (model and input, outputs of the first layer after doubling, inputs of the last)
    "gelu": (linear(F.gelu), 16, 16),
    "silu": (linear(F.silu), 16, 16),
    "hardswish": (image(F.hardswish), 16, 16),
    "softmax": (linear(lambda x: x.softmax(-1)), 16, 16),
    "to_dtype": (linear(lambda x: x.to(torch.float64).to(torch.float32)), 16, 16),
    "rms_norm": (linear(nn.RMSNorm(8)), 16, 16),
    "layer_norm": (linear(nn.LayerNorm(8)), 16, 16),
    "group_norm": (image(nn.GroupNorm(2, 8)), 16, 16),
    "plain_layer_norm": (image(nn.LayerNorm((8, 6, 6), elementwise_affine=False)), 16, 16),
    "prelu": (image(nn.PReLU(8)), 16, 16),
    "roll": (image(lambda x: x.roll((1, 1), (2, 3))), 16, 16),
    "glu": (linear(nn.GLU(), 16, 8), 32, 16),
    "chunk": (linear(lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], 16, 8), 32, 16),
    "split_unequal": (linear(lambda x: sum(x.split([4, 4, 8], -1)[:2]), 16, 4), 16, 4),
    "concatenation": (linear(lambda x: torch.cat([x, x.relu()], -1), 8, 16), 16, 32),
    "stack": (linear(lambda x: torch.stack([x, x], 2).flatten(2), 8, 16), 16, 32),
    "unbind": (linear(lambda x: x.unflatten(-1, (2, 4)).unbind(2)[1], 8, 4), 16, 8),
    "repeat": (linear(lambda x: x.repeat(1, 1, 3), 8, 24), 16, 48),
    "repeat_interleave": (linear(lambda x: x.repeat_interleave(2, -1), 8, 16), 16, 32),
    "expand": (linear(lambda x: x[:, :, None].expand(-1, -1, 3, -1).sum(2)), 16, 16),
    "movedim": (image(lambda x: x.movedim(1, -1).relu().movedim(-1, 1)), 16, 16),
    "permute_matmul": (linear(lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x), 16, 16),
    "bmm": (linear(lambda x: torch.bmm(torch.bmm(x, x.mT), x)), 16, 16),
    "baddbmm": (linear(lambda x: torch.baddbmm(x, x @ x.mT, x)), 16, 16),
    "einsum": (linear(lambda x: torch.einsum("bts,bsc->btc", torch.einsum("btc,bsc->bts", x, x), x)), 16, 16),
    "einsum_ellipsis": (linear(lambda x: torch.einsum("...c,...c->...c", x, x)), 16, 16),
    "attention": (linear(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), 16, 16),
    "causal_mask": (linear(lambda x: (x @ x.mT).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9) @ x), 16, 16),
    "index": (linear(lambda x: x[:, torch.tensor([0, 2, 4])]), 16, 16),
    "select": (linear(lambda x: x[:, 0]), 16, 16),
    "slice_of_tokens": (linear(lambda x: x[:, 1:]), 16, 16),
    "max": (linear(lambda x: x.max(1)[0]), 16, 16),
    "norm": (linear(lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)), 16, 16),
    "pad_of_tokens": (linear(lambda x: F.pad(x, (0, 0, 1, 0))), 16, 16),
    "pixel_shuffle": (image(nn.PixelShuffle(2), 16, 4), 32, 8),
    "pixel_unshuffle": (image(nn.PixelUnshuffle(2), 8, 32), 16, 64),
    "interpolate": (image(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), 16, 16),
    "depthwise": (image(nn.Conv2d(8, 8, 3, groups=8)), 16, 16),
    "grouped": (image(nn.Conv2d(8, 8, 3, groups=2)), 16, 16),
    "channel_shuffle": (image(lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)), 16, 16),
    "slice_of_channels": (linear(lambda x: x[..., :5], 8, 5), 8, 5),
    "pad_of_channels": (linear(lambda x: F.pad(x, (0, 2)), 8, 10), 8, 10),
    "index_of_channels": (linear(lambda x: x[..., torch.tensor([0, 2])], 8, 2), 8, 2),
}


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", list(WIDENED))
def test_doubling(name):
    (model, x), grown, seen = WIDENED[name]
    model.middle = model.middle if isinstance(model.middle, nn.Module) else Called(model.middle)
    # A second hidden layer, so that something can always grow.
    model = nn.Sequential(model, nn.Linear(model(x).shape[-1], 8), nn.Linear(8, 2))
    graph_module = capture(model, x)
    SelectLayers()(graph_module)
    InferWidths()(graph_module)
    SparseWide(2.0, 1)(graph_module)
    outer = graph_module.get_submodule("0")
    assert outer.first.weight.shape[0] == grown
    assert outer.last.weight.shape[1] == seen
