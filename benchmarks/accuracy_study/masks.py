"""How the masks of a run move, and what they did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sift_compiler as sift
from sift_compiler.masking.history import MaskUpdate
from sift_compiler.nn import SparseLayer
from sift_compiler.options import MaskMethod
from sift_compiler.schedule import MaskScheduler

from .settings import Cell

MOVING_SHARE = 0.75
"""Share of training after which masks rest, as in the papers of RigL and Sparse-IFT."""


def mask_method(cell: Cell, steps: int) -> MaskMethod:
    """The method of a run of ``steps`` optimizer steps. All that move have the same update steps.

    BAME-style moves as RigL does for the first third of its updates and swaps within blocks afterwards; its other options and those of
    BiDST-style are the defaults.
    """
    end = int(MOVING_SHARE * steps)
    when: dict[str, Any] = {
        "seed": cell.seed, "end_step": end, "delta_t": max(1, end // cell.recipe.mask_updates)
    }  # fmt: skip
    share = {"drop_fraction": cell.recipe.drop_fraction}
    match cell.method:
        case "static" | "static-nm":
            return sift.Static(seed=cell.seed)
        case "set":
            return sift.SET(**when, **share)
        case "rigl":
            return sift.RigL(**when, **share)
        case "bame":
            return sift.BAME(**when, **share, adapt_from=end // 3)
        case "bidst":
            return sift.BiDST(**when)
    raise AssertionError(f"{cell.method} has no masks")


class MaskWatch:
    """Follows the masks of a network through all updates."""

    def __init__(self, model: nn.Module, masks: MaskScheduler) -> None:
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLayer)}
        self._masks = masks
        self._first = self._now()
        self._ever = self._now()
        self._counts = {name: int(mask.sum()) for name, mask in self._first.items()}
        self._updates: list[MaskUpdate] = []
        self._exact = True
        masks.on_update(self._watch)

    def _now(self) -> dict[str, Tensor]:
        return {name: layer.pattern.mask() for name, layer in self._layers.items()}

    def _watch(self, update: MaskUpdate) -> None:
        now = self._now()
        self._updates.append(update)
        self._exact &= all(int(mask.sum()) == self._counts[name] for name, mask in now.items())
        for name, mask in now.items():
            self._ever[name] |= mask

    @torch.no_grad()
    def statistics(self) -> dict[str, Any]:
        """Counts and shares over all sparse layers together.

        ``replaced``: weights that came and were not there just before, of all updates, over kept weights. ``explored``: entries that were
        ever kept, over all (Liu et al. 2021, R_s). ``last_over_first``: intersection over union of the last masks and the first.
        """
        last, active = self._now(), sum(self._counts.values())
        common = sum(int((last[name] & mask).sum()) for name, mask in self._first.items())
        came = sum(layer.grown - layer.regrown for update in self._updates for layer in update.layers)
        entries = sum(mask.numel() for mask in last.values())
        return {
            "kept": active,
            "sparsity": 1 - active / entries,
            "structures": sorted({str(layer.structure) for layer in self._layers.values()}),
            "updates": len(self._updates),
            "skipped": dict(self._masks.skipped),
            "counts_exact": self._exact,
            "replaced": came / active,
            "explored": sum(int(mask.sum()) for mask in self._ever.values()) / entries,
            "last_over_first": common / (2 * active - common),
        }
