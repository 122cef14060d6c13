"""What a mask method sees of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sift_compiler.ir.entries import Entries
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
        entries: those entries of the dense gradient that a choice can depend on, if only they were kept; ``fetch`` returns zeros elsewhere.
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
    entries: Entries | None = None
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
    def full(self) -> bool:
        """Whether every slot holds an active weight."""
        return not self.slots or int(self.index.min()) >= 0

    @cached_property
    def positions(self) -> Tensor:
        """int64 [active]: where the active weights sit in the flattened dense weight."""
        return (self.index if self.full else self.index[self.in_mask]).long()

    @cached_property
    def values(self) -> Tensor:
        """[active]: the active weights."""
        values = self.slot_values.detach()
        return values if self.full else values[self.in_mask]

    @cached_property
    def gradient(self) -> Tensor:
        """[active]: their gradient, for methods with ``needs_gradient``."""
        assert self.slot_gradient is not None
        return self.slot_gradient if self.full else self.slot_gradient[self.in_mask]

    @cached_property
    def dense_gradient(self) -> Tensor:
        """[numel]: the gradient of every entry of the dense weight, for methods with ``needs_dense_gradient``."""
        assert self.fetch is not None
        return self.fetch().reshape(-1)

    @cached_property
    def growable(self) -> Tensor | None:
        """int64 [n], ascending or not: where ``entries`` stand; None if all may grow."""
        return None if self.entries is None else self.entries.places.long()

    def gradient_at(self, positions: Tensor) -> Tensor:
        """The dense gradient at ``positions`` int64 [n]; without a dense tensor if these are :attr:`growable` themselves."""
        if self.entries is not None and positions is self.growable:
            return self.entries.numbers
        return self.dense_gradient[positions]

    @property
    def active(self) -> int:
        """Number of active weights."""
        return self.positions.numel()

    def mask(self) -> Tensor:
        """The dense mask, bool [numel]."""
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.index.device)
        return mask.index_fill_(0, self.positions, True)

    def stream(self, purpose: str) -> int:
        """A seed for one random choice."""
        return criteria.stream(self.seed, purpose)

    def ties(self, purpose: str) -> Tensor:
        """int64 [numel]: who wins among equal scores."""
        return criteria.priority(torch.arange(self.numel, device=self.index.device), self.stream(purpose))
