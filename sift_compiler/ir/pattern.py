"""Pattern: which entries of a dense weight a sparse layer keeps.

The mask is the pattern, never ``value != 0``: a freshly grown weight is zero and alive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sift_compiler.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """The kept entries of a dense weight.

    Attributes:
        shape: dense shape, ``(out, in)`` or ``(out, in / groups, kernel height, kernel width)``.
        index: int32 ``[nnz]``, distinct positions in the flattened dense weight, in any order. ``index[i]`` is where
            ``values[i]`` lives; a mask update rewrites entries in place, so the order carries no meaning.
    """

    shape: tuple[int, ...]
    index: Tensor

    @property
    def numel(self) -> int:
        """Entries of the dense weight."""
        return torch.Size(self.shape).numel()

    @property
    def nnz(self) -> int:
        """Kept entries."""
        return self.index.numel()

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
        mask[self.index.long()] = True
        return mask.view(self.shape)

    def check(self) -> None:
        """Raise UserError unless the index is int32, one-dimensional, within range and free of repetitions."""
        index = self.index
        if index.dtype != torch.int32 or index.dim() != 1:
            raise UserError(
                f"A pattern's index must be int32 of one dimension, not {index.dtype} of shape {tuple(index.shape)}."
            )
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.numel):
            raise UserError(f"A pattern's index must lie in [0, {self.numel}) for the dense shape {self.shape}.")
        if torch.unique(index).numel() != index.numel():
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


def kept_entries(numel: int, sparsity: float) -> int:
    """Active entries of a weight of ``numel`` entries: the removed ones are ``floor(sparsity * numel)`` (RigL's count).

    The product is nudged by 1e-9 of itself, so that .8 * 10 counts 8 zeros in spite of binary fractions.
    """
    return numel - min(numel, int(sparsity * numel * (1 + 1e-12) + 1e-9))
