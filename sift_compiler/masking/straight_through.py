"""Methods that train weights outside the mask too, in dense storage: SR-STE and Top-KAST."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.ir.mask_structure import NM, Structure, TransposableNM, Unstructured
from sift_compiler.ir.pattern import entry_of, kept_entries
from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import Choice, Kinds, MovingMethod, Target, chosen

_NEVER = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class _StraightThrough(MovingMethod):
    penalty: float = 0.0
    """Weight of the regulariser, at least 0."""
    end_step: int = _NEVER
    """Masks rest from this optimizer step on; by custom never."""
    storage: ClassVar = "dense"
    changes_steps: ClassVar[bool] = True
    keeps_history: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("penalty")

    def targets(self, layers: Sequence[LayerView], step: int) -> list[Target]:
        """As many as ever."""
        return [Target(layer.active, layer.active) for layer in layers]

    def choose(self, layer: LayerView, target: Target) -> Choice:
        """The largest magnitudes of all weights, those that sleep too."""
        scores = _by_entry(layer, criteria.magnitude(layer.slot_values))
        return chosen(layer, largest_mask(layer.structure, scores.view(layer.shape), target.active, layer.seed))


@dataclass(frozen=True, kw_only=True)
class SRSTE(_StraightThrough):
    """SR-STE (Zhou et al. 2021): N:M by projection of the magnitudes on every step, from a dense start.

    Every entry gets its gradient as if it were in the mask (straight through); those outside are pulled to zero by ``penalty`` · w, added
    to the gradient (its Eq. 8 and 9). The mask that is drawn serves for the first step only.
    """

    penalty: float = 2e-4
    """λ of the paper."""
    delta_t: int = 1
    """Optimizer steps between two projections."""
    structures: ClassVar[Kinds] = (NM, TransposableNM)

    def before_step(self, layer: LayerView, scale: float) -> None:
        """g ← g + λ (1 - m) ⊙ w."""
        if layer.slot_gradient is not None:
            layer.slot_gradient.add_(layer.slot_values * ~layer.in_mask, alpha=self.penalty * scale)


@dataclass(frozen=True, kw_only=True)
class TopKAST(_StraightThrough):
    """Top-KAST (Jayakumar et al. 2020): forward with the largest weights A, backward with the larger set B of largest weights.

    The mask of a layer is A and keeps its number of weights; weights in B get their gradient, all others rest as they are and may come back
    into B when the others fall below them. No dense gradient is used (the reference path computes one; kernels need not). The
    regulariser is ``penalty`` · w on A and ``penalty`` · w / D on B outside A, D the density of A (its Sec. 2.3), added to the gradient.
    Give the optimizer no weight decay of its own: that would act on resting weights too.
    """

    penalty: float = 1e-4
    """Weight of the L2 regulariser; the paper leaves it open, 1e-4 is ours."""
    backward_sparsity: float = 0.5
    """Share of a layer's weights that get no gradient, in [0, 1]; where it exceeds the layer's sparsity B is A."""
    delta_t: int = 100
    """Optimizer steps between two choices of A and B; the paper finds 100 as good as 1."""
    structures: ClassVar[Kinds] = (Unstructured,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("backward_sparsity")

    def begin(self, layer: LayerView) -> None:
        """B is the mask there is, filled up with the largest."""
        layer.memory["backward"] = self._backward(layer, layer.mask())

    def before_step(self, layer: LayerView, scale: float) -> None:
        """g ← (g + λ w (A + (B - A) / D)) on B, 0 elsewhere."""
        if layer.slot_gradient is None:
            return
        in_backward = layer.memory["backward"]
        density = max(layer.active, 1) / layer.numel
        pull = layer.slot_values * layer.in_mask + layer.slot_values * (in_backward & ~layer.in_mask) / density
        layer.slot_gradient.mul_(in_backward).add_(pull, alpha=self.penalty * scale)

    def choose(self, layer: LayerView, target: Target) -> Choice:
        """A and B anew; a weight that leaves B forgets its optimizer state, so that it rests."""
        choice = super().choose(layer, target)
        forward = torch.zeros(layer.numel, dtype=torch.bool, device=layer.index.device)
        forward[layer.positions[choice.kept]] = True
        forward[choice.grown] = True
        before = layer.memory["backward"]
        layer.memory["backward"] = self._backward(layer, forward)
        return Choice(choice.kept, choice.grown, forgotten=before & ~layer.memory["backward"])

    def _backward(self, layer: LayerView, forward: Tensor) -> Tensor:
        """bool [slots]: the slots of ``forward`` [numel] and of the largest magnitudes besides."""
        count = max(int(forward.sum()), kept_entries(layer.numel, self.backward_sparsity))
        scores = _by_entry(layer, criteria.magnitude(layer.slot_values)).float().masked_fill(forward, torch.inf)
        mask = largest_mask(layer.structure, scores.view(layer.shape), count, layer.seed).reshape(-1)
        return mask[entry_of(layer.index)]


def largest_mask(structure: Structure, scores: Tensor, count: int, seed: int) -> Tensor:
    """The mask, bool of the shape of ``scores``, of the ``count`` largest that the structure allows; ties by ``seed``."""
    everywhere = torch.arange(scores.numel(), device=scores.device)
    if isinstance(structure, Unstructured):
        return criteria.largest(scores.reshape(-1), everywhere, count, seed).view(scores.shape)
    return structure.project(scores, count, criteria.priority(everywhere, seed))


def _by_entry(layer: LayerView, by_slot: Tensor) -> Tensor:
    """[numel] from [slots]; in dense storage every entry has a slot."""
    entries = entry_of(layer.index)
    if entries.numel() != layer.numel:
        raise UserError(f"Layer {layer.name!r} has no dense storage any more.")
    return torch.zeros_like(by_slot).index_copy_(0, entries, by_slot)
