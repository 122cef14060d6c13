"""What a mask method sees of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sift_compiler.ir.mask_structure import Structure
from sift_compiler.masking import criteria

Memory = dict[str, Tensor]
"""What a method remembers of a layer from step to step; saved and restored with the masks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerView:
    """One sparse layer at one optimizer step. A method reads it and writes nothing but ``memory``.

    Attributes:
        name: module path.
        shape: shape of the dense weight.
        structure: what the mask must look like.
        index: int32 [slots]; see :mod:`sift_compiler.ir.pattern`.
        slot_values: [slots].
        slot_gradient: [slots] or None, the gradient of ``slot_values`` as the optimizer saw it, unscaled.
        fetch: returns the dense gradient [numel], the mean over all ranks, unscaled if the method says ``uses_gradient_size``; None if it asks
            for none.
        growable: int32 [n] or None; entries besides which ``fetch`` returns zeros, because no choice can depend on them.
        memory: what the method keeps of this layer.
        step: optimizer steps before this one.
        seed: differs between layers and steps.
    """

    name: str
    shape: tuple[int, ...]
    structure: Structure
    index: Tensor
    slot_values: Tensor
    slot_gradient: Tensor | None = None
    fetch: Callable[[], Tensor] | None = None
    growable: Tensor | None = None
    memory: Memory = field(default_factory=dict)
    step: int = 0
    seed: int = 0

    @property
    def numel(self) -> int:
        """Entries of the dense weight."""
        return math.prod(self.shape)

    @property
    def slots(self) -> int:
        """Slots of the layer: the most weights it can hold."""
        return self.index.numel()

    @cached_property
    def in_mask(self) -> Tensor:
        """bool [slots]: which slots hold active weights."""
        return self.index >= 0

    @cached_property
    def positions(self) -> Tensor:
        """int64 [active]: where the active weights sit in the flattened dense weight."""
        return self.index[self.in_mask].long()

    @cached_property
    def values(self) -> Tensor:
        """[active]: the active weights."""
        return self.slot_values.detach()[self.in_mask]

    @cached_property
    def gradient(self) -> Tensor:
        """[active]: their gradient, for methods with ``needs_gradient``."""
        assert self.slot_gradient is not None
        return self.slot_gradient[self.in_mask]

    @cached_property
    def dense_gradient(self) -> Tensor:
        """[numel]: the gradient of every entry of the dense weight, for methods with ``needs_dense_gradient``."""
        assert self.fetch is not None
        return self.fetch().reshape(-1)

    @property
    def active(self) -> int:
        """Number of active weights."""
        return self.positions.numel()

    def mask(self) -> Tensor:
        """The dense mask, bool [numel]."""
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.index.device)
        mask[self.positions] = True
        return mask

    def stream(self, purpose: str) -> int:
        """A seed for one random choice."""
        return criteria.stream(self.seed, purpose)

    def ties(self, purpose: str) -> Tensor:
        """int64 [numel]: who wins among equal scores."""
        return criteria.priority(torch.arange(self.numel, device=self.index.device), self.stream(purpose))
