"""The study's networks: a small ResNet, its Sparse Wide version at equal FLOPs, and that one's width without masks."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import sift_compiler as sift
from sift_compiler.ir.flops import count_flops

from .settings import STRUCTURED, Cell

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from models import BasicBlock, initialise


class SmallResNet(nn.Module):
    """A 3×3 stem of stride 2, one residual block per stage, each stage at half the resolution of the last, and a classifier.

    Args:
        channels_in: of the images.
        classes: outputs of the classifier.
        widths: channels of the stages.
    """

    def __init__(self, channels_in: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, widths[0], 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages = zip((widths[0], *widths), widths, strict=False)
        self.stages = nn.Sequential(
            *[BasicBlock(inward, outward, 2 if i else 1) for i, (inward, outward) in enumerate(stages)]
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels_in, H, W] → logits [N, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.pool(self.stages(x)).flatten(1))


def build(cell: Cell, example: Tensor, classes: int) -> tuple[nn.Module, float]:
    """The untrained network of a run, and its FLOPs over those of the dense one.

    Args:
        cell: the run; the weights depend on its seed only.
        example: images, [N, C, H, W].
        classes: outputs.
    """

    def dense(widths: Sequence[int]) -> SmallResNet:
        torch.manual_seed(cell.seed)
        return SmallResNet(example.shape[1], classes, widths)

    ancestor = dense(cell.recipe.widths)
    if cell.method == "dense":
        return ancestor, 1.0
    options = sift.SparseWide(sparsity=cell.sparsity, seed=cell.seed, round_to=cell.recipe.group)
    if cell.method == "dense-wide":
        widened = sift.rewrite(ancestor, (example,), options)
        wide = dense([block.conv1.out_channels for block in widened.stages.children()])
        return wide, count_flops(wide, (example,)).total / count_flops(ancestor, (example,)).total
    if cell.method in STRUCTURED:
        options = sift.SparseWide(
            sparsity=cell.sparsity, seed=cell.seed, round_to=cell.recipe.group, structure=structure(cell)
        )
    sparse = sift.rewrite(ancestor, (example,), options)
    return sparse, sift.report(ancestor, sparse, (example,)).ratio


def structure(cell: Cell) -> sift.NM:
    """At most n of m, with m the recipe's group and n the least that leaves room for the density asked for."""
    group = cell.recipe.group
    return sift.NM(max(1, math.ceil(group * (1 - cell.sparsity) - 1e-9)), group)
