"""The scheme a tensor was drawn by, read from its numbers.

A model's author chose how its weights start: torch's default, Xavier, Kaiming, or one deviation for all (GPT-2: normal, .02, and
.02 / (2 · layers)^½ where a residual branch ends). A rewritten layer of another size is drawn by the same scheme: with the deviation that
follows the fans where the scheme follows them, else with the one it had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Fan = Literal["in", "out", "both"]
Shape = tuple[int, ...]

_LAWS: tuple[tuple[Fan, float, bool], ...] = (
    ("in", 1 / 3, True),  # torch's default: Kaiming uniform with a = 5^½
    ("both", 2.0, True), ("both", 2.0, False),  # Glorot and Bengio 2010
    ("in", 2.0, True), ("in", 2.0, False), ("out", 2.0, True), ("out", 2.0, False),  # He et al. 2015
    ("in", 1.0, True), ("in", 1.0, False),  # LeCun et al. 1998
)  # fmt: skip
"""Variance times fan of the schemes that follow a fan, and whether they are uniform; ``"both"`` is the sum of both fans."""

_FEWEST = 64
"""From fewer numbers no law can be told."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Independent numbers of one mean and deviation.

    Attributes:
        mean: of all numbers.
        deviation: standard deviation; at a fan of 1 where it follows a fan. 0 for a constant.
        uniform: drawn uniformly, not normally.
        fan: the fan whose inverse root the deviation follows, or None.
    """

    mean: float = 0.0
    deviation: float
    uniform: bool = False
    fan: Fan | None = None

    @property
    def constant(self) -> bool:
        """Whether all numbers are the same."""
        return self.deviation == 0

    def deviation_of(self, shape: Shape) -> float:
        """Standard deviation of the numbers of a tensor of ``shape``, outputs first."""
        return self.deviation if self.fan is None else self.deviation / math.sqrt(fan_of(shape, self.fan))

    def fill(self, tensor: Tensor, deviation: float | Tensor, generator: torch.Generator | None = None) -> None:
        """Draw every number of ``tensor`` in place with ``deviation``, one or as many."""
        if self.uniform:
            tensor.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        else:
            tensor.normal_(generator=generator)
        tensor.mul_(deviation).add_(self.mean)


def fan_of(shape: Shape, fan: Fan) -> int:
    """Inputs of an output, outputs of an input, or both together, of a weight [out, in, kernel …]."""
    kernel = math.prod(shape[2:])
    inputs, outputs = shape[1] * kernel, shape[0] * kernel
    return {"in": inputs, "out": outputs, "both": inputs + outputs}[fan]


def read_scheme(tensor: Tensor, *, fans: bool = True) -> Scheme:
    """The scheme by which ``tensor``, of floating-point numbers, was most likely drawn.

    Args:
        tensor: a weight [out, in, …] or anything else.
        fans: whether it is a weight, whose deviation may follow its fans.

    Returns:
        Uniform where nothing lies beyond 3^½ deviations. A law of fans where the deviation is what the law says to within four standard
        errors of the estimate, the nearest of those; otherwise the deviation is the tensor's own.
    """
    data = tensor.detach().float()
    count = data.numel()
    if not count or bool((data == data.reshape(-1)[0]).all()):
        return Scheme(mean=float(data.reshape(-1)[0]) if count else 0.0, deviation=0.0)
    variance, average = torch.var_mean(data, correction=0)
    deviation, mean = float(variance) ** 0.5, float(average)
    if abs(mean) < 4 * deviation / math.sqrt(count):
        mean = 0.0
    if count < _FEWEST or not fans or tensor.dim() < 2:
        return Scheme(mean=mean, deviation=deviation)
    farthest = float((data - mean).abs().max())
    uniform = farthest <= math.sqrt(3) * deviation * (1 + count**-0.5)
    return _law(tuple(tensor.shape), mean, deviation, uniform, count) or Scheme(
        mean=mean, deviation=deviation, uniform=uniform
    )


def _law(shape: Shape, mean: float, deviation: float, uniform: bool, count: int) -> Scheme | None:
    """The nearest of the laws that fit, if one does."""
    if mean:
        return None
    kurtosis = 1.8 if uniform else 3.0
    best, nearest = None, 4 * math.sqrt((kurtosis - 1) / (4 * count))
    for fan, variance, law_is_uniform in _LAWS:
        found = Scheme(deviation=math.sqrt(variance), uniform=uniform, fan=fan)
        distance = abs(deviation / found.deviation_of(shape) - 1)
        if law_is_uniform == uniform and distance < nearest:
            best, nearest = found, distance
    return best
