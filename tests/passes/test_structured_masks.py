"""Rewrites whose masks have a structure."""

import pytest
import torch

from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.mask_structure import NM, Block, Channel, ConstantFanIn, TransposableNM, Unstructured
from sift_compiler.nn import SparseLayer
from sift_compiler.options import RigL, SparseFactorized, SparseParallel, SparseWide
from sift_compiler.passes.balance_flops import kept_weights, scaled_densities
from sift_compiler.report import report
from sift_compiler.rewrite import rewrite
from sift_compiler.schedule import schedule
from sift_compiler.storage import load, save

INPUTS = torch.zeros(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("structure", "tolerance"),
    [
        (NM(2, 8), 1e-4), (NM(1, 4), 1e-4), (TransposableNM(2, 8), 1e-4), (Block(4, 4), 1e-4), (ConstantFanIn(), 1e-3), (Channel(), 2e-2),
    ],
    ids=str,
)  # fmt: skip
def test_flops_balance_and_every_mask_has_the_structure(models, structure, tolerance):
    dense = models.ResNet18(classes=10, stem="cifar", widths=(8, 16, 16, 32))
    sparse = rewrite(dense, INPUTS, SparseWide(sparsity=0.75, structure=structure))
    layers = {path: each for path, each in sparse.named_modules() if isinstance(each, SparseLayer)}
    assert len(layers) == 19
    for path, layer in layers.items():
        assert layer.structure == structure
        structure.check(layer.pattern)
        assert layer.pattern.nnz == notes.decisions(sparse)[path].kept
    assert report(dense, sparse, INPUTS).ratio == pytest.approx(1, abs=tolerance)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    masks = schedule(sparse, optimizer, RigL(delta_t=1, end_step=1, drop_fraction=0.5))
    sparse(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert len(masks.updates) == 1
    for layer in layers.values():
        structure.check(layer.pattern)


@pytest.mark.parametrize("transform", [SparseParallel, SparseFactorized])
def test_parts_of_layers_have_the_structure_too(models, transform):
    dense = models.ResNet18(classes=10, stem="cifar", widths=(8, 16, 16, 16))
    sparse = rewrite(dense, INPUTS, transform(sparsity=0.75, structure=ConstantFanIn()))
    layers = [each for each in sparse.modules() if isinstance(each, SparseLayer)]
    assert len(layers) > 19
    for layer in layers:
        assert layer.structure == ConstantFanIn()
        layer.structure.check(layer.pattern)
    assert report(dense, sparse, INPUTS).ratio == pytest.approx(1, abs=2e-3)


def test_structures_are_saved_and_shown(models, tmp_path):
    dense = models.ResNet18(classes=10, stem="cifar", widths=(8, 8, 16, 16))
    sparse = rewrite(dense, INPUTS, SparseWide(sparsity=0.75, structure=NM(2, 8)))
    save(sparse, tmp_path / "model.pt2")
    loaded = load(tmp_path / "model.pt2")
    layer = loaded.get_submodule("layer2.0.conv1")
    assert layer.structure == NM(2, 8)
    assert "structure=NM(n=2, m=8)" in repr(layer)
    assert notes.decisions(loaded) == notes.decisions(sparse)


def test_what_a_structure_cannot_keep_is_refused(models):
    dense = models.ResNet18(classes=10, stem="cifar", widths=(8, 16, 16, 16))
    with pytest.raises(
        UserError, match=r"lets layer 'layer1.0.conv1' keep at most 12\.50%.*sparsity of at least 0\.8750"
    ):
        rewrite(dense, INPUTS, SparseWide(sparsity=0.75, structure=NM(1, 8)))
    with pytest.raises(
        UserError, match=r"Layer 'layer1.0.conv1': NM\(n=2, m=5\) does not fit.*dense=\('layer1.0.conv1',\)"
    ):
        rewrite(dense, INPUTS, SparseWide(sparsity=0.75, structure=NM(2, 5)))
    with pytest.raises(UserError, match=r"structure must be a structure such as sift.NM"):
        SparseWide(sparsity=0.5, structure="2:4")
    assert SparseWide(sparsity=0.5).structure == Unstructured()


def test_counts_go_in_the_steps_and_to_the_limits_of_a_structure():
    assert scaled_densities({"a": 0.5, "b": 0.5}, {"a": 100, "b": 100}, 100, {"a": 0.25, "b": 1.0}) == {
        "a": 0.25,
        "b": 0.75,
    }
    assert scaled_densities({"a": 0.5}, {"a": 100}, 100, {"a": 0.25}) == {"a": 0.25}
    kept = kept_weights({"a": 100, "b": 100}, {"a": 1, "b": 1}, 0.37, {"a": (8, 100), "b": (1, 100)})
    assert kept == {"a": 32, "b": 38}
    assert kept_weights({"a": 100}, {"a": 1}, 0.9, {"a": (8, 48)}) == {"a": 48}
