"""Slots that are empty or asleep, in compiled kernels."""

import pytest
import torch
from torch import nn

from sift_compiler.ir.pattern import EMPTY, asleep
from sift_compiler.nn import SparseConv2d, SparseLinear


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SparseLinear(40, 30, sparsity=0.8), (16, 40)),
        (lambda: SparseConv2d(8, 12, 3, padding=1), (16, 8, 6, 6)),
    ],
)
def test_compiled_kernels_leave_out_slots_that_are_empty_or_asleep(make, shape):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(make())
    layer = model[0]
    compiled = torch.compile(model, backend="sift", options={"runtime": "tvm"})
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
        layer.index[::3] = asleep(layer.index[::3])
        layer.index[1::3] = EMPTY
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
        layer.index[:] = EMPTY
        assert torch.equal(compiled(x), model(x))
