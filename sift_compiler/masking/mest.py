"""MEST (Yuan et al. 2021): sparse training without any dense gradient, with a number of weights that may swing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import DynamicMethod, Target, drop_granule

Stages = tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class MEST(DynamicMethod):
    """Drop the smallest |w| + λ |g| of the active weights, grow at random.

    The paper updates every 5 epochs: ``delta_t=5 * len(loader)``. Without ``stages`` as many come as go (its MEST); with them an update
    prunes every layer to a lower bound and grows it to an upper one (its elastic mutation), slots in between staying empty.
    """

    gradient_weight: float = 1.0
    """λ, at least 0. The paper leaves it open; 1 is ours."""
    stages: Stages = ()
    """``((from_step, lower, upper), …)``: from that step on every layer is pruned to ``lower`` and grown to ``upper``, shares of the weights it
    was made with, 0 ≤ lower ≤ upper ≤ 1. Steps rise and the first is at most ``begin_step``."""
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("gradient_weight")
        try:
            stages = tuple((int(step), float(lower), float(upper)) for step, lower, upper in self.stages)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"MEST(stages={self.stages!r}) is not possible: expected ((from_step, lower, upper), …)."
            ) from error
        steps = [step for step, _, _ in stages]
        if steps != sorted(set(steps)) or (steps and steps[0] > self.begin_step):
            raise UserError(
                f"MEST(stages={self.stages!r}) is not possible: steps must rise, and the first be at most begin_step ({self.begin_step})."
            )
        if not all(0 <= lower <= upper <= 1 for _, lower, upper in stages):
            raise UserError(f"MEST(stages={self.stages!r}) is not possible: expected 0 ≤ lower ≤ upper ≤ 1.")
        object.__setattr__(self, "stages", stages)

    def targets(self, layers: Sequence[LayerView], step: int) -> list[Target]:
        """The bounds of the present stage, in whole units."""
        if not self.stages:
            return super().targets(layers, step)
        _, lower, upper = [stage for stage in self.stages if stage[0] <= step][-1]
        found = []
        for layer in layers:
            granule = drop_granule(layer)
            low, high = (int(layer.slots * share + 1e-9) // granule * granule for share in (lower, upper))
            survivors = min(layer.active, low)
            found.append(Target(survivors, max(survivors, high)))
        return found

    def drop_scores(self, layer: LayerView) -> Tensor:
        """|w| + λ |g| of each active weight (its Eq. 1)."""
        return criteria.magnitude(layer.values) + self.gradient_weight * criteria.magnitude(layer.gradient)
