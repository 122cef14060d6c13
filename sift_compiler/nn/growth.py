"""Dense gradients on demand: what a sparse layer hands to a mask method on update steps.

Growth is scored on the gradient of *every* entry of the dense weight, which a compact layer never holds. A probe is the
letter box between the backward operator, which is opaque to compilers, and the mask scheduler: it is armed for one step,
the backward operator then leaves the dense gradient in it, and the scheduler takes it. Probes sit behind constant integer
handles, so that arming one changes neither a traced graph nor a guard.
"""

from __future__ import annotations

import itertools
import weakref

from torch import Tensor

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
        _probes[self.handle] = self

    @property
    def armed(self) -> bool:
        """Whether backward passes leave their dense gradient here."""
        return self._armed

    def arm(self) -> None:
        """Ask for the dense gradient of the backward passes to come; what was there is dropped."""
        self._armed, self._gradient = True, None

    def disarm(self) -> None:
        """Ask for nothing more and drop what was left."""
        self._armed, self._gradient = False, None

    def add(self, gradient: Tensor) -> None:
        """Leave the dense gradient of one backward pass; those of several (gradient accumulation, a layer called twice) add up.

        A sum that is not finite is given up: a gradient scaler skips the optimizer step that overflowed, and what comes next is a new sum.
        """
        if self._gradient is None or not bool(self._gradient.isfinite().all()):
            self._gradient = gradient
        else:
            self._gradient = self._gradient + gradient

    def take(self) -> Tensor | None:
        """The sum of what was left since arming, of the dense weight's shape; None if no backward pass reached the layer. Disarms."""
        gradient = self._gradient
        self.disarm()
        return gradient


def armed_probe(handle: int) -> GrowthProbe | None:
    """The probe behind ``handle`` if it lives and is armed."""
    probe = _probes.get(handle) if handle != NO_PROBE else None
    return probe if probe is not None and probe.armed else None
