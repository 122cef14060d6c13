"""Slots that are empty or asleep, in compiled kernels."""

import pytest
import torch
from torch import nn

from sift_compiler.export import export
from sift_compiler.ir.pattern import EMPTY, asleep
from sift_compiler.nn import SparseConv2d, SparseLinear

LAYERS = pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SparseLinear(40, 30, sparsity=0.8), (16, 40)),
        (lambda: SparseConv2d(8, 12, 3, padding=1), (16, 8, 6, 6)),
    ],
)


@LAYERS
def test_compiled_kernels_leave_out_slots_that_are_empty_or_asleep(make, shape):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(make())
    layer = model[0]
    compiled = torch.compile(model, backend="sift", options={"runtime": "tvm", "rest": "eager"})
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
        layer.index[::3] = asleep(layer.index[::3])
        layer.index[1::3] = EMPTY
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
        layer.index[:] = EMPTY
        assert torch.equal(compiled(x), model(x))


@LAYERS
def test_compiled_gradients_reach_sleeping_slots_and_no_empty_ones(make, shape):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(make())
    layer = model[0]
    compiled = torch.compile(model, backend="sift", options={"runtime": "tvm", "rest": "eager"})
    x = torch.randn(shape, requires_grad=True)
    for _ in range(2):
        found = []
        for call in (model, compiled):
            call(x).square().mean().backward()
            found.append((layer.values.grad, x.grad))
            layer.values.grad = x.grad = None
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        layer.index[::3] = asleep(layer.index[::3])
        layer.index[1::3] = EMPTY
    empty = layer.index == EMPTY
    assert found[1][0][empty].abs().sum() == 0
    assert (found[1][0][::3] != 0).any()


@LAYERS
def test_an_exported_file_holds_the_mask_only(make, shape, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(make())
    layer = model[0]
    layer.index[::3] = asleep(layer.index[::3])
    layer.index[1::3] = EMPTY
    length, x = layer.values.numel(), torch.randn(shape)
    export(model, x, tmp_path / "model.onnx", runtime="onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=0, atol=1e-5)
    assert layer.values.numel() == length
