"""The demo's dense network: a small residual CNN with batch norm (He et al. 2016, the CIFAR layout, two stages)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut; the second stage starts with stride 2 and a 1×1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, inputs, H, W] → [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """Stem, two stages of blocks at ``width`` and ``2 · width`` channels, average pooling, classifier.

    Weights are drawn as the Sparse-IFT paper does: Kaiming normal over the fan-out, zero for the last norm of each block.
    """

    def __init__(self, channels: int, classes: int, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(*[Block(width, width, 1) for _ in range(blocks)])
        rest = [Block(2 * width, 2 * width, 1) for _ in range(blocks - 1)]
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2), *rest)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                nn.init.zeros_(module.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels, H, W] → logits [N, classes]."""
        x = torch.relu(self.norm(self.stem(x)))
        x = self.pool(self.stage2(self.stage1(x)))
        return cast(Tensor, self.head(torch.flatten(x, 1)))


def build(channels: int, classes: int, width: int, seed: int) -> ResidualNet:
    """The dense network with weights that depend on ``seed`` only; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualNet(channels, classes, width)
