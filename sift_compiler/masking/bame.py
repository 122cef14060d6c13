"""Block-aware mask evolution in the style of BAME (ICML 2025), for N:M masks without dense weights.

The paper's code is not public; this is a reconstruction from its description, and every choice of ours is an option or said here:

- Until ``adapt_from``, N:M masks move as RigL moves them (the paper asks for a phase of ordinary gradient and magnitude pruning).
- Loss-aware mask adaptation: by first-order Taylor expansion dropping an active weight w costs |w · g|. Reviving an entry is worth
  |g| · w̄, with w̄ the layer's mean active magnitude: as if it grew to that size against its gradient (ours; |g| alone has another unit).
  In every block of m the dearest entries to revive are paired with the cheapest to drop, as long as a swap is expected to lower the loss.
- Oscillation-aware block freezing: a block oscillates when its mask equals the one two checks ago and differs from the last. Blocks are
  ranked by gain / (1 + oscillations), the first ``commit`` of those that gain are changed, blocks with ``freeze_after`` or more
  oscillations never again. The share falls as ``decay`` says (ours): on the gradient of a batch nearly every block expects a gain, so a
  share that stays would move masks as much at the end as at the beginning, and new weights would be swapped out before they have grown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.ir.entries import Entries
from sift_compiler.ir.mask_structure import NM, best_units
from sift_compiler.masking import criteria, needed, schedules
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import Choice, DynamicMethod, Kinds, Target, chosen


@dataclass(frozen=True, kw_only=True)
class BAME(DynamicMethod):
    """N:M masks whose blocks swap weights by expected change of the loss; blocks that oscillate are frozen. A reconstruction, see above."""

    adapt_from: int = 0
    """First optimizer step of loss-aware adaptation; before it masks move as RigL moves them."""
    commit: float = 0.5
    """Share of the blocks with a gain that are changed at a check, in [0, 1], at least one; at step 0, it falls as ``decay`` says."""
    freeze_after: int = 3
    """Oscillations from which on a block is frozen, at least 1."""
    needs_dense_gradient: ClassVar[bool] = True
    uses_gradient_size: ClassVar[bool] = False
    structures: ClassVar[Kinds] = (NM,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("commit")
        for field, least in (("adapt_from", 0), ("freeze_after", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(
                    f"BAME({field}={value!r}) is not possible: expected a whole number of at least {least}."
                )

    def grow_scores(self, layer: LayerView, candidates: Tensor) -> Tensor:
        """|g| at each candidate, in the first phase."""
        return criteria.magnitude(layer.dense_gradient[candidates])

    def reduces(self, layer: LayerView) -> bool:
        """Always."""
        return True

    def needed(self, layer: LayerView, gradient: Tensor) -> Entries:
        """g of the active weights, and of every block the n largest |g| elsewhere: no more can be swapped in."""
        if layer.step < self.adapt_from:
            (target,) = self.targets([layer], layer.step)
            return needed.by_magnitude(layer, gradient, target.active - target.survivors)
        layout = layer.structure.layout(layer.shape).to(gradient.device)[..., 0]
        rooms = torch.full((len(layout),), layer.structure.most(layer.shape), device=gradient.device)
        free = ~layer.mask()[layout]
        best = best_units(criteria.magnitude(gradient)[layout], free, rooms, free.numel())
        return Entries.of(gradient, torch.cat([layer.positions, layout[best]]))

    def choose(self, layer: LayerView, target: Target) -> Choice:
        """RigL's choice at first, swaps within blocks later."""
        if layer.step < self.adapt_from:
            return super().choose(layer, target)
        layout = layer.structure.layout(layer.shape).to(layer.index.device)[..., 0]
        mask = layer.mask()[layout]
        gain, swapped = swaps(layer, layout, mask)
        oscillations = layer.memory.setdefault("oscillations", torch.zeros_like(gain, dtype=torch.int32))
        worth = (gain > 0) & (oscillations < self.freeze_after)
        share = schedules.drop_fraction(layer.step, initial=self.commit, end=self.end_step, decay=self.decay)
        count = min(int(worth.sum()), max(1, int(share * int(worth.sum()) + 1e-9)))
        score = torch.where(worth, gain / (1 + oscillations), -1.0)
        blocks = torch.arange(len(gain), device=gain.device)
        committed = criteria.largest(score, blocks, count, layer.stream("commit"))
        new = torch.where(committed[:, None], swapped, mask)
        self._notice(layer, new)
        dense = torch.zeros(layer.numel, dtype=torch.bool, device=new.device)
        dense[layout.reshape(-1)] = new.reshape(-1)
        return chosen(layer, dense)

    def _notice(self, layer: LayerView, mask: Tensor) -> None:
        """Count blocks that are back where they were two checks ago."""
        memory = layer.memory
        if "before" in memory:
            back = (mask == memory["before"]).all(1) & (mask != memory["last"]).any(1)
            memory["oscillations"] += back.int()
        if "last" in memory:
            memory["before"] = memory["last"]
        memory["last"] = mask


def swaps(layer: LayerView, layout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What swapping pairs inside blocks is expected to gain.

    Args:
        layer: the layer, with a dense gradient.
        layout: int64 [blocks, m], positions.
        mask: bool [blocks, m], kept entries.

    Returns:
        The expected fall of the loss [blocks], at least 0, and the masks after the swaps, bool [blocks, m].
    """
    gradient = layer.dense_gradient.double()
    weight = torch.zeros(layer.numel, dtype=torch.float64, device=mask.device)
    weight[layer.positions] = layer.values.double()
    reach = weight.abs().sum() / max(1, layer.active)
    costs = (weight * gradient).abs()[layout].masked_fill(~mask, torch.inf)
    sizes = gradient.abs()[layout].masked_fill(mask, -torch.inf)
    cost, leaving = costs.sort(dim=1, stable=True)
    # Sorted before they are multiplied, which may round two to the same.
    size, coming = sizes.sort(dim=1, descending=True, stable=True)
    gain = torch.where(size.isfinite(), size * reach, -torch.inf)
    # Costs rise and gains fall along a block, so the pairs that pay come first.
    pays = (gain > cost) & cost.isfinite() & gain.isfinite()
    total = torch.where(pays, gain - cost, 0.0).sum(1)
    swapped = mask.clone()
    swapped.scatter_(1, leaving, swapped.gather(1, leaving) & ~pays)
    swapped.scatter_(1, coming, swapped.gather(1, coming) | pays)
    return total, swapped
