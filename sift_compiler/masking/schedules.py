"""When masks move, and what share of a layer's active weights is replaced then."""

from __future__ import annotations

import math

from sift_compiler.options import SET, Decay, MaskMethod, RigL


def is_update_step(step: int, *, begin: int, end: int, delta_t: int) -> bool:
    """Whether masks move at optimizer step ``step``, counted from 0: begin ≤ step < end, every ``delta_t`` steps from begin on."""
    return begin <= step < end and (step - begin) % delta_t == 0


def cosine(step: int, *, initial: float, end: int) -> float:
    """α/2 · (1 + cos(π t / T_end)): α = ``initial`` at step 0, 0 at ``end`` (RigL, Sec. 3)."""
    return initial / 2 * (1 + math.cos(math.pi * step / end)) if end else 0.0


def drop_fraction(step: int, *, initial: float, end: int, decay: Decay) -> float:
    """Share of the active weights replaced at ``step``, in [0, ``initial``]."""
    return cosine(step, initial=initial, end=end) if decay == "cosine" else initial


def replaced_weights(active: int, fraction: float) -> int:
    """``floor(fraction * active)``, nudged by a billionth so that .3 · 10 is 3 in spite of binary fractions."""
    return min(active, int(fraction * active + 1e-9))


def due(method: MaskMethod, step: int) -> bool:
    """Whether ``method`` moves masks at optimizer step ``step``."""
    if not isinstance(method, SET | RigL):
        return False
    return is_update_step(step, begin=method.begin_step, end=method.end_step, delta_t=method.delta_t)
