"""Dense gradients on demand: what a sparse layer hands to a mask method on update steps.

Growth is scored on the gradient of *every* entry of the dense weight, which a compact layer never holds. A probe is the
letter box between the backward operator, which is opaque to compilers, and the mask scheduler: it is armed for one step,
the backward operator then leaves the dense gradient in it, and the scheduler takes it. Probes sit behind constant integer
handles, so that arming one changes neither a traced graph nor a guard.

Layers get their gradients one after the other, and a method needs few entries of each. So a probe keeps of the gradient what
its scheduler wants of it, at once, and never are there dense gradients of two layers. With gradient accumulation that has to
wait for the last backward pass before the optimizer's step. Which one is the last nobody tells: a probe counts the passes of
every step, and takes the most there have been so far to be all there are.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.ir.entries import Entries

NO_PROBE = 0
"""The handle that stands for "no probe"."""

Reduce = Callable[[Tensor], Tensor | Entries]

_handles = itertools.count(1)
_probes: weakref.WeakValueDictionary[int, GrowthProbe] = weakref.WeakValueDictionary()


class GrowthProbe:
    """Counts the backward passes of one layer; receives its dense weight gradient while armed.

    Attributes:
        handle: what stands for it in graphs.
        claimed: whether a mask scheduler listens; two on one probe would take each other's gradients.
        most, least: backward passes of a step, of all steps so far; 0 before the first step.
    """

    def __init__(self) -> None:
        self.handle = next(_handles)
        self.claimed = False
        self._own_gradient: Callable[[], Tensor | None] | None = None
        self._gradient: Tensor | Entries | None = None
        self._forget_passes()
        self.disarm()
        _probes[self.handle] = self

    def claim(self, own_gradient: Callable[[], Tensor | None]) -> None:
        """Start to count for a mask scheduler; ``own_gradient`` returns the gradient of the layer's values as it stands."""
        self.claimed, self._own_gradient = True, own_gradient
        self._forget_passes()

    def release(self) -> None:
        """The scheduler listens no more."""
        self.claimed = False
        self._forget_passes()
        self.disarm()

    def _forget_passes(self) -> None:
        self.most = self.least = self._passes = 0
        self._backward = -1

    # --- asked by the scheduler -------------------------------------------------------------------------------------

    @property
    def armed(self) -> bool:
        """Whether backward passes leave their dense gradient here."""
        return self._armed

    def arm(self, reduce: Reduce | None = None, *, passes: int = 0, strict: bool = False) -> None:
        """Ask for the dense gradient of the backward passes to come; what was there is dropped.

        Args:
            reduce: makes what is kept of the sum, inside the backward pass that completes it.
            passes: how many that takes; 0: not known, the sum is kept as it is.
            strict: whether more passes are an error; otherwise nothing can be had of a step with more.
        """
        self._armed, self._gradient, self._spoiled = True, None, False
        self._reduce, self._expected, self._strict = reduce if passes else None, passes, strict

    def disarm(self) -> None:
        """Ask for nothing more and drop what was left."""
        self._armed, self._gradient, self._spoiled = False, None, False
        self._reduce, self._expected, self._strict = None, 0, False

    def take(self) -> Tensor | Entries | None:
        """The sum of what was left since arming, of the dense weight's shape, or what was made of it; None if no backward pass reached the
        layer, or more did than were known of. Disarms."""
        gradient = self._gradient
        self.disarm()
        return gradient

    def end_step(self) -> None:
        """The optimizer has stepped: passes are counted anew."""
        self.least = min(self.least, self._passes) if self.most else self._passes
        self.most = max(self.most, self._passes)
        self._passes = 0

    # --- told by the backward operator ------------------------------------------------------------------------------

    def arrive(self) -> None:
        """A backward pass has come to the layer."""
        backward = torch._C._current_graph_task_id()
        if self._passes and backward != self._backward and self._step_was_left_out():
            self._passes, self._gradient, self._spoiled = 0, None, False
        self._passes, self._backward = self._passes + 1, backward

    def _step_was_left_out(self) -> bool:
        """Whether the gradients of the passes counted so far are gone without a step of the optimizer: a gradient scaler left it out."""
        own = None if self._own_gradient is None else self._own_gradient()
        if own is None:
            return self._own_gradient is not None
        # zero_grad(set_to_none=False); a sum that is still to be completed may be zero by itself.
        return 0 < self.most <= self._passes and not bool(own.any())

    def add(self, gradient: Tensor) -> None:
        """Leave the dense gradient of one backward pass; those of several (gradient accumulation, a layer called twice) add up.

        Before the passes of a step are known a sum that is not finite is given up: a gradient scaler skips the optimizer step that
        overflowed, and what comes next is a new sum.
        """
        known = self._gradient
        if isinstance(known, Entries) or self._spoiled:
            self._refuse_more()
            return
        if known is None or (not self._expected and not bool(known.isfinite().all())):
            total = gradient
        else:
            total = known.add_(gradient)
        complete = self._reduce is not None and self._passes >= self._expected
        self._gradient = self._reduce(total) if complete and self._reduce is not None else total

    def _refuse_more(self) -> None:
        if self._strict:
            raise UserError(
                "A second backward pass reached a sparse layer before the optimizer's step, although its mask method was told that none "
                "would (accumulates=False): what the first left does not add up. Leave accumulates at its default, None."
            )
        self._gradient, self._spoiled = None, True


def notice(handle: int) -> GrowthProbe | None:
    """Tell the probe behind ``handle`` of a backward pass; the probe, if it lives and wants the dense gradient."""
    probe = _probes.get(handle) if handle != NO_PROBE else None
    if probe is None or not (probe.claimed or probe.armed):
        return None
    probe.arrive()
    return probe if probe.armed else None
