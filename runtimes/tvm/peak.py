"""The most this machine can do: multiply-adds in registers and nothing else. The yardstick of all kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sift_compiler.runtimes.tvm import kernels
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.target import ensure_pool, host_cpu

_CHAINS = 12
"""Independent sums: enough to hide the latency of a multiply-add on every processor met so far."""


def peak_loop(threads: int, turns: int = 100_000) -> tuple[Callable[[], object], float]:
    """A call that multiplies and adds in registers of ``threads`` cores, and its FLOPs.

    Times of it belong next to those of the kernel that is judged: clocks change and machines are shared.
    """
    cpu = host_cpu()
    if threads > 1:
        ensure_pool(threads)
    loop = compiled(kernels.peak, cpu.name, lanes=cpu.lanes, chains=_CHAINS, parallel=threads > 1)
    numbers = torch.full((threads * _CHAINS * cpu.lanes,), 0.5)
    return lambda: loop(numbers, threads, turns), 2.0 * threads * _CHAINS * cpu.lanes * turns
