"""A method is a small combination of criteria; RigL is SET with one of them changed."""

from __future__ import annotations

import torch
from torch import Tensor

from sift_compiler.errors import UnsupportedError
from sift_compiler.masking import criteria, schedules, transition
from sift_compiler.masking.transition import Transition
from sift_compiler.options import SET, MaskMethod, RigL, Static


class RandomGrowth:
    """Sparse evolutionary training (Mocanu et al. 2018): the smallest magnitudes go, random connections come."""

    needs_gradient = False
    """Whether growth is scored on the dense gradient."""

    def drop_scores(self, values: Tensor) -> Tensor:
        """Score [nnz] of each active weight; the smallest go."""
        return criteria.magnitude(values)

    def grow_scores(self, candidates: Tensor, gradient: Tensor | None, seed: int) -> Tensor:
        """Score [n] of each position in ``candidates`` [n]; the largest come."""
        return criteria.priority(candidates, seed)


class GradientGrowth(RandomGrowth):
    """RigL (Evci et al. 2020, Alg. 1): connections come where the dense gradient is largest."""

    needs_gradient = True

    def grow_scores(self, candidates: Tensor, gradient: Tensor | None, seed: int) -> Tensor:
        """|g| at each candidate; ``gradient`` has the dense weight's shape and is the mean over all ranks."""
        assert gradient is not None
        return criteria.magnitude(gradient).reshape(-1)[candidates]


def combination(method: MaskMethod) -> RandomGrowth | None:
    """The criteria of ``method``; None if its masks never move.

    Raises:
        UnsupportedError: a method that has none here.
    """
    if isinstance(method, RigL):
        return GradientGrowth()
    if isinstance(method, SET):
        return RandomGrowth()
    if isinstance(method, Static):
        return None
    raise UnsupportedError(f"The mask method {method!r} has no criteria. Known: RigL, SET, Static.")


def fraction_at(method: MaskMethod, step: int) -> float:
    """Share of the active weights that ``method`` replaces at optimizer step ``step``."""
    assert isinstance(method, SET | RigL)
    return schedules.drop_fraction(step, initial=method.drop_fraction, end=method.end_step, decay=method.decay)


@torch.no_grad()
def propose(
    criterion: RandomGrowth, index: Tensor, values: Tensor, gradient: Tensor | None, numel: int, count: int,
    seed: int, *, exclude_just_dropped: bool = False,
) -> Transition:  # fmt: skip
    """Choose what one layer drops and grows. Nothing is changed.

    Args:
        criterion: what drops and what grows.
        index: int32 [nnz], positions of the active weights.
        values: [nnz], finite.
        gradient: the dense gradient, of the dense weight's shape, if ``criterion`` needs it.
        numel: entries of the dense weight.
        count: weights to replace; fewer if there is no room for as many.
        seed: a seed of :func:`criteria.stream`, one per layer and update.
        exclude_just_dropped: forbid that a weight dropped now is grown now.
    """
    nnz = index.numel()
    count = min(count, numel - nnz if exclude_just_dropped else nnz)
    dropped = criteria.smallest(criterion.drop_scores(values), index, count, criteria.stream(seed, "drop"))
    taken = torch.zeros(numel, dtype=torch.bool, device=index.device)
    taken[(index if exclude_just_dropped else index[~dropped]).long()] = True
    candidates = (~taken).nonzero().squeeze(1)
    grow = criteria.stream(seed, "grow")
    grown = candidates[criteria.largest(criterion.grow_scores(candidates, gradient, grow), candidates, count, grow)]
    return transition.plan(index, dropped, grown)
