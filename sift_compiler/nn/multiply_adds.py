"""Multiply-adds that the sparse operators execute, counted while a model runs.

This is the second opinion on the FLOP formulas of nn/operators.py: those see the lengths of tensors only, this reads the tensors that
every call gets (which slots of the index are in the mask) and the output that comes back.

Every kept weight counts once for each position of the output, in each image or row: the convention of ``torch.utils.flop_counter``.
Near the border of a padded image some of these products have a padding zero as a factor; they are counted, and how many they are is
told (``on_padding``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sift_compiler.ir.inputs import Inputs, called
from sift_compiler.ir.modes import training_mode
from sift_compiler.ir.pattern import EMPTY, entry_of
from sift_compiler.nn import fused, operators  # noqa: F401  (they register what is looked up below)
from sift_compiler.nn.layer import SparseLayer


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one or several operator calls.

    Attributes:
        total: all of them; twice this is the number of FLOPs.
        on_padding: those of ``total`` whose input is a zero of the padding.
    """

    total: int
    on_padding: int = 0

    def __add__(self, other: MultiplyAdds) -> MultiplyAdds:
        return MultiplyAdds(self.total + other.total, self.on_padding + other.on_padding)


@dataclass(frozen=True, eq=False)
class OperatorCall:
    """One call of a sparse operator.

    Attributes:
        operator: its name, e.g. ``"conv2d"``.
        index: the index it was given.
        multiply_adds: what it executed.
    """

    operator: str
    index: Tensor
    multiply_adds: MultiplyAdds


class MultiplyAddCounter(TorchDispatchMode):
    """Within the block, every call of a sparse operator is counted, forward and backward.

    Attributes:
        calls: in the order they were made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[OperatorCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, then count what it did."""
        given = dict(kwargs or {})
        result = func(*args, **given)
        count = _COUNTS.get(func)
        if count is not None:
            names = [argument.name for argument in func._schema.arguments]
            call = {**dict(zip(names, args, strict=False)), **given}
            name = func._schema.name.partition("::")[2]
            self.calls.append(OperatorCall(name, call["index"], count(call, result)))
        return result

    @property
    def total(self) -> MultiplyAdds:
        """Of all calls."""
        return sum((call.multiply_adds for call in self.calls), MultiplyAdds(0))


def executed_multiply_adds(module: nn.Module, inputs: Inputs) -> dict[str, MultiplyAdds]:
    """Run ``module`` on ``inputs`` in eval mode, for real, and count what its sparse layers execute.

    Args:
        module: no tensor of it is on the meta device; it is left as it is.
        inputs: positional arguments, or keyword arguments by name; copies are used, on the module's device.

    Returns:
        Multiply-adds of every sparse layer over all its calls, by module path.
    """
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    copies = pytree.tree_map(
        lambda leaf: leaf.detach().clone().to(device) if isinstance(leaf, Tensor) else leaf, inputs
    )
    owners = {
        layer.index.untyped_storage()._cdata: path
        for path, layer in module.named_modules()
        if isinstance(layer, SparseLayer)
    }
    counter = MultiplyAddCounter()
    with training_mode(module, False), torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
        called(module, copies)
    found = dict.fromkeys(owners.values(), MultiplyAdds(0))
    for call in counter.calls:
        path = owners.get(call.index.untyped_storage()._cdata)
        if path is not None:
            found[path] += call.multiply_adds
    return found


Call = Mapping[str, Any]


def _active(call: Call) -> Tensor:
    index: Tensor = call["index"]
    return index[index >= 0].long()


def _with_gradient(call: Call) -> Tensor:
    """Entries that get a gradient: those in the mask and those asleep."""
    entries = entry_of(call["index"])
    return entries[entries != EMPTY]


def _rows(entries: Tensor, features: Tensor) -> MultiplyAdds:
    """Each entry once for every row of ``features`` [..., size]."""
    return MultiplyAdds(entries.numel() * math.prod(features.shape[:-1]))


def _positions(call: Call, entries: Tensor, x_size: Sequence[int], y: Tensor) -> MultiplyAdds:
    """Each entry once for every position of every image of the output y [N, M, H', W']; x_size is (H, W)."""
    images, _, *y_size = y.shape
    kernel = tuple(call["shape"][2:])
    tap = entries % math.prod(kernel)
    rows, columns = (
        _inside(kernel[axis], x_size[axis], y_size[axis], call["stride"][axis], call["padding"][axis], call["dilation"][axis])
        for axis in (0, 1)
    )  # fmt: skip
    inside = int((rows[tap.cpu() // kernel[1]] * columns[tap.cpu() % kernel[1]]).sum()) * images
    total = entries.numel() * images * math.prod(y_size)
    return MultiplyAdds(total, total - inside)


def _inside(kernel: int, size: int, outputs: int, stride: int, padding: int, dilation: int) -> Tensor:
    """int64 [kernel]: for how many outputs along one axis a tap of the kernel meets the input and not its padding."""
    places = torch.arange(outputs) * stride - padding + torch.arange(kernel)[:, None] * dilation
    return ((places >= 0) & (places < size)).sum(1)


def _conv2d(call: Call, y: Tensor) -> MultiplyAdds:
    return _positions(call, _active(call), call["x"].shape[2:], y)


def _conv2d_input_gradient(call: Call, dx: Tensor) -> MultiplyAdds:
    return _positions(call, _active(call), dx.shape[2:], call["gradient"])


def _conv2d_values_gradient(call: Call, dv: Tensor) -> MultiplyAdds:
    return _positions(call, _with_gradient(call), call["x"].shape[2:], call["gradient"])


def _linear(call: Call, y: Tensor) -> MultiplyAdds:
    return _rows(_active(call), y)


def _linear_input_gradient(call: Call, dx: Tensor) -> MultiplyAdds:
    return _rows(_active(call), dx)


def _linear_values_gradient(call: Call, dv: Tensor) -> MultiplyAdds:
    return _rows(_with_gradient(call), call["x"])


_COUNTS: Mapping[Any, Callable[[Call, Tensor], MultiplyAdds]] = {
    torch.ops.sift.conv2d.default: _conv2d,
    torch.ops.sift.conv2d_fused.default: _conv2d,
    torch.ops.sift.conv2d_input_gradient.default: _conv2d_input_gradient,
    torch.ops.sift.conv2d_values_gradient.default: _conv2d_values_gradient,
    torch.ops.sift.linear.default: _linear,
    torch.ops.sift.linear_fused.default: _linear,
    torch.ops.sift.linear_input_gradient.default: _linear_input_gradient,
    torch.ops.sift.linear_values_gradient.default: _linear_values_gradient,
}
