"""What follows a choice: the slots of a compact weight that change owner, and what is wiped there.

A compact weight keeps its length. A connection that goes frees its slot, one that comes takes a free slot: ``index[slot]`` is
rewritten in place (runtimes watch the index's version), the value, its gradient and its optimizer state become 0. A connection
dropped and grown again in the same update keeps its slot, hence its value and state (the reference implementation of RigL).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sift_compiler.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Transition:
    """One layer's change of mask.

    Attributes:
        slots: int64 [k], ascending; the slots that change owner.
        positions: int32 [k], ascending; the new owners' positions in the flattened dense weight.
        dropped: weights dropped.
        regrown: those of them that were grown again at once; ``k = dropped - regrown``.
    """

    slots: Tensor
    positions: Tensor
    dropped: int
    regrown: int


def plan(index: Tensor, dropped: Tensor, grown: Tensor) -> Transition:
    """Pair freed slots with new positions.

    Args:
        index: int32 [nnz], the pattern's index.
        dropped: bool [nnz], the slots whose connection goes.
        grown: [count of dropped] positions that come, none of them among the kept ones.
    """
    leaving = index[dropped]
    again = torch.isin(leaving, grown)
    slots = dropped.nonzero().squeeze(1)[~again]
    positions = grown[~torch.isin(grown, leaving)].sort().values.to(torch.int32)
    assert slots.numel() == positions.numel()
    return Transition(slots, positions, leaving.numel(), leaving.numel() - slots.numel())


@torch.no_grad()
def apply(transition: Transition, index: Tensor, values: Tensor, state: Mapping[str, Any]) -> None:
    """Rewrite the slots in place: new position, value 0, gradient 0, optimizer state 0.

    Args:
        index: int32 [nnz].
        values: the parameter [nnz].
        state: the optimizer's state of ``values``; see :func:`per_weight_states`.

    Raises:
        UnsupportedError: the optimizer's state has a layout that is not known. Nothing is changed then.
    """
    states = list(per_weight_states(state, values))
    if transition.slots.numel() == 0:
        return
    index[transition.slots] = transition.positions
    values[transition.slots] = 0
    for tensor in states:
        tensor[transition.slots] = 0
    if values.grad is not None:
        values.grad[transition.slots] = 0


def per_weight_states(state: Mapping[str, Any], values: Tensor) -> Iterator[Tensor]:
    """The tensors in an optimizer's state that hold one number per weight (momentum, exp_avg, exp_avg_sq, …).

    Numbers, None and tensors of no dimension (step counters) belong to the whole parameter and stay.

    Raises:
        UnsupportedError: anything else, since it could not be known what a new weight's state must be.
    """
    for name, entry in state.items():
        if isinstance(entry, Tensor) and entry.shape == values.shape and not entry.is_sparse:
            yield entry
        elif isinstance(entry, Tensor) and entry.dim() == 0:
            continue
        elif entry is not None and not isinstance(entry, int | float | bool | str):
            found = f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
            raise UnsupportedError(
                f"The optimizer's state {name!r} of a sparse weight is {found}; expected a tensor with one entry per "
                f"weight (shape {tuple(values.shape)}), a scalar or a number. What a freshly grown weight's state must "
                "be is not known for this optimizer: use SGD, Adam, AdamW or another of torch.optim with per-weight "
                "states, or keep the masks fixed with sift.Static()."
            )
