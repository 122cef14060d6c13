"""CpuFacts: the few things about a processor that decide how a sparse kernel is tiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CpuFacts:
    """A processor, as far as a kernel is concerned."""

    name: str
    """The compiler's name of it, e.g. ``"znver4"``; part of every key of compiled code."""
    lanes: int
    """float32 numbers in one vector register: 16 (AVX-512), 8 (AVX2), 4 (NEON, SSE)."""
    registers: int
    """Vector registers an instruction can name: 32 or 16."""
    l1_bytes: int = 32 * 1024
    """First-level data cache of one core."""
    l2_bytes: int = 1024 * 1024
    """Second-level cache of one core."""
