"""Masks that move under the ``Trainer`` of Lightning (``lightning`` or ``pytorch_lightning``).

    from sift_compiler.integrations.lightning import SiftCallback

    trainer = Trainer(max_epochs=10, callbacks=[SiftCallback(sift.RigL(end_step=750))])
    trainer.fit(module, data)                                # module holds what sift.rewrite returned, e.g. as self.net

The schedule is made when training starts, on the optimizer that holds the sparse layers' values. Steps are those of that optimizer: with
``accumulate_grad_batches`` the gradients of all batches of a step move the masks. Lightning's checkpoints hold the schedule, with the
states of its other callbacks; a run resumed with ``ckpt_path`` is the run that never stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from sift_compiler.attachment import optimizer_inside
from sift_compiler.errors import UserError
from sift_compiler.nn import SparseLayer
from sift_compiler.options import MaskMethod
from sift_compiler.recorder import Recorder
from sift_compiler.schedule import MaskScheduler, schedule

try:
    if TYPE_CHECKING or "lightning.pytorch" in sys.modules or "pytorch_lightning" not in sys.modules:
        from lightning.pytorch.callbacks import Callback
    else:
        from pytorch_lightning.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise UserError(
            f"sift_compiler.integrations.lightning needs Lightning ({error}). Install it: pip install lightning"
        ) from error


class SiftCallback(Callback):  # type: ignore[misc]
    """Moves masks on the steps of the optimizer that trains the sparse layers.

    Args:
        method: how masks move; its steps are those of the optimizer.
        recorder: where every update is written to, and how much of it is measured; ``Recorder(writer=logger.experiment)`` for Lightning's
            TensorBoardLogger.

    Attributes:
        masks: the mask scheduler; None before training. It has ended when training has, and still tells its updates.
    """

    def __init__(self, method: MaskMethod, *, recorder: Recorder | None = None) -> None:
        if not isinstance(method, MaskMethod):
            raise UserError(f"SiftCallback expects a mask method such as sift.RigL(end_step=…), not {method!r}.")
        self.method, self.recorder = method, recorder
        self.masks: MaskScheduler | None = None
        self._saved: Mapping[str, Any] | None = None
        self._optimizer: Optimizer | None = None
        self._act: Callable[[], None] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget what a checkpoint of an earlier call held."""
        self._saved = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the schedule; bring it to where the checkpoint was taken, or where the last fit of this trainer ended.

        Raises:
            UserError: the model was not rewritten, the method does not fit, or the checkpoint has no masks.
        """
        if trainer.accumulate_grad_batches > 1 and getattr(self.method, "accumulates", True) is False:
            raise UserError(
                f"{self.method.name}(accumulates=False) expects one backward pass per step; the trainer's accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}. Leave accumulates out."
            )
        saved = self._saved
        if saved is None and trainer.global_step > 0:
            if self.masks is None:
                raise UserError(
                    "The checkpoint was made without SiftCallback, so the schedule of the masks cannot be resumed. Load its weights and "
                    "begin a new run."
                )
            saved = self.masks.state_dict()
        self._end()
        optimizer = _optimizer(trainer.optimizers, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        masks = schedule(pl_module, optimizer, self.method, recorder=self.recorder, scaler=scaler)
        try:
            if saved is not None:
                masks.load_state_dict(saved)
        except BaseException:
            masks.remove()
            raise
        self.masks, self._optimizer, self._saved = masks, optimizer, None
        self._act = masks.acting_inside()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Let methods act that have something to do between the backward pass and the step; Lightning clips gradients after that."""
        if self._act is not None and optimizer_inside(optimizer) is self._optimizer:
            self._act()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the optimizer."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """What goes into Lightning's checkpoints."""
        return {} if self.masks is None else self.masks.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training starts and there is an optimizer."""
        self._saved = state_dict

    def _end(self) -> None:
        if self.masks is not None:
            self.masks.remove()
        self._act = self._optimizer = None


def _optimizer(optimizers: Sequence[Optimizer], module: nn.Module) -> Optimizer:
    """The one that holds the values of the trained sparse layers; if none or several do, what sift.schedule says of the first."""
    values = {id(one.values) for one in module.modules() if isinstance(one, SparseLayer) and one.values.requires_grad}
    holders = [
        one for one in optimizers if any(id(each) in values for group in one.param_groups for each in group["params"])
    ]
    if len(holders) > 1:
        raise UserError(
            f"{len(holders)} optimizers of {type(module).__name__} hold sparse layers; SiftCallback moves the masks of one. Use one "
            "optimizer with parameter groups, or call sift.schedule for each in on_train_start."
        )
    if not optimizers:
        raise UserError(f"{type(module).__name__} has no optimizer: configure_optimizers returned none.")
    return (holders or list(optimizers))[0]
