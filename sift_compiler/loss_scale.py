"""By what a gradient scaler multiplied the loss, and so every gradient of a step.

A scaler divides the gradients of the optimizer's parameters again before they are used; a fused optimizer does that itself. Neither knows
of dense gradients, which are no parameter's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sift_compiler.errors import UnsupportedError, UserError


@runtime_checkable
class Scaler(Protocol):
    """What is asked of a gradient scaler; ``torch.amp.GradScaler`` is one."""

    def get_scale(self) -> float:
        """By what losses are multiplied; 1 if the scaler is disabled."""


@dataclass(frozen=True, eq=False)
class LossScale:
    """The scale of one optimizer's gradients.

    Attributes:
        optimizer: whose steps are watched.
        scaler: what scales the loss; None: nothing, or it is not known.
    """

    optimizer: Optimizer
    scaler: Scaler | None

    def of_dense_gradients(self) -> float:
        """Of what backward passes leave. A scaler changes its scale in ``update()``, after the step, so until the step's hooks are through
        this is the scale of the step's own backward passes."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def of_gradients(self, *, before_step: bool = False) -> float:
        """Of the parameters' gradients before the optimizer's step, in which fused ones divide them by it, in place; 1 for others.

        Args:
            before_step: whether the scaler's ``step()`` has not begun yet; a fused optimizer is told its scale there.
        """
        if before_step:
            return self.of_dense_gradients() if self._left_to_optimizer else 1.0
        scale = getattr(self.optimizer, "grad_scale", None)
        return float(scale) if isinstance(scale, Tensor) else 1.0

    @property
    def _left_to_optimizer(self) -> bool:
        return self.scaler is not None and getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def require_checked(self) -> None:
        """Before the scaler's ``step()``: raise UnsupportedError if it will yet look for infinities in the gradients."""
        if self._left_to_optimizer:
            raise UnsupportedError(
                'RigL(skip_step="replace") keeps gradients from the optimizer before the gradient scaler has checked them: with a fused '
                'optimizer it does so only in its step. Make the optimizer with fused=False, or use skip_step="keep".'
            )

    @property
    def step_is_skipped(self) -> bool:
        """Whether a gradient scaler makes a fused optimizer leave out this step; others are not called at all then."""
        found = getattr(self.optimizer, "found_inf", None)
        return isinstance(found, Tensor) and bool(found.any())

    def require_known(self, method: str) -> None:
        """To be called on the optimizer's step: raise UserError if a scaler takes it that is not known here."""
        if self.scaler is not None or not (hasattr(self.optimizer, "grad_scale") or _inside_scaler()):
            return
        raise UserError(
            f"A gradient scaler takes this optimizer step, and {method} uses the size of dense gradients, which are multiplied by its "
            "scale. Pass it on: sift.schedule(model, optimizer, method, scaler=scaler). A method of your own that only ranks gradients "
            "says uses_gradient_size = False instead."
        )


def scaler_beside(optimizer: object) -> Scaler | None:
    """The scaler that a wrapper of Accelerate keeps beside the optimizer of torch inside; None if there is none."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        if isinstance(scaler := getattr(optimizer, "scaler", None), Scaler):
            return scaler
        optimizer = inner
    return None


def checked_scaler(scaler: object) -> Scaler | None:
    """``scaler``.

    Raises:
        UserError: it is no gradient scaler.
    """
    if scaler is not None and (isinstance(scaler, type) or not isinstance(scaler, Scaler)):
        raise UserError(
            f"scaler must be the gradient scaler that scales the loss, such as torch.amp.GradScaler(), not {scaler!r}."
        )
    return scaler


def _inside_scaler() -> bool:
    """Whether torch's scaler is calling: it tells an optimizer that is not fused nothing of itself, and no hook."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is GradScaler.step.__code__:
            return cast(GradScaler, frame.f_locals["self"]).is_enabled()
        frame = frame.f_back
    return False
