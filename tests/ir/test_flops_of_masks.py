import torch
from torch import nn

from sift_compiler.ir.flops import count_flops
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.nn.storage import dense_storage
from sift_compiler.report import report


def test_flops_and_kept_weights_are_those_of_the_mask_whatever_the_storage():
    torch.manual_seed(0)
    model = nn.Sequential(SparseConv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 6), SparseLinear(6, 5, sparsity=0.5))
    inputs = (torch.zeros(2, 3, 6, 6),)
    compact = count_flops(model, inputs)
    assert compact.of("0") == 2 * model[0].pattern.nnz * 2 * 16
    assert compact.total == sum(compact.modules.values())
    kept = [layer.kept for layer in report(model, model, inputs).layers]
    dense_storage(model)
    assert count_flops(model, inputs) == compact
    assert [layer.kept for layer in report(model, model, inputs).layers] == kept
