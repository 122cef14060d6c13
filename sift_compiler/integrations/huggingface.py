"""Masks that move under the ``Trainer`` of Hugging Face's transformers.

    from sift_compiler.integrations.huggingface import SiftCallback

    trainer = Trainer(model=sparse, args=arguments, train_dataset=data, callbacks=[SiftCallback(sift.RigL(end_step=750))])
    trainer.train()

The schedule is made when the trainer has made its optimizer. An optimizer step is one update of the trainer: with gradient accumulation
the gradients of all its batches move the masks. In every checkpoint of the trainer lies ``sift_masks.pt``; a run resumed from it is the
run that never stopped. Masks themselves are buffers of the model and are saved with it.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.nn import SparseLayer
from sift_compiler.options import MaskMethod
from sift_compiler.recorder import Recorder
from sift_compiler.schedule import MaskScheduler, schedule
from sift_compiler.whole_file import appearing_whole

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise UserError(
        f"sift_compiler.integrations.huggingface needs transformers and accelerate ({error}). Install them: "
        "pip install transformers accelerate"
    ) from error

FILE = "sift_masks.pt"
"""What the callback adds to the trainer's checkpoints."""


class SiftCallback(TrainerCallback):  # type: ignore[misc]
    """Moves masks on the trainer's optimizer steps.

    Args:
        method: how masks move; its steps are the trainer's ``global_step``.
        recorder: where every update is written to, and how much of it is measured.
        checkpoint: the folder of the checkpoint a run is resumed from, if that is not in the trainer's ``output_dir``.

    Attributes:
        masks: the mask scheduler; None before training. It has ended when training has, and still tells its updates.
    """

    def __init__(
        self, method: MaskMethod, *, recorder: Recorder | None = None, checkpoint: str | Path | None = None
    ) -> None:
        if not isinstance(method, MaskMethod):
            raise UserError(f"SiftCallback expects a mask method such as sift.RigL(end_step=…), not {method!r}.")
        self.method, self.recorder, self.checkpoint = method, recorder, checkpoint
        self.masks: MaskScheduler | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the schedule; bring it to where the checkpoint was taken.

        Raises:
            UserError: the model was not rewritten, the method does not fit, or the checkpoint has no masks.
            StaleArtifactError: the masks' file is damaged, or of another checkpoint than the model.
        """
        self._end()
        if args.gradient_accumulation_steps > 1 and getattr(self.method, "accumulates", True) is False:
            raise UserError(
                f"{self.method.name}(accumulates=False) expects one backward pass per step; the trainer's gradient_accumulation_steps is "
                f"{args.gradient_accumulation_steps}. Leave accumulates out."
            )
        model = kwargs["model"]
        masks = schedule(model, kwargs["optimizer"], self.method, recorder=self.recorder)
        try:
            if state.global_step > 0:
                _restore(masks, model, self._folder(args, state) / FILE)
        except BaseException:
            masks.remove()
            raise
        self.masks = masks

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the schedule to the checkpoint that was just written."""
        if self.masks is None or not args.should_save:
            return
        folder = _folder_in(args.output_dir, state)
        if not folder.is_dir():
            raise UserError(
                f"The trainer's checkpoint {folder} is not where it was expected, so the masks' schedule cannot be saved with it. "
                "Searches over hyperparameters save elsewhere: set save_strategy='no' for them."
            )
        with appearing_whole(folder / FILE) as unfinished:
            torch.save({"masks": self.masks.state_dict(), "digest": _digest(kwargs["model"])}, unfinished)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self._end()

    def _end(self) -> None:
        if self.masks is not None:
            self.masks.remove()

    def _folder(self, args: Any, state: Any) -> Path:
        return _folder_in(args.output_dir, state) if self.checkpoint is None else Path(self.checkpoint)


def _folder_in(output: str, state: Any) -> Path:
    return Path(output) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _restore(masks: MaskScheduler, model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"There is no {path}: the schedule of the masks cannot be resumed. If the checkpoint is elsewhere, pass its folder: "
            "SiftCallback(method, checkpoint=folder); if it was made without SiftCallback, its masks never moved: load its model and "
            "begin a new run."
        )
    try:
        saved = torch.load(path, weights_only=True)
        state, digest = saved["masks"], saved["digest"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise StaleArtifactError(
            f"{path} is damaged ({type(error).__name__}: {error}). Resume from an older checkpoint."
        ) from error
    if digest != _digest(model):
        raise StaleArtifactError(
            f"{path} belongs to other masks than the model that was loaded. Pass the folder of the checkpoint that you resume from: "
            "SiftCallback(method, checkpoint=folder)."
        )
    masks.load_state_dict(state)


def _digest(model: nn.Module) -> str:
    """Of all masks of ``model``."""
    made = hashlib.sha256()
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer):
            made.update(name.encode())
            made.update(layer.index.cpu().numpy().tobytes())
    return made.hexdigest()
