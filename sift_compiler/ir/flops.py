"""FLOPs of one forward pass, by ``torch.utils.flop_counter``: 2 per multiply-add of convolutions, linear layers and matrix products
(those of attention included), of kept weights only. Norms, activations and additions do not count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sift_compiler.ir.innermost_module import InnermostModule
from sift_compiler.ir.inputs import Inputs, called
from sift_compiler.ir.shadow import device_of, fake_inputs, shadowed
from sift_compiler.ir.structure import SparseWeight


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Query [B, H, T, E], key [B, H, S, E], value [B, H, S, V]: both products in full, as torch counts them on other devices."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""Operators that ``torch.utils.flop_counter`` does not count."""


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward pass.

    Attributes:
        total: of the whole module.
        modules: of every submodule by path, less those of its own submodules; ``""`` is the module itself. A module with several
            paths has its FLOPs under the first.
    """

    total: int
    modules: Mapping[str, int]

    def of(self, path: str) -> int:
        """FLOPs of the submodule ``path`` itself, over all its calls."""
        return self.modules.get(path, 0)


def count_flops(module: nn.Module, inputs: Inputs) -> FlopCount:
    """Count the FLOPs of ``module(*inputs)`` without computing it; a real batch size counts as given.

    Args:
        module: any module; its parameters may be on the meta device.
        inputs: positional arguments, or keyword arguments by name.
    """
    mode = FakeTensorMode()
    arguments = fake_inputs(inputs, mode)
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    counter.mod_tracker = InnermostModule(module)  # type: ignore[assignment]
    with shadowed(module, mode, device_of(inputs)), counter:
        called(module, arguments)
    own = {
        path: sum(by_operator.values()) for path, by_operator in counter.get_flop_counts().items() if path != "Global"
    }
    own.update(_in_masks(module, own))
    return FlopCount(int(sum(own.values())), {path: int(flops) for path, flops in own.items() if flops})


def _in_masks(module: nn.Module, own: Mapping[str, int]) -> dict[str, int]:
    """FLOPs of sparse layers with slots outside their mask; operators, which see lengths only, count those too."""
    found = {}
    for path, layer in module.named_modules():
        if path in own and isinstance(layer, SparseWeight) and not layer.index.is_meta:
            pattern = layer.pattern
            if pattern.nnz < pattern.slots:
                found[path] = own[path] * pattern.nnz // pattern.slots
    return found
