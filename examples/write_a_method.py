"""A mask method of your own: one small class.

A method answers four questions. *When* masks move and *how many* weights go and come are options that ``DynamicMethod`` brings (``delta_t``,
``end_step``, ``drop_fraction``, ``decay``, ``seed``). *Which* are two functions: the smallest ``drop_scores`` go, the largest ``grow_scores``
come. *What follows* (exact counts, the structure of the mask, optimizer state, all ranks alike, saving and resuming) is taken care of.

Until you change something, ``DynamicMethod`` is SET. Run it: python examples/write_a_method.py
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import sift_compiler as sift
from sift_compiler.masking.layer import LayerView


@dataclass(frozen=True, kw_only=True)
class Sensitivity(sift.DynamicMethod):
    """Drop what the loss would miss least, |w · g|; grow the largest gradients, with some chance for all others."""

    chance: float = 0.1
    """Weight of chance against the gradient, at least 0."""
    needs_gradient: ClassVar[bool] = True
    needs_dense_gradient: ClassVar[bool] = True

    def drop_scores(self, layer: LayerView) -> Tensor:
        """One score for each active weight."""
        return (layer.values * layer.gradient).abs()

    def grow_scores(self, layer: LayerView, candidates: Tensor) -> Tensor:
        """One score for each position where a weight may grow."""
        gradient = layer.dense_gradient[candidates].abs()
        draw = torch.rand(len(candidates), generator=torch.Generator().manual_seed(layer.stream("chance")))
        return gradient + self.chance * gradient.mean() * draw.to(gradient)


def main(steps: int = 60) -> sift.nn.SparseLinear:
    """Train a small network with the method and return its first layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        sift.SparseLinear(32, 64, sparsity=0.75, structure=sift.NM(1, 4)), nn.ReLU(), sift.SparseLinear(64, 4, sparsity=0.75)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    masks = sift.schedule(model, optimizer, Sensitivity(delta_t=10, end_step=45, drop_fraction=0.3))
    masks.on_update(lambda update: logging.info("step %d: %d weights moved", update.step, update.dropped))
    x = torch.randn(256, 32)
    y = x[:, :4].argmax(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    logging.info("loss %.3f", loss.item())
    layer = model[0]
    assert isinstance(layer, sift.SparseLinear)
    return layer


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
