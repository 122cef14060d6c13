"""report: totals, layers, text and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from sift_compiler.errors import SiftError, UserError
from sift_compiler.ir.activation_memory import activation_memory
from sift_compiler.ir.flops import count_flops
from sift_compiler.ir.training_state import OPTIMIZERS, training_state
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.options import SparseDoped, SparseFactorized, SparseParallel, SparseWide
from sift_compiler.report import report
from sift_compiler.reporting.model import FlopCheck
from sift_compiler.rewrite import rewrite
from sift_compiler.storage import load, save


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


def test_memory_is_told_of_both_models(made):
    model, sparse, x, found = made
    assert found.activations.dense == activation_memory(model, (x,))
    assert found.activations.sparse == activation_memory(sparse, (x,))
    for name, states in found.training.items():
        assert states.dense == training_state(model, OPTIMIZERS[name])
        assert states.sparse == training_state(sparse, OPTIMIZERS[name])
    kept = sum(layer.kept for layer in found.layers if layer.sparse)
    assert {states.sparse.indices for states in found.training.values()} == {4 * kept}


def test_flops_are_those_executed(made):
    model, sparse, x, found = made
    flops = sum(layer.flops_after for layer in found.layers if layer.sparse)
    assert found.check == FlopCheck(flops, flops // 2, found.check.on_padding)
    assert found.check.difference == 0
    assert all((layer.multiply_adds is None) != layer.sparse for layer in found.layers)
    assert report(model, sparse, x, execute=False) == dataclasses.replace(
        found, check=None, layers=tuple(dataclasses.replace(each, multiply_adds=None, on_padding=None) for each in found.layers)
    )  # fmt: skip


@pytest.mark.parametrize("operator", ["conv2d", "linear"])
def test_a_wrong_formula_is_an_error(operator, monkeypatch):
    model = nn.Sequential(SparseConv2d(2, 4, 3), nn.Flatten(), SparseLinear(4 * 3 * 2, 3))
    x = torch.randn(2, 2, 5, 4)
    assert report(model, model, x).check.difference == 0
    packet = getattr(torch.ops.sift, operator)
    right = flop_registry[packet]
    monkeypatch.setitem(flop_registry, packet, lambda *args, **kwargs: right(*args, **kwargs) + 2)
    path = {"conv2d": "0", "linear": "2"}[operator]
    with pytest.raises(SiftError, match=rf"Layer '{path}' has .* FLOPs by formula, but executed .* multiply-adds"):
        report(model, model, x)
    assert report(model, model, x, execute=False).check is None


def test_models_without_numbers_are_not_run():
    with torch.device("meta"):
        sparse = nn.Sequential(nn.Linear(4, 8))
    found = report(sparse, sparse, torch.randn(2, 4))
    assert found.check is None
    assert found.activations.sparse.bytes == 4 * 2 * 4


def test_nothing_changes_where_a_report_is_made(made):
    model, sparse, x, _ = made
    tensors = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in sparse.modules()]
    report(model, sparse, x)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in sparse.modules()]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in sparse.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "encoder", "multihead_attention"])
def test_transformers_tell_of_every_layer(architectures, name, tmp_path):
    model, inputs = architectures.gpt2(layers=1) if name == "gpt2" else architectures.ARCHITECTURES[name]()
    sparse = rewrite(model, inputs, SparseWide(sparsity=0.3))
    found = report(model, sparse, inputs)
    assert all(layer.shape_before is not None and layer.flops_before > 0 for layer in found.layers)
    assert all(layer.reason for layer in found.layers)
    # Attention's own products grow with the width of heads; nothing is counted twice.
    assert found.sparse_flops_elsewhere >= found.dense_flops_elsewhere >= 0
    assert found.dense_flops_elsewhere == {"encoder": 12_800}.get(name, found.dense_flops_elsewhere)
    assert abs(found.ratio - 1) < 5e-3
    save(sparse, tmp_path / "sparse.pt2")
    positional = tuple(inputs.values())
    loaded = report(model, load(tmp_path / "sparse.pt2"), positional)
    assert {layer.path: layer for layer in loaded.layers} == {layer.path: layer for layer in found.layers}
    assert (loaded.sparse_flops, loaded.check, loaded.training) == (found.sparse_flops, found.check, found.training)


def test_transposed_weights_are_told_outputs_first(architectures):
    model, inputs = architectures.gpt2(layers=1)
    for member in (SparseParallel(sparsity=0.5), SparseFactorized(sparsity=0.5), SparseDoped(sparsity=0.5)):
        found = report(model, rewrite(model, inputs, {"*.c_attn": member}), inputs)
        (whole,) = found.replacements
        assert whole.shape_before == (96, 32)
        assert whole.flops_before == 2 * 16 * 96 * 32
        assert whole.member == type(member).__name__


def test_modules_under_two_names_count_once():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.shared = nn.ModuleList([nn.Linear(32, 32)])
            self.block = nn.Sequential(self.shared[0], nn.ReLU())

        def forward(self, x):
            return self.last(self.inner(self.block(self.shared[0](self.first(x).relu()))).relu())

    model, x = Shares(), torch.randn(2, 8)
    sparse = rewrite(model, x, SparseWide(sparsity=0.3))
    found = report(model, sparse, x)
    assert type(model.block[0].weight) is nn.Parameter
    assert model.block[0].weight is model.shared[0].weight
    assert found.dense_flops_elsewhere == found.sparse_flops_elsewhere == 0
    assert {layer.reason for layer in found.layers if not layer.sparse} >= {"its weight is shared"}
    model(x).sum().backward()


@pytest.mark.parametrize("suffix", [".html", ".JSON", ".txt"])
def test_saved_by_suffix(made, tmp_path, suffix):
    *_, found = made
    path = tmp_path / f"report{suffix}"
    found.save(path)
    made_of = {".html": found.to_html(), ".json": found.to_json(), ".txt": str(found)}
    assert path.read_text(encoding="utf-8") == made_of[suffix.lower()] + "\n"
    found.save(str(path))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_saving_refuses(made, tmp_path):
    *_, found = made
    with pytest.raises(UserError, match=r"suffix '.pdf' says no form. Choose .html, .json, .txt"):
        found.save(tmp_path / "report.pdf")
    with pytest.raises(UserError, match="cannot be written"):
        found.save(tmp_path / "missing" / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_refusals(made):
    model, sparse, x, _ = made
    with pytest.raises(UserError, match=r"sparse .* does not run on the example inputs"):
        report(nn.Flatten(), sparse, torch.randn(4, 3))
    with pytest.raises(UserError, match="no ratio"):
        report(nn.Flatten(), nn.Flatten(), x)
    with pytest.raises(UserError, match=r"must be a torch\.nn\.Module"):
        report(model, "sparse", x)
