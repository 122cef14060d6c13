"""Bi-level sparse training in the style of BiDST (ICML 2024): masks are learnt, as scores, beside the weights.

Only a README is public; this is a reconstruction. Upper level min_ψ ℓ(ψ ⊙ θ*), lower level θ* = argmin ℓ(ψ ⊙ θ) + γ/2 ‖θ‖²; with second-order
terms 0 the implicit gradient is that of BiP (Zhang et al. 2022, Eq. 7), with g the gradient for ψ ⊙ θ:

    ψ ← ψ - β (θ - g / γ) ⊙ g

Scores ψ exist for the active weights and a restricted set of candidates only. The binary mask, the largest ψ that the structure allows,
passes gradients straight through; Gumbel noise, drawn anew at every check, relaxes it. The topology is made binary again only when
at least ``change`` of the weights would move. Ours: ψ starts at |w|, at 0 for candidates, which are those with the largest |g|; ψ is
learnt every ``delta_t`` steps, so that its cost stays near 1 % of training; γ and β are chosen by eye.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.ir.entries import Entries
from sift_compiler.ir.mask_structure import NM, Unstructured, best_units, scattered
from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.needed import largest_elsewhere
from sift_compiler.masking.rule import Choice, Kinds, MovingMethod, Target, chosen


@dataclass(frozen=True, kw_only=True)
class BiDST(MovingMethod):
    """Masks by learnt scores of the active weights and some candidates. A reconstruction, see above."""

    candidates: float = 0.5
    """Candidates besides the active weights, as a share of these, at least 0."""
    rate: float = 1.0
    """β, the rate at which scores learn, at least 0."""
    gamma: float = 0.01
    """γ, weight of the lower level's regulariser, above 0."""
    noise: float = 0.0
    """Scale of the Gumbel noise, as a share of the mean score of the active weights, at least 0."""
    change: float = 0.01
    """Share of the active weights that must want to move before the mask does, in [0, 1]."""
    needs_dense_gradient: ClassVar[bool] = True
    structures: ClassVar[Kinds] = (Unstructured, NM)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("candidates", "rate", "gamma", "noise"):
            self._check_positive(field)
        self._check_share("change")
        if self.gamma == 0:
            raise UserError("BiDST(gamma=0) is not possible: gamma must be above 0.")

    def targets(self, layers: list[LayerView], step: int) -> list[Target]:  # type: ignore[override]
        """As many as ever."""
        return [Target(layer.active, layer.active) for layer in layers]

    def reduces(self, layer: LayerView) -> bool:
        """Always."""
        return True

    def needed(self, layer: LayerView, gradient: Tensor) -> Entries:
        """g of all that has a score, and the largest |g| elsewhere, from which new candidates are taken: twice where the first are, too."""
        members, times = layer.memory.get("members"), 1
        if members is None:
            members, times = layer.positions, 2
        new = largest_elsewhere(gradient, members, times * self._wanted(layer), layer.stream("candidates"))
        return Entries.of(gradient, torch.cat([members, new]))

    def _wanted(self, layer: LayerView) -> int:
        return int(self.candidates * layer.active + 1e-9)

    def choose(self, layer: LayerView, target: Target) -> Choice:
        """Learn the scores; move the mask if enough of it wants to."""
        members, scores = self._learnt(layer)
        mask = self._binary(layer, members, scores, target.active)
        now = layer.mask()
        if int((mask & ~now).sum()) < max(1, self.change * layer.active):
            mask = now
        self._remember(layer, mask, members, scores)
        return chosen(layer, mask)

    def _learnt(self, layer: LayerView) -> tuple[Tensor, Tensor]:
        """Positions int64 [n] that have scores, and the scores after one step."""
        members = layer.memory.get("members")
        scores = layer.memory.get("scores")
        if members is None or scores is None:
            members, scores = layer.positions, criteria.magnitude(layer.values).double()
            members, scores = self._with_candidates(layer, layer.mask(), members, scores)
        gradient = layer.dense_gradient.double()[members]
        weight = torch.zeros(layer.numel, dtype=torch.float64, device=gradient.device)
        weight[layer.positions] = layer.values.double()
        return members, scores - self.rate * (weight[members] - gradient / self.gamma) * gradient

    def _binary(self, layer: LayerView, members: Tensor, scores: Tensor, count: int) -> Tensor:
        """bool [numel]: the largest scores, with noise, that the structure allows."""
        if self.noise:
            uniform = (criteria.priority(members, layer.stream("noise")).double() / 2.0**64 + 0.5).clamp(
                1e-12, 1 - 1e-12
            )
            scores = scores - self.noise * scores.abs().mean() * (-uniform.log()).log()
        layout = layer.structure.layout(layer.shape).to(members.device)
        dense = torch.zeros(layer.numel, dtype=torch.float64, device=members.device)
        dense[members] = scores
        allowed = torch.zeros_like(dense, dtype=torch.bool).index_fill(0, members, True)
        rooms = torch.full((len(layout),), layer.structure.most(layer.shape), device=members.device)
        ties = criteria.priority(layout[..., 0], layer.stream("ties"))
        best = best_units(dense[layout[..., 0]], allowed[layout[..., 0]], rooms, count, ties)
        return scattered(best, layout, layer.shape).reshape(-1)

    def _remember(self, layer: LayerView, mask: Tensor, members: Tensor, scores: Tensor) -> None:
        """Scores of the active weights stay; the candidates are chosen anew when the mask moved."""
        if not torch.equal(mask, layer.mask()) or "members" not in layer.memory:
            active = mask[members]
            members, scores = self._with_candidates(layer, mask, members[active], scores[active])
        layer.memory["members"], layer.memory["scores"] = members, scores

    def _with_candidates(
        self, layer: LayerView, mask: Tensor, members: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        free = (~mask).nonzero().squeeze(1)
        count = min(free.numel(), self._wanted(layer))
        size = criteria.magnitude(layer.dense_gradient[free])
        new = free[criteria.largest(size, free, count, layer.stream("candidates"))]
        return torch.cat([members, new]), torch.cat([scores, scores.new_zeros(count)])
