"""What follows a choice: the slots of a compact weight that change owner, and what is wiped there.

A compact weight keeps its length. A connection that goes frees its slot, one that comes takes a free slot: ``index[slot]`` is
rewritten in place (runtimes watch the index's version), the value, its gradient and its optimizer state become 0. A connection
dropped and grown again in the same update keeps its slot, hence its value and state (the reference implementation of RigL). Where
fewer come than go slots stay empty, and are the first to be filled when more come than go.

In dense storage nothing is wiped: entries fall asleep and wake up with the value they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sift_compiler.errors import UnsupportedError
from sift_compiler.ir.pattern import EMPTY, asleep, entry_of
from sift_compiler.masking.order_statistics import where

_LEAVES, _STAYS = 1, 2


@dataclass(frozen=True, eq=False)
class Transition:
    """One layer's change of mask.

    Attributes:
        slots: int64 [k], the slots that change.
        entries: int32 [k], what their index becomes.
        wipe: whether value, gradient and optimizer state of these slots become 0.
        active: active weights afterwards.
        dropped: weights dropped.
        grown: weights grown.
        regrown: those that were dropped and grown again at once, counted in both.
    """

    slots: Tensor
    entries: Tensor
    wipe: bool
    active: int
    dropped: int
    grown: int
    regrown: int


def plan(index: Tensor, kept: Tensor, grown: Tensor) -> Transition:
    """Pair free slots with new positions.

    Args:
        index: int32 [slots], nothing asleep.
        kept: bool [active], in the order of the slots; the others are dropped.
        grown: distinct positions that come, none of them among the kept ones and no more than there are free slots.
    """
    dropped = where(~kept)
    if kept.numel() < index.numel():
        dropped = where(index >= 0).index_select(0, dropped)
    leaving = index.index_select(0, dropped).long()
    freed, coming = _moving(dropped, leaving, grown)
    lacking = max(0, coming.numel() - freed.numel())
    slots = torch.cat([freed, where(index == EMPTY)[:lacking]]) if lacking else freed
    assert coming.numel() <= slots.numel()
    entries = torch.full_like(slots, EMPTY, dtype=torch.int32)
    entries[: coming.numel()] = coming
    regrown = leaving.numel() - freed.numel()
    count = kept.numel() - leaving.numel() + grown.numel()
    return Transition(slots, entries, True, count, leaving.numel(), grown.numel(), regrown)


def _moving(dropped: Tensor, leaving: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Without what is in both: the slots that are freed, and the positions that come, ascending.

    Args:
        dropped: int64 [n], slots.
        leaving: int64 [n], their positions.
        grown: int64 [m], distinct positions.
    """
    if not bool((grown[1:] > grown[:-1]).all()):
        grown = grown.sort().values
    if not leaving.numel() or not grown.numel():
        return dropped, grown
    # Marks instead of sorted sets: an entry of the dense weight takes a byte.
    marks = torch.zeros(max(int(leaving.max()), int(grown[-1])) + 1, dtype=torch.uint8, device=grown.device)
    marks.index_fill_(0, leaving, _LEAVES)
    found = marks.index_select(0, grown)
    again = grown.index_select(0, where(found == _LEAVES))
    if not again.numel():
        return dropped, grown
    marks.index_fill_(0, again, _STAYS)
    freed = where(marks.index_select(0, leaving) == _LEAVES)
    return dropped.index_select(0, freed), grown.index_select(0, where(found != _LEAVES))


def switch(index: Tensor, mask: Tensor) -> Transition:
    """Wake and put to sleep in dense storage.

    Args:
        index: int32 [numel], a slot for every entry.
        mask: bool [numel], the new mask.
    """
    entries = entry_of(index)
    wanted = mask[entries]
    changed = (wanted != (index >= 0)).nonzero().squeeze(1)
    moved = entries[changed]
    grown = int(wanted[changed].sum())
    new = torch.where(wanted[changed], moved.to(torch.int32), asleep(moved))
    return Transition(changed, new, False, int(mask.sum()), changed.numel() - grown, grown, 0)


@torch.no_grad()
def apply(transition: Transition, index: Tensor, values: Tensor, state: Mapping[str, Any]) -> None:
    """Rewrite the slots in place: new entry and, in compact storage, value 0, gradient 0, optimizer state 0.

    Args:
        index: int32 [slots].
        values: the parameter [slots].
        state: the optimizer's state of ``values``; see :func:`per_weight_states`.

    Raises:
        UnsupportedError: the optimizer's state has a layout that is not known. Nothing is changed then.
    """
    states = list(per_weight_states(state, values)) if transition.wipe else []
    if transition.slots.numel() == 0:
        return
    index.index_copy_(0, transition.slots, transition.entries)
    if not transition.wipe:
        return
    for tensor in (values, *states, *(() if values.grad is None else (values.grad,))):
        tensor.index_fill_(0, transition.slots, 0)


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
