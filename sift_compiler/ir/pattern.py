"""Pattern: which entries of a dense weight a sparse layer keeps.

The mask is the pattern, never ``value != 0``: a freshly grown weight is zero and alive.

A layer's tensors never change their length, whatever a mask method does. Each of its *slots* holds one value and one int32 that says
what the value is:

    position p ≥ 0      an active weight: entry p of the flattened dense weight
    EMPTY = -1          nothing: the value is 0, takes no part in anything and gets no gradient; a weight may grow here
    -2 - p              asleep: entry p is not in the mask and takes no part in the forward pass, but has a value and gets its gradient

Methods that prune (GMP, GraNet) or whose number of weights swings (MEST) leave slots empty. *Dense storage* (SR-STE, Top-KAST, SNIP) is a
layer with a slot for every entry, those outside the mask asleep. Whoever reads a mask reads one rule: negative means not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sift_compiler.errors import UserError

EMPTY = -1
"""A slot that holds no weight."""


@dataclass(frozen=True)
class Pattern:
    """The kept entries of a dense weight.

    Attributes:
        shape: dense shape, ``(out, in)`` or ``(out, in / groups, kernel height, kernel width)``.
        index: int32 ``[slots]``, distinct positions in the flattened dense weight, in any order, negative where a slot is not in the
            mask. ``index[i]`` is where ``values[i]`` lives; a mask update rewrites entries in place, so the order carries no meaning.
    """

    shape: tuple[int, ...]
    index: Tensor

    @property
    def numel(self) -> int:
        """Entries of the dense weight."""
        return torch.Size(self.shape).numel()

    @property
    def slots(self) -> int:
        """Length of the index; the kept entries and those slots that are empty or asleep."""
        return self.index.numel()

    @property
    def nnz(self) -> int:
        """Kept entries."""
        return int((self.index >= 0).sum())

    @property
    def positions(self) -> Tensor:
        """Kept entries, int64 ``[nnz]``, in the order of their slots."""
        index = self.index.long()
        return index[index >= 0]

    @property
    def density(self) -> float:
        """Kept share, in [0, 1]."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def sparsity(self) -> float:
        """Removed share, in [0, 1]."""
        return 1 - self.density

    def mask(self) -> Tensor:
        """The dense boolean mask, of ``shape``."""
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.index.device)
        mask[self.positions] = True
        return mask.view(self.shape)

    def check(self) -> None:
        """Raise UserError unless the index is int32, one-dimensional, within range and free of repetitions, sleeping entries included."""
        index = self.index
        if index.dtype != torch.int32 or index.dim() != 1:
            raise UserError(
                f"A pattern's index must be int32 of one dimension, not {index.dtype} of shape {tuple(index.shape)}."
            )
        entries = entry_of(index)
        entries = entries[entries != EMPTY]
        if entries.numel() and not (int(entries.min()) >= 0 and int(entries.max()) < self.numel):
            raise UserError(
                f"A pattern's index must lie in [0, {self.numel}) for the dense shape {self.shape}; below 0 stand only {EMPTY} (an empty "
                "slot) and -2 - p (entry p, asleep)."
            )
        if torch.unique(entries).numel() != entries.numel():
            raise UserError(f"A pattern's index for the dense shape {self.shape} names an entry twice.")

    @classmethod
    def random(cls, shape: tuple[int, ...], nnz: int, generator: torch.Generator | None = None) -> Pattern:
        """Exactly ``nnz`` entries drawn uniformly without replacement, in ascending order."""
        numel = torch.Size(shape).numel()
        if not 0 <= nnz <= numel:
            raise UserError(f"Cannot keep {nnz} of the {numel} entries of a weight of shape {shape}.")
        chosen = torch.randperm(numel, generator=generator)[:nnz]
        return cls(shape, chosen.sort().values.to(torch.int32))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Pattern:
        """The pattern of a dense mask; non-zero means kept."""
        index = mask.reshape(-1).nonzero().squeeze(1).to(torch.int32)
        return cls(tuple(mask.shape), index)


def entry_of(index: Tensor) -> Tensor:
    """int64, of the shape of ``index``: the entry a slot stands for, active or asleep, and ``EMPTY`` for an empty slot."""
    index = index.long()
    return torch.where(index < EMPTY, -2 - index, index)


def asleep(entries: Tensor) -> Tensor:
    """What an index holds for ``entries`` that are asleep, int32."""
    return (-2 - entries.long()).to(torch.int32)


def kept_entries(numel: int, sparsity: float) -> int:
    """Active entries of a weight of ``numel`` entries: the removed ones are ``floor(sparsity * numel)`` (RigL's count).

    The product is nudged by 1e-9 of itself, so that .8 * 10 counts 8 zeros in spite of binary fractions.
    """
    return numel - min(numel, int(sparsity * numel * (1 + 1e-12) + 1e-9))
