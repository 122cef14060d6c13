"""Forward times of several networks, measured turn by turn so that a busy machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ForwardTime:
    """Milliseconds of one forward pass over a batch."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    runs: int


@torch.no_grad()
def interleaved(
    forwards: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    *,
    rounds: int,
    warm_up: int = 2,
    seconds: float = 20.0,
) -> dict[str, ForwardTime]:
    """Time each of ``forwards`` on ``x`` once per round, in turn.

    Args:
        forwards: networks in evaluation mode, compiled or not.
        x: a batch, [N, C, H, W].
        rounds: timed calls of each at most, at least 1.
        warm_up: untimed calls of each before.
        seconds: no further round begins after so long, but five are run in any case.
    """
    times: dict[str, list[float]] = {name: [] for name in forwards}
    start = time.perf_counter()
    for turn in range(-warm_up, rounds):
        if turn >= 5 and time.perf_counter() - start > seconds:
            break
        for name, forward in forwards.items():
            begin = time.perf_counter()
            forward(x)
            if turn >= 0:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {
        name: ForwardTime(
            median_ms=statistics.median(taken), fastest_ms=min(taken), slowest_ms=max(taken), runs=len(taken)
        )
        for name, taken in times.items()
    }
