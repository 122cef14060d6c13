"""Dense gradients on demand: what a sparse layer hands to a mask method on update steps.

Growth is scored on the gradient of *every* entry of the dense weight, which a compact layer never holds. A probe is the
letter box between the backward operator, which is opaque to compilers, and the mask scheduler: it is armed for one step,
the backward operator then leaves the dense gradient in it, and the scheduler takes it. Probes sit behind constant integer
handles, so that arming one changes neither a traced graph nor a guard.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

from torch import Tensor

from sift_compiler.errors import UserError

NO_PROBE = 0
"""The handle that stands for "no probe"."""

_handles = itertools.count(1)
_probes: weakref.WeakValueDictionary[int, GrowthProbe] = weakref.WeakValueDictionary()


class GrowthProbe:
    """Receives one layer's dense weight gradient while armed."""

    def __init__(self) -> None:
        self.handle = next(_handles)
        self.claimed = False
        """Whether a mask scheduler listens; two on one probe would take each other's gradients."""
        self._armed = False
        self._gradient: Tensor | None = None
        self._reduce: Callable[[Tensor], Tensor] | None = None
        _probes[self.handle] = self

    @property
    def armed(self) -> bool:
        """Whether backward passes leave their dense gradient here."""
        return self._armed

    def arm(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Ask for the dense gradient of the backward passes to come; what was there is dropped.

        Args:
            reduce: makes a sparse tensor of the dense gradient as soon as it comes, so that layers do not hold theirs all at once; only
                one backward pass may come then.
        """
        self._armed, self._gradient, self._reduce = True, None, reduce

    def disarm(self) -> None:
        """Ask for nothing more and drop what was left."""
        self._armed, self._gradient, self._reduce = False, None, None

    def add(self, gradient: Tensor) -> None:
        """Leave the dense gradient of one backward pass; those of several (gradient accumulation, a layer called twice) add up.

        A sum that is not finite is given up: a gradient scaler skips the optimizer step that overflowed, and what comes next is a new sum.
        """
        known = self._gradient
        if known is not None and known.is_sparse:
            raise UserError(
                "A second backward pass reached a sparse layer before the optimizer's step, although its mask method was told that none "
                "would (accumulates=False): what the first left does not add up. Use accumulates=True, the default."
            )
        if known is None or not bool(known.isfinite().all()):
            finite = self._reduce is not None and bool(gradient.isfinite().all())
            self._gradient = self._reduce(gradient) if finite and self._reduce is not None else gradient
        else:
            self._gradient = known + gradient

    def take(self) -> Tensor | None:
        """The sum of what was left since arming, of the dense weight's shape or what :meth:`arm` was to reduce it to; None if no backward pass reached the layer. Disarms."""
        gradient = self._gradient
        self.disarm()
        return gradient


def armed_probe(handle: int) -> GrowthProbe | None:
    """The probe behind ``handle`` if it lives and is armed."""
    probe = _probes.get(handle) if handle != NO_PROBE else None
    return probe if probe is not None and probe.armed else None
