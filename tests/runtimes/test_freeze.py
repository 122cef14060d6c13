"""Values kept in the order of the program: what is followed all the same, and what is not."""

from __future__ import annotations

import pytest
import torch

import sift_compiler as sift
from sift_compiler.errors import UserError
from sift_compiler.options import CompileOptions
from sift_compiler.runtimes import registry
from tests.runtimes.test_conformance import TOLERANCE, Layer, layer, sparse_mask

SHAPES = {
    "convolution": ((13, 10, 3, 3), (2, 10, 6, 5)),
    "linear": ((40, 30), (70, 30)),
    "one token": ((40, 30), (1, 30)),
}


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest) -> tuple[Layer, torch.Tensor]:
    torch.manual_seed(0)
    shape, x = SHAPES[request.param]
    return layer(sparse_mask(shape), kind="conv2d" if len(shape) == 4 else "linear"), torch.randn(x)


def test_what_torch_counts_is_followed(case: tuple[Layer, torch.Tensor]) -> None:
    one, x = case
    kernel = registry.get("tvm").build(one.spec, "layer", 1, freeze=True)
    assert one.error(kernel, x) < TOLERANCE
    assert one.error(kernel, x) < TOLERANCE
    one.values.mul_(2)
    assert one.error(kernel, x) < TOLERANCE
    one.values = torch.randn_like(one.values)
    assert one.error(kernel, x) < TOLERANCE
    one.index.copy_(torch.randperm(one.dense().numel())[: one.spec.nnz].int())
    assert one.error(kernel, x) < TOLERANCE


def test_what_nobody_counts_is_not_followed() -> None:
    one, x = layer(sparse_mask((13, 10, 3, 3))), torch.randn(1, 10, 6, 5)
    frozen, live = (registry.get("tvm").build(one.spec, "layer", 1, freeze=freeze) for freeze in (True, False))
    before = frozen(x, one.values, one.index, one.bias)
    one.values.data.mul_(2)
    assert torch.equal(frozen(x, one.values, one.index, one.bias), before)
    assert one.error(live, x) < TOLERANCE


@pytest.mark.usefixtures("fresh_dynamo")
def test_as_an_option_of_the_backend() -> None:
    model = sift.rewrite(
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3), torch.nn.Conv2d(16, 16, 3)).eval(),
        (torch.randn(1, 3, 12, 12),), sift.SparseWide(sparsity=0.5),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    compiled = torch.compile(model, backend="sift", options={"freeze": True, "rest": "eager"})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
            for parameter in model.parameters():
                parameter.mul_(1.1)
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(UserError, match="freeze"):
        CompileOptions(freeze="yes")  # type: ignore[arg-type]
