"""Sparse Wide on mobile networks and transformers: equal FLOPs, what is sparse and what stays dense, how attention and groups grow."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sift_compiler import pipeline
from sift_compiler.capture import capture
from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import count_flops
from sift_compiler.nn import SparseConv2d, SparseLayer, SparseLinear
from sift_compiler.options import SparseWide
from sift_compiler.passes.sparse_wide import widened_head
from sift_compiler.rewrite import rewrite
from sift_compiler.storage import load, save

# How many layers become sparse at a sparsity of one half.
COUNTS = {
    "resnet": 8, "resnext": 3, "mobilevit": 88, "convnext": 7, "vit": 12, "bert": 13, "gpt2": 8, "llama": 14, "encoder": 9,
    "multihead_attention": 3,
}  # fmt: skip


def sparse_layers(graph_module):
    return [path for path, module in graph_module.named_modules() if isinstance(module, SparseLayer)]


def ratio(model, sparse, inputs):
    return count_flops(sparse, inputs).total / count_flops(model, inputs).total


@pytest.mark.parametrize("name", list(COUNTS))
def test_architectures_are_iso_flop_and_train(architectures, name):
    model, inputs = architectures.ARCHITECTURES[name]()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.5))
    assert abs(ratio(model, sparse, inputs) - 1) < 1e-3
    assert len(sparse_layers(sparse)) == COUNTS[name]
    again = {key: torch.cat([value, value[:1]]) for key, value in inputs.items()}
    shapes = [[leaf.shape for leaf in pytree.tree_leaves(module(**again))] for module in (model, sparse)]
    assert shapes[0] == shapes[1], "another batch size"
    outputs = [leaf for leaf in pytree.tree_leaves(sparse.train()(**again)) if isinstance(leaf, torch.Tensor)]
    sum(leaf.square().sum() for leaf in outputs).backward()
    assert all(p.grad is not None for p in sparse.parameters())


def test_mobilenet_by_both_formulas(architectures):
    """Up to the balance. Depthwise: density (1 - s)^(1/2) before balancing, or dense and paid for by the others."""
    model, inputs = architectures.mobilenet_v2()
    graph_module = capture(model, inputs)
    dense, made = count_flops(graph_module, inputs), {}
    for choice in ("sparse", "dense"):
        planned = capture(model, inputs)
        rules = {"*": SparseWide(sparsity=0.75, depthwise=choice)}
        pipeline.run(planned, pipeline.planning(rules, dense, inputs))
        made[choice] = notes.decisions(planned)
    depthwise = [path for path, each in made["sparse"].items() if each.weight_shape[1] == 1]
    assert len(depthwise) == 17
    for path in depthwise:
        before, after = made["sparse"][path].weight_shape, made["sparse"][path].widened_shape
        assert after == (2 * before[0], 1, 3, 3)
        assert made["sparse"][path].density == pytest.approx(0.5)
        assert made["dense"][path].reason == "depthwise"
        assert made["dense"][path].widened_shape == after, "as wide as its neighbours"
    densities = {each.density for path, each in made["sparse"].items() if each.sparse and path not in depthwise}
    assert densities == {0.25}


@pytest.mark.parametrize(
    ("attention", "qkv", "heads", "width"), [("heads_fixed", 192, 4, 16), ("head_dim_fixed", 192, 8, 8)]
)
def test_attention_grows_in_width_or_in_number_of_heads(architectures, attention, qkv, heads, width):
    model, inputs = architectures.gpt2()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75, attention=attention))
    assert sparse.get_submodule("transformer.h.0.attn.c_attn").weight_shape == (qkv, 64)
    products = [
        node for node in sparse.graph.nodes if node.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    assert len(products) == 2
    for node in products:
        assert tuple(node.args[0].meta["val"].shape[1:]) == (heads, 8, width)
        scale = node.kwargs.get("scale")
        assert scale is None or scale == pytest.approx(width**-0.5), "a scale written as a number follows"


@pytest.mark.parametrize(("attention", "heads", "width"), [("heads_fixed", 4, 16), ("head_dim_fixed", 8, 8)])
def test_torch_attention_written_out(architectures, attention, heads, width):
    """Heads in the batch: their number is in the sizes of views and in what those are computed from."""
    model, inputs = architectures.multihead_attention()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75, attention=attention, pin=()))
    assert sparse.get_submodule("attention.in_proj").weight_shape == (192, 64)
    products = [node for node in sparse.graph.nodes if node.target is torch.ops.aten.bmm.default]
    scales = [node.args[1] for node in sparse.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert scales == pytest.approx([width**-0.5] * 2)
    assert products[0].args[0].meta["val"].shape[-1] == width
    x = torch.randn(3, 5, 8)
    assert sparse(x)[0].shape == (3, 5, 3)
    first_weights = sparse(x)[1]
    assert first_weights.shape == (3, 5, 5)
    counts = [node.args[1] for node in sparse.graph.nodes if str(node.target) == "<built-in function mul>"]
    assert (heads in counts) or (heads * 1 in counts)


def test_rotary_heads_grow_in_number(architectures):
    """The table of rotary positions fixes the width of a head; two key heads serve four query heads, before and after."""
    model, inputs = architectures.llama()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75))
    attention = sparse.get_submodule("model.layers.0.self_attn")
    assert attention.q_proj.weight_shape == (64, 64)
    assert attention.k_proj.weight_shape == (32, 64)
    assert sparse.get_buffer("model.rotary_emb.inv_freq").shape == (4,)


@pytest.mark.parametrize(
    ("groups", "shape", "count"), [("groups_fixed", (64, 8, 3, 3), 8), ("group_width_fixed", (64, 4, 3, 3), 16)]
)
def test_groups_of_resnext(architectures, groups, shape, count):
    model, inputs = architectures.resnext()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.75, groups=groups))
    assert isinstance(sparse.grouped, SparseConv2d)
    assert (sparse.grouped.weight_shape, sparse.grouped.groups) == (shape, count)
    assert abs(ratio(model, sparse, inputs) - 1) < 1e-3
    densities = {path: notes.decisions(sparse)[path].density for path in ("reduce", "grouped")}
    assert densities == {"reduce": 0.25, "grouped": 0.5 if count == 16 else 0.25}


def test_what_stays_dense_in_a_transformer(architectures):
    model, inputs = architectures.gpt2()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.5))
    assert isinstance(sparse.transformer.wte, nn.Embedding)
    assert sparse.lm_head.weight is sparse.transformer.wte.weight
    assert isinstance(sparse.get_submodule("transformer.h.0.ln_1"), nn.LayerNorm)
    assert isinstance(sparse.get_submodule("transformer.h.0.attn.c_proj"), SparseLinear)
    assert notes.decisions(sparse)["lm_head"].reason == "its weight is shared"
    deviation = float(sparse.transformer.wte.weight.detach().std())
    assert deviation == pytest.approx(0.02, rel=0.1), "embeddings keep the scale the model gave them"


def test_a_sparse_transformer_is_compiled_saved_and_loaded(architectures, tmp_path):
    model, inputs = architectures.gpt2()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.5))
    expected = sparse(**inputs)
    compiled = torch.compile(sparse, backend="sift", options={"runtime": "eager", "rest": "eager"})
    torch.testing.assert_close(compiled(**inputs).logits, expected.logits, rtol=1e-4, atol=1e-5)
    save(sparse, tmp_path / "gpt2.pt2")
    loaded = load(tmp_path / "gpt2.pt2")
    assert torch.equal(loaded(inputs["input_ids"]).logits, expected.logits)


def test_head_widths():
    assert [widened_head(64, (1 - s) ** -0.5, 8) for s in (0.5, 0.75, 0.9)] == [88, 128, 200]
    assert widened_head(8, 2**0.5, 8) == 12, "a multiple of 4: of 8 would be far off"
    assert widened_head(5, 2**0.5, 1) == 7


@pytest.mark.parametrize("field", ["attention", "depthwise", "groups"])
def test_unknown_choices_are_refused(field):
    with pytest.raises(UserError, match=f"Unknown {field} 'wide'.*Known: "):
        SparseWide(sparsity=0.5, **{field: "wide"})
