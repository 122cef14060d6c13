"""Width inference: what grows together, what is pinned and why, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.errors import UnsupportedError
from sift_compiler.ir import annotations as notes
from sift_compiler.options import SparseParallel, SparseWide
from sift_compiler.passes import width_registry
from sift_compiler.passes.infer_widths import InferWidths
from sift_compiler.passes.reshape_widths import groups
from sift_compiler.rewrite import rewrite


def table_of(model, *inputs, pin=()):
    graph_module = capture(model, inputs)
    InferWidths(pin)(graph_module)
    table = notes.widths(graph_module)
    assert table is not None
    return table, graph_module


def shape_with(table, name, size=lambda key: 1000 * (key + 1)):
    return tuple(width.size(size) for width in table.tensors[name])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((7, 64, 3, 3), (7, 576), [([0], [0]), ([1, 2, 3], [1])]),
        ((7, 12), (7, 3, 4), [([0], [0]), ([1], [1, 2])]),
        ((7, 5, 1, 1), (7, 5), [([0], [0]), ([1], [1]), ([2, 3], [])]),
        ((6, 4), (3, 8), [([0, 1], [0, 1])]),
        ((4,), (4, 1, 1), [([0], [0]), ([], [1, 2])]),
    ],
)
def test_reshape_groups(before, after, expected):
    assert groups(before, after) == expected


def test_a_residual_addition_ties_and_the_block_inside_is_free(models):
    table, _ = table_of(models.small_cnn(), torch.randn(2, 1, 8, 8))
    outer = table.tensors["conv1.weight"][0]
    assert table.tensors["block1.conv2.weight"][0] == outer
    assert table.tensors["block1.bn2.running_var"] == (outer,)
    assert table.tensors["block1.conv1.weight"][0] != outer
    assert table.tensors["conv1.weight"][1].fixed, "image channels"
    assert table.tensors["fc.weight"][0].fixed, "classes"
    assert len(table.sizes) == 4
    assert table.pins["fc.weight[0]"].endswith("is an output of the model")


class Joining(nn.Module):
    """Concatenation, split, view and flatten."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(10)
        self.gate = nn.Conv2d(10, 16, 1)
        self.shuffle = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x):
        joined = self.bn(torch.cat([self.a(x), self.b(x)], 1))
        left, right = self.gate(joined).chunk(2, 1)
        y = self.shuffle(left * torch.sigmoid(right))
        n, _, h, w = y.shape
        y = y.view(n, 3, 4, h, w).transpose(1, 2).reshape(n, 12, h, w)
        return self.head(F.max_pool2d(y, 2).flatten(1))


def test_concatenation_split_view_and_flatten():
    table, graph_module = table_of(Joining(), torch.randn(2, 3, 4, 4))
    (a,), (b,) = table.tensors["a.weight"][0].terms, table.tensors["b.weight"][0].terms
    assert table.tensors["bn.weight"][0].terms == (a, b)
    assert table.tensors["gate.weight"][1].terms == (a, b)
    half = table.tensors["shuffle.weight"][1]
    assert table.tensors["gate.weight"][0] == half.times(2)
    unit = table.tensors["shuffle.weight"][0].divided(3)
    assert table.tensors["head.weight"][1] == unit.times(3 * 4)
    literals = {(literal.argument, literal.position): literal.width for literal in table.literals}
    assert literals == {("size", 2): unit, ("shape", 1): unit.times(3)}
    assert sum(notes.WIDTHS in node.meta for node in graph_module.graph.nodes) == len(graph_module.graph.nodes) - 1


class Attention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        return self.head((x + self.out(y))[:, 0])


def test_attention_keeps_its_heads_and_grows_their_dimension():
    table, _ = table_of(Attention(), torch.randn(2, 3, 8, 8))
    stream = table.tensors["patches.weight"][0]
    assert table.tensors["position"][2] == stream == table.tensors["token"][2]
    assert table.tensors["position"][1].fixed
    assert table.tensors["norm.weight"] == (stream,)
    each = table.tensors["qkv.weight"][0].divided(3 * 4)
    assert table.tensors["out.weight"] == (stream, each.times(4))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8)
        self.grouped, self.norm = nn.Conv2d(16, 24, 1, groups=4), nn.GroupNorm(2, 24)
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, x):
        return self.head(self.norm(self.grouped(self.depth(self.a(x)))))


def test_depthwise_and_grouped_convolutions():
    table, _ = table_of(Depthwise(), torch.randn(2, 3, 8, 8))
    channels = table.tensors["a.weight"][0]
    assert table.tensors["depth.weight"][0] == channels.times(2)
    assert [literal.argument for literal in table.literals] == ["groups"]
    assert table.tensors["grouped.weight"][1].times(4) == channels.times(2)
    assert table.tensors["grouped.weight"][0].factor % 4 == 0


class Odd(nn.Module):
    """An operator without a rule between two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x)).cumprod(1))


def test_an_operator_without_a_rule_is_refused_pinned_or_given_one(monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(
        UnsupportedError, match=r"'cumprod' \(aten.cumprod.default\) has no width rule.*pin it.*write a rule"
    ):
        table_of(Odd(), x)
    table, _ = table_of(Odd(), x, pin=("cumprod",))
    assert table.tensors["b.weight"][0].fixed
    assert not table.tensors["b.weight"][1].fixed
    monkeypatch.setattr(width_registry, "_RULES", dict(width_registry._RULES))
    width_registry.register_width_rule(torch.ops.aten.cumprod.default, lambda context, node: context.of(node.args[0]))
    table, _ = table_of(Odd(), x)
    assert not table.tensors["b.weight"][0].fixed


def test_the_refusal_names_the_module_of_the_operator_and_the_ways_out_work():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(Odd(), nn.Conv2d(2, 8, 1))
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.block(x))

    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(
        UnsupportedError, match=r"node 'cumprod' .* in module 'block\.0' .*pin=\('block\.0',\)"
    ) as caught:
        rewrite(Outer(), x, SparseWide(sparsity=0.75))
    for way in ("pin it", "register_width_rule", "a transformation that changes single layers"):
        assert way in str(caught.value)
    pinned = rewrite(Outer(), x, SparseWide(sparsity=0.75, pin=("block.0",)))
    assert pinned.get_submodule("block.0.b").weight_shape == (8, 16, 1, 1)
    assert rewrite(Outer(), x, SparseParallel(sparsity=0.75))(x).shape == (2, 2, 4, 4)


def test_what_a_rule_cannot_follow_is_pinned():
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(self.a(x)[:, :5])

    table, _ = table_of(Taking(), torch.randn(2, 4))
    assert all(width.fixed for widths in table.tensors.values() for width in widths)
    assert "takes a part of it" in table.pins["a.weight[0]"]
