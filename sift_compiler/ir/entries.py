"""Entries: a few numbers of a dense weight's shape, where a whole tensor of that shape would be too much to hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """Some entries of a flattened dense tensor.

    Attributes:
        places: int32 [n], distinct positions.
        numbers: [n], what stands there.
        numel: entries of the dense tensor.
        finite: whether the whole tensor, of which these are some entries, was finite.
    """

    places: Tensor
    numbers: Tensor
    numel: int
    finite: bool = True

    @classmethod
    def of(cls, dense: Tensor, places: Tensor) -> Entries:
        """Those of ``dense`` at ``places`` [n]; none if ``dense`` is not finite, which is then all there is to know."""
        flat, finite = dense.reshape(-1), is_finite(dense)
        places = places if finite else places[:0]
        return cls(
            places=places.to(torch.int32), numbers=flat.index_select(0, places), numel=flat.numel(), finite=finite
        )

    def dense(self) -> Tensor:
        """[numel], with 0 everywhere else."""
        return self.numbers.new_zeros(self.numel).index_copy_(0, self.places.long(), self.numbers)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of ``tensor`` is NaN or infinite; one pass without a copy."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(least.isfinite() & most.isfinite())
