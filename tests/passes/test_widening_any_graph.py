"""Whatever graph of supported operators: widening keeps the shape of outputs, the widened model runs, or the refusal is a clean one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.passes.infer_widths import InferWidths
from sift_compiler.passes.initialise import Initialise
from sift_compiler.passes.select_layers import SelectLayers
from sift_compiler.passes.sparse_wide import SparseWide
from sift_compiler.passes.width_context import WidthChoices


class Gate(nn.Module):
    def forward(self, x):
        one, other = x.chunk(2, 1)
        return torch.cat([one * other.sigmoid(), other], 1)


class Shuffle(nn.Module):
    def forward(self, x):
        return x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x):
        return x * self.scale


class Attention(nn.Module):
    """Over positions; query, key and value in one, or three from one weight; the scale written as a number."""

    def __init__(self, width, heads, fused):
        super().__init__()
        self.qkv, self.out, self.heads, self.fused = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, fused

    def forward(self, x):
        n, c, h, w = x.shape
        y = self.qkv(x.flatten(2).transpose(1, 2))
        if self.fused:
            q, k, v = y.reshape(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (part.view(n, h * w, self.heads, c // self.heads).transpose(1, 2) for part in y.split(c, -1))
            y = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, h * w, c)).transpose(1, 2).reshape(n, c, h, w)


class Pixels(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x):
        return F.avg_pool2d(F.pixel_shuffle(self.inner(x), 2), 2)


class Tokens(nn.Module):
    """A norm and a feed-forward block with channels last."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = x.permute(0, 2, 3, 1)
        return (y + self.down(F.gelu(self.up(self.norm(y))))).permute(0, 3, 1, 2)


PARTS = {
    "conv": lambda c: nn.Conv2d(c, c, 3, padding=1),
    "depthwise": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
    "grouped": lambda c: nn.Conv2d(c, c, 1, groups=2),
    "batch_norm": nn.BatchNorm2d,
    "group_norm": lambda c: nn.GroupNorm(4, c),
    "relu": lambda c: nn.ReLU(),
    "gate": lambda c: Gate(),
    "shuffle": lambda c: Shuffle(),
    "scale": Scale,
    "attention": lambda c: Attention(c, 2, True),
    "attention_of_parts": lambda c: Attention(c, 4, False),
    "pixels": Pixels,
    "tokens": Tokens,
}


class Chain(nn.Module):
    """Parts one after the other, some with a shortcut, some called twice."""

    def __init__(self, steps, width):
        super().__init__()
        self.steps = steps
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Linear(width, 5)
        self.parts = nn.ModuleList([PARTS[name](width) for name, _, _ in steps])
        self.hidden = nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = self.stem(x)
        for (_, shortcut, twice), part in zip(self.steps, self.parts, strict=True):
            y = part(part(x)) if twice else part(x)
            x = x + y if shortcut else y
        return self.head(self.hidden(x).mean((2, 3)))


STEPS = st.lists(st.tuples(st.sampled_from(sorted(PARTS)), st.booleans(), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    steps=STEPS, width=st.sampled_from([8, 16]), widening=st.sampled_from([1.42, 2.0, 3.17]),
    round_to=st.sampled_from([1, 8]), attention=st.sampled_from(["heads_fixed", "head_dim_fixed"]),
    groups=st.sampled_from(["groups_fixed", "group_width_fixed"]),
)  # fmt: skip
def test_widening_keeps_a_graph_whole(steps, width, widening, round_to, attention, groups):
    model, x = Chain(steps, width), torch.randn(2, 3, 4, 4)
    graph_module = capture(model, x)
    SelectLayers(depthwise=True)(graph_module)
    InferWidths(choices=WidthChoices(attention=attention, groups=groups))(graph_module)
    try:
        SparseWide(widening, round_to)(graph_module)
    except UserError as error:
        if "changes no width" not in str(error):
            raise
        return
    Initialise()(graph_module)
    for batch in (2, 3):
        assert graph_module(torch.randn(batch, 3, 4, 4)).shape == (batch, 5)
    grown = [p.numel() for p in graph_module.parameters()]
    assert all(now >= then.numel() for now, then in zip(grown, model.parameters(), strict=True))
    assert sum(grown) > sum(p.numel() for p in model.parameters())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(steps=STEPS, place=st.integers(0, 3))
def test_an_operator_without_a_rule_is_refused_cleanly(steps, place):
    class Products(nn.Module):
        def forward(self, x):
            return x.cumprod(1)

    model = Chain(steps, 8)
    model.parts.insert(min(place, len(steps)), Products())
    model.steps = [*steps[:place], ("cumprod", False, False), *steps[place:]]
    graph_module = capture(model, torch.randn(2, 3, 4, 4))
    text = str(graph_module.graph)
    with pytest.raises(UnsupportedError, match=r"cumprod.*Three ways out"):
        InferWidths()(graph_module)
    assert str(graph_module.graph) == text, "the graph is as it was"
    InferWidths(pin=("cumprod",))(graph_module)
