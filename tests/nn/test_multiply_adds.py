"""Executed multiply-adds, against operators that count themselves: of ones, every product adds one to the sum of the output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sift_compiler.ir.flops import count_flops
from sift_compiler.ir.pattern import EMPTY, Pattern
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.nn.multiply_adds import MultiplyAddCounter, MultiplyAdds, executed_multiply_adds
from sift_compiler.nn.storage import dense_storage

GEOMETRIES = [
    # channels in, out, kernel, stride, padding, dilation, groups, input
    (3, 5, (3, 3), 1, 1, 1, 1, (2, 3, 9, 6)),
    (4, 6, (1, 1), 1, 0, 1, 1, (1, 4, 5, 8)),
    (4, 8, (5, 2), (2, 3), (2, 0), 1, 2, (3, 4, 11, 7)),
    (6, 6, (3, 3), 1, 2, 2, 6, (2, 6, 7, 10)),
    (2, 3, (2, 4), (1, 2), (3, 5), (2, 1), 1, (1, 2, 3, 2)),
]


def conv(geometry, sparsity=0.6) -> tuple[SparseConv2d, torch.Tensor]:
    channels_in, channels_out, kernel, stride, padding, dilation, groups, shape = geometry
    layer = SparseConv2d(
        channels_in, channels_out, kernel, stride, padding, dilation, groups, bias=False, sparsity=sparsity
    )
    return layer, torch.randn(shape)


def products(layer: SparseConv2d, padded_with: float) -> int:
    """How many products the layer adds up, the padding given a value of 1 or 0; summed in float64, so exactly."""
    x = torch.ones(layer.example, dtype=torch.float64)
    height, width = layer.padding
    x = F.pad(x, (width, width, height, height), value=padded_with)
    mask = layer.pattern.mask().double()
    return int(F.conv2d(x, mask, None, layer.stride, 0, layer.dilation, layer.groups).sum())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.999])
def test_convolutions_forward_and_backward(geometry, sparsity):
    layer, x = conv(geometry, sparsity)
    layer.example = x.shape
    x.requires_grad_()
    everything, inside = products(layer, 1.0), products(layer, 0.0)
    with FlopCounterMode(display=False) as formulas, MultiplyAddCounter() as executed:
        layer(x).sum().backward()
    assert [call.operator for call in executed.calls] == [
        "conv2d", "conv2d_input_gradient", "conv2d_values_gradient",
    ]  # fmt: skip
    for call in executed.calls:
        assert call.multiply_adds == MultiplyAdds(everything, everything - inside), call.operator
    by_operator = {str(key): flops for key, flops in formulas.get_flop_counts()["Global"].items()}
    assert by_operator == {f"sift.{call.operator}": 2 * everything for call in executed.calls}


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (0, 7)])
def test_linear_forward_and_backward(shape):
    layer, x = SparseLinear(7, 4, bias=False, sparsity=0.5), torch.randn(shape, requires_grad=True)
    everything = int(F.linear(torch.ones(shape, dtype=torch.float64), layer.pattern.mask().double()).sum())
    with FlopCounterMode(display=False) as formulas, MultiplyAddCounter() as executed:
        layer(x).sum().backward()
    assert [call.multiply_adds for call in executed.calls] == [MultiplyAdds(everything)] * 3
    assert executed.total == MultiplyAdds(3 * everything)
    assert sum(formulas.get_flop_counts()["Global"].values()) == 2 * executed.total.total


def called_by_name(operator, **given):
    """Call a fused operator with ``given``, nothing where nothing is needed, and any number where one is."""
    neutral = {"float": 1e-5, "str": "none", "Optional[Tensor]": None}
    schema = operator.default._schema.arguments
    arguments = {each.name: given.get(each.name, neutral.get(str(each.type), each.default_value)) for each in schema}
    return operator(**arguments)


def test_fused_operators_count_as_the_layer_does():
    layer, x = conv(GEOMETRIES[0])
    linear, rows = SparseLinear(7, 4, sparsity=0.5), torch.randn(5, 7)
    with torch.no_grad(), FlopCounterMode(display=False) as formulas, MultiplyAddCounter() as executed:
        called_by_name(
            torch.ops.sift.conv2d_fused, x=x, values=layer.values, index=layer.index, activation="relu", shape=layer.weight_shape,
            stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
        )  # fmt: skip
        called_by_name(
            torch.ops.sift.linear_fused,
            x=rows,
            values=linear.values,
            index=linear.index,
            bias=linear.bias,
            shape=(4, 7),
        )
    with torch.no_grad(), MultiplyAddCounter() as plain:
        layer(x)
        linear(rows)
    assert [call.multiply_adds for call in executed.calls] == [call.multiply_adds for call in plain.calls]
    assert sum(formulas.get_flop_counts()["Global"].values()) == 2 * executed.total.total


def test_slots_outside_the_mask_do_nothing_forward():
    layer = SparseLinear(6, 4, bias=False, pattern=Pattern((4, 6), torch.arange(10, dtype=torch.int32)))
    layer.index[:3] = EMPTY
    with MultiplyAddCounter() as executed:
        layer(torch.randn(5, 6)).sum().backward()
    assert [call.multiply_adds.total for call in executed.calls] == [5 * 7, 5 * 7], "x needs no gradient"
    dense_storage(layer)
    with MultiplyAddCounter() as executed:
        layer(torch.randn(5, 6)).sum().backward()
    assert [call.multiply_adds.total for call in executed.calls] == [5 * 7, 5 * 24], "values asleep get a gradient"
    assert executed_multiply_adds(layer, (torch.randn(5, 6),)) == {"": MultiplyAdds(5 * 7)}


class Shared(nn.Module):
    """One sparse layer under two names, called three times, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(SparseLinear(8, 8, sparsity=0.5), nn.ReLU(inplace=True))
        self.outer = nn.Sequential(nn.Linear(8, 8), self.inner[0])
        self.idle = SparseLinear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(self.inner(x.relu_())))


def test_layers_by_path_and_nothing_changes():
    model, x = Shared().train(), torch.randn(3, 8)
    before, state = x.clone(), torch.get_rng_state()
    found = executed_multiply_adds(model, (x,))
    assert found == {"inner.0": MultiplyAdds(3 * 3 * 32), "idle": MultiplyAdds(0)}
    assert torch.equal(x, before)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    counted = count_flops(model, (x,))
    assert counted.modules == {"inner.0": 2 * 3 * 3 * 32, "outer.0": 2 * 3 * 64}
    assert {type(each) for each in model.parameters()} == {nn.Parameter}
    assert type(model.outer[1].values.data) is torch.Tensor, "counting leaves shared modules as they were"
    model(x).sum().backward()
