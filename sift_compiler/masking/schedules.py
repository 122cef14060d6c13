"""When masks move, and what share of a layer's active weights is replaced then."""

from __future__ import annotations

import math

from sift_compiler.options import Decay, Dynamic, MaskMethod, Moving


def is_update_step(step: int, *, begin: int, end: int, delta_t: int) -> bool:
    """Whether masks move at optimizer step ``step``, counted from 0: begin ≤ step < end, every ``delta_t`` steps from begin on."""
    return begin <= step < end and (step - begin) % delta_t == 0


def cosine(step: int, *, initial: float, end: int) -> float:
    """α/2 · (1 + cos(π t / T_end)): α = ``initial`` at step 0, 0 at ``end`` (RigL, Sec. 3)."""
    return initial / 2 * (1 + math.cos(math.pi * step / end)) if end else 0.0


def drop_fraction(step: int, *, initial: float, end: int, decay: Decay) -> float:
    """Share of the active weights replaced at ``step``, in [0, ``initial``]; the laws are described at ``Dynamic.decay``."""
    if decay == "constant":
        return initial
    if decay == "cosine":
        return cosine(step, initial=initial, end=end)
    left = max(0.0, 1 - step / end) if end else 0.0
    return initial * left ** (3 if decay == "exponential" else 1)


def cubic(step: int, *, begin: int, last: int, initial: float, final: float) -> float:
    """s_f + (s_i - s_f)(1 - p)³ with p from 0 at ``begin`` to 1 at ``last`` (Zhu and Gupta 2017, Eq. 1)."""
    passed = min(1.0, max(0.0, (step - begin) / (last - begin))) if last > begin else 1.0
    return final + (initial - final) * (1 - passed) ** 3


def last_update(method: Moving) -> int:
    """The last optimizer step at which ``method`` moves masks; ``begin_step`` if it never does."""
    return method.begin_step + max(0, (method.end_step - 1 - method.begin_step) // method.delta_t) * method.delta_t


def fraction_at(method: Dynamic, step: int) -> float:
    """Share of the active weights that ``method`` replaces at optimizer step ``step``."""
    return drop_fraction(step, initial=method.drop_fraction, end=method.end_step, decay=method.decay)


def replaced_weights(active: int, fraction: float) -> int:
    """``floor(fraction * active)``, nudged by a billionth so that .3 · 10 is 3 in spite of binary fractions."""
    return min(active, int(fraction * active + 1e-9))


def due(method: MaskMethod, step: int) -> bool:
    """Whether ``method`` moves masks at optimizer step ``step``."""
    if not isinstance(method, Moving):
        return False
    return is_update_step(step, begin=method.begin_step, end=method.end_step, delta_t=method.delta_t)
