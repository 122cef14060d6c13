"""Sparse Wide: sizes, and the numbers of the paper's released code, whose way of counting lives in this test only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sift_compiler.capture import capture
from sift_compiler.errors import InfeasibleError, UnsupportedError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.passes.balance_flops import BalanceFlops, kept_weights, largest_feasible_widening
from sift_compiler.passes.infer_widths import InferWidths
from sift_compiler.passes.select_layers import SelectLayers
from sift_compiler.passes.sparse_wide import SparseWide, widened


def widening(sparsity):
    return (1 - sparsity) ** -0.5


def wide(model, x, sparsity, round_to=1, **options):
    graph_module = capture(model, x)
    SelectLayers()(graph_module)
    InferWidths(**options)(graph_module)
    result = SparseWide(widening(sparsity), round_to)(graph_module)
    return graph_module, result


def cerebras_flops(graph_module, pooling):
    """(F, S): FLOPs of one image by the released code's count, and of the layers that become sparse.

    Convolution (n - 1) HW + n HW with n weights; linear (in - 1) out + in out + out; training batch norm over N = HW elements per
    channel 2 C (N - 1) + 5 C N + C; pooling modules (k^2 - 1) per output, global average its inputs; nothing else.
    """
    total = sparse = 0
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            pixels = math.prod(value.shape[2:])
            if isinstance(module, nn.Conv2d):
                cost = (2 * module.weight.numel() - 1) * pixels
                sparse += cost if notes.decisions(graph_module)[str(node.target)].sparse else 0
            elif isinstance(module, nn.Linear):
                cost = (2 * module.in_features - 1) * module.out_features + module.out_features
            else:
                cost = module.num_features * (2 * (pixels - 1) + 5 * pixels + 1)
            total += cost
        elif pooling and node.target is torch.ops.aten.max_pool2d.default:
            total += value.shape[1:].numel() * (math.prod(node.args[1]) - 1)
        elif pooling and node.target is torch.ops.aten.adaptive_avg_pool2d.default:
            total += node.args[0].meta["val"].shape[1:].numel()
    return int(total), int(sparse)


@pytest.mark.parametrize(("sparsity", "width"), [(0.5, 90), (0.75, 128), (0.9, 202)])
def test_widths_of_the_released_code(sparsity, width):
    assert widened(64, widening(sparsity), 1) == width


def test_rounding():
    assert [widened(64, widening(s), 8) for s in (0.5, 0.75, 0.9)] == [88, 128, 200]
    assert widened(13, 1.0, 8) == 13, "sparsity 0 changes nothing"
    assert widened(8, 1.2, 8) == 8
    assert widened(3, 1.1, 8) == 3, "never narrower"


@pytest.mark.parametrize(
    ("stem", "pixels", "flops", "staying", "parameters", "rows"),
    [
        (
            "cifar", 32, 1_115_226_800, 7_936_320, 11_220_132,
            {0.5: (0.495795, 22_152_430), 0.75: (0.751793, 44_755_172), 0.9: (0.901170, 111_347_550)},
        ),
        (
            "imagenet", 224, 3_647_128_359, None, 11_689_512,
            {0.5: (0.509835, None), 0.75: (0.768879, None), 0.9: (0.915962, None)},
        ),
    ],
)  # fmt: skip
def test_resnet18_as_the_released_code_counts_it(models, stem, pixels, flops, staying, parameters, rows):
    model = models.resnet18_cifar() if stem == "cifar" else models.resnet18()
    assert sum(p.numel() for p in model.parameters()) == parameters
    x, pooling = torch.randn(2, 3, pixels, pixels), stem == "imagenet"
    for sparsity, (expected, wide_parameters) in rows.items():
        graph_module = capture(model, x)
        SelectLayers()(graph_module)
        total, sparse = cerebras_flops(graph_module, pooling)
        assert total == flops
        assert staying is None or total - sparse == staying
        InferWidths()(graph_module)
        # The released code rounds the first width only, 64 → 90, 128, 202, and doubles it from stage to stage.
        result = SparseWide(widened(64, widening(sparsity), 1) / 64, 1)(graph_module)
        assert result.applied == 101, "every convolution, the weight of the classifier, four tensors of every norm"
        wide_total, wide_sparse = cerebras_flops(graph_module, pooling)
        found = 1 - (total - (wide_total - wide_sparse)) / wide_sparse
        assert found == pytest.approx(expected, abs=5e-7)
        if wide_parameters is not None:
            assert sum(p.numel() for p in graph_module.parameters()) == wide_parameters


def test_modules_and_literals_follow():
    class Shuffling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.b = nn.Conv2d(8, 8, 1)
            self.norm = nn.LayerNorm(8 * 4)
            self.head = nn.Linear(8 * 4, 2)

        def forward(self, x):
            y = self.b(self.depth(self.a(x)))
            y = y.view(y.shape[0], 2, 4, 2, 2).transpose(1, 2).reshape(y.shape[0], 32)
            return self.head(self.norm(y))

    graph_module, result = wide(Shuffling(), torch.randn(3, 3, 2, 2), 0.75, round_to=8)
    assert result.applied == 9
    assert graph_module.depth.groups == 16
    assert graph_module.norm.normalized_shape == (64,)
    assert graph_module.head.in_features == 64
    view = next(node for node in graph_module.graph.nodes if node.target is torch.ops.aten.view.default)
    assert list(view.args[1][1:]) == [2, 8, 2, 2]
    assert notes.decisions(graph_module)["b"].widened_shape == (16, 16, 1, 1)


def test_a_layer_that_cannot_grow_stays_dense():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x).roll(1, 1)).roll(1, 1)))

    graph_module, _ = wide(Fixed(), torch.randn(3, 4), 0.75, 8, pin=("roll*",))
    decision = notes.decisions(graph_module)["b"]
    assert not decision.sparse
    assert decision.reason == "neither its input nor its output can grow"
    assert notes.decisions(graph_module)["c"].sparse


def test_bare_parameters_keep_their_statistics_and_buffers_must_be_constant():
    class Scaled(nn.Module):
        def __init__(self, buffer):
            super().__init__()
            self.a, self.b = nn.Linear(4, 400), nn.Linear(400, 2)
            self.scale = nn.Parameter(3 + 0.1 * torch.randn(400))
            self.register_buffer("offset", buffer)

        def forward(self, x):
            return self.b(self.a(x) * self.scale + self.offset)

    graph_module, _ = wide(Scaled(torch.full((400,), 2.0)), torch.randn(3, 4), 0.75)
    assert graph_module.scale.shape == (800,)
    assert float(graph_module.scale.detach().mean()) == pytest.approx(3, abs=0.03)
    assert float(graph_module.scale.detach().std()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(graph_module.offset, torch.full((800,), 2.0))
    with pytest.raises(UnsupportedError, match="buffer offset"):
        wide(Scaled(torch.arange(400.0)), torch.randn(3, 4), 0.75)


def test_a_widening_that_changes_nothing_is_refused(models):
    with pytest.raises(UserError, match="changes no width"):
        wide(models.small_cnn(), torch.randn(2, 1, 8, 8), 0.02, round_to=8)


def test_balance_is_exact_to_a_weight(models):
    model, x = models.small_cnn(), torch.randn(2, 1, 8, 8)
    dense = count_flops(model, (x,))
    graph_module, _ = wide(model, x, 0.9, 8)
    BalanceFlops(dense, (x,), widening(0.9))(graph_module)
    balance = notes.balance(graph_module)
    assert balance is not None
    assert balance.sparsity == 1 - (dense.total - balance.kept_dense_flops) / balance.sparsifiable_flops
    flops = count_flops(graph_module, (x,))
    cost = sum(
        flops.of(path) * (each.kept / math.prod(each.widened_shape) if each.sparse else 1)
        for path, each in notes.decisions(graph_module).items()
    )
    assert cost == pytest.approx(dense.total, rel=1e-4)


def test_kept_weights_spend_the_budget():
    assert kept_weights({"a": 10, "b": 10}, {"a": 1, "b": 1}, 0.25) == {"a": 3, "b": 2}
    assert kept_weights({"a": 10}, {"a": 7}, 1.0) == {"a": 10}
    assert kept_weights({"a": 1000}, {"a": 2}, 0.8) == {"a": 800}, "binary fractions do not lose a weight"


def test_an_infeasible_balance_names_the_largest_contributors():
    class Heady(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.hidden, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 1000)

        def forward(self, x):
            return self.head(self.hidden(self.stem(x)))

    x = torch.randn(2, 4)
    dense = count_flops(Heady(), (x,))
    graph_module, _ = wide(Heady(), x, 0.75)
    with pytest.raises(InfeasibleError, match=r"head \(128,000\).*largest feasible widening is about 1.020"):
        BalanceFlops(dense, (x,), 2.0)(graph_module)


def test_largest_feasible_widening_of_gpt3_small():
    layers, d, ff, tokens, vocabulary = 12, 768, 3072, 1024, 50257
    matrices, attention, head = layers * (4 * d * d + 2 * d * ff), layers * 2 * tokens * d, d * vocabulary
    dense = FlopCount(matrices + attention + head, {"matrices": matrices, "attention": attention, "head": head})
    k = 10**0.5
    wide_count = FlopCount(0, {"matrices": 10 * matrices, "attention": round(k * attention), "head": round(k * head)})
    assert largest_feasible_widening(dense, wide_count, {"matrices"}, k) == pytest.approx(2.478, abs=5e-4)
