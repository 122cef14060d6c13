"""Recorder: where the story of the masks goes while a model trains, and how much of it is measured."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sift_compiler.attachment import Attachment
from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.masking import exploration
from sift_compiler.masking.history import LayerUpdate, MaskUpdate
from sift_compiler.whole_file import appearing_whole

FORMAT = 1
"""Of the report; in its first line."""


@runtime_checkable
class ScalarWriter(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` and its like have in common."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Write one number."""


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """What sift.schedule records of every mask update, besides ``masks.updates``.

    sift.schedule(model, optimizer, method, recorder=sift.Recorder(report="report.json", exploration=True))
    """

    report: str | os.PathLike[str] | None = None
    """A file of JSON lines: method and layers first, then one line per update, written as it happens. ``sift inspect`` shows it. A run that
    is resumed goes on in its file: lines of updates that are made again are dropped. Under torch.distributed the first process writes."""
    writer: ScalarWriter | None = None
    """Gets scalars ``masks/…`` at every update: a ``SummaryWriter`` of TensorBoard, or anything with its add_scalar."""
    exploration: bool = False
    """Measure the explored fraction R_s (Liu et al. 2021), oscillation, revisits and the overlap with the first mask. Costs one byte of
    main memory per entry of the *dense* weights, in checkpoints too, and a pass over it at every update: little for methods that move
    masks now and then, much for those that do so on every step. Counts begin with sift.schedule and go on after a resume."""

    def __post_init__(self) -> None:
        if self.report is not None and not isinstance(self.report, str | os.PathLike):
            raise UserError(f"Recorder's report must be a file name, not {self.report!r}.")
        if self.report is not None and not Path(self.report).absolute().parent.is_dir():
            raise UserError(
                f"Recorder's report {self.report} cannot be written: its folder does not exist. Make it first."
            )
        if self.writer is not None and not isinstance(self.writer, ScalarWriter):
            raise UserError(
                f"Recorder's writer must have add_scalar(tag, value, step), as torch.utils.tensorboard.SummaryWriter does; "
                f"{type(self.writer).__name__} has not."
            )
        if not isinstance(self.exploration, bool):
            raise UserError(f"Recorder's exploration must be True or False, not {self.exploration!r}.")


class Recording:
    """A recorder at work, on the layers of one mask scheduler."""

    def __init__(self, recorder: Recorder, layers: Sequence[Attachment]) -> None:
        self._recorder = recorder
        self._report = None if recorder.report is None else Path(recorder.report)
        self._open = False
        self._shapes = {one.name: list(one.layer.weight_shape) for one in layers}
        self.flags: dict[str, Tensor] = {}
        """What is remembered of each layer's exploration, by its name."""
        if recorder.exploration:
            self.flags = {one.name: exploration.begun(one.layer.index, one.layer.pattern.numel) for one in layers}

    def measured(self, update: LayerUpdate, index: Tensor) -> LayerUpdate:
        """``update`` with what else is measured of the layer, whose mask is now ``index``."""
        flags = self.flags.get(update.name)
        if flags is None:
            return update
        return dataclasses.replace(update, **dataclasses.asdict(exploration.follow(flags, index)))

    def record(self, update: MaskUpdate, method: Mapping[str, Any]) -> None:
        """Write ``update`` to wherever it shall go; ``method`` is the method's name and options."""
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        if self._report is not None:
            self._append(self._report, update, method)
        if self._recorder.writer is not None:
            for tag, value in scalars(update).items():
                self._recorder.writer.add_scalar(tag, value, update.step)

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on with the flags of a saved run.

        Raises:
            StaleArtifactError: that run was not measured.
        """
        if not self.flags:
            return
        if saved.keys() != self.flags.keys() or any(
            saved[name].shape != own.shape or saved[name].dtype != own.dtype for name, own in self.flags.items()
        ):
            raise StaleArtifactError(
                "The saved masks were moved without Recorder(exploration=True), so what they explored is not known. Resume without it."
            )
        self.flags = {name: saved[name].to("cpu", copy=True) for name in self.flags}

    def reopen(self) -> None:
        """The next update may be of an earlier step than the last one written."""
        self._open = False

    def _append(self, path: Path, update: MaskUpdate, method: Mapping[str, Any]) -> None:
        line = json.dumps(plain_update(update)) + "\n"
        if not self._open:
            first = json.dumps({"format": FORMAT, "method": dict(method), "layers": self._shapes}) + "\n"
            earlier = _earlier(path, first, update.step)
            with appearing_whole(path) as unfinished:
                Path(unfinished).write_text(first + "".join(earlier) + line, encoding="utf-8")
            self._open = True
            return
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise UserError(
                f"The report {path} cannot be written any more ({error}). Masks have moved; training may go on."
            ) from error


def _earlier(path: Path, first: str, step: int) -> list[str]:
    """The lines of ``path`` that a run resumed before ``step`` keeps; none if it is a report of another run's method or layers."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The report {path} is there but cannot be read ({error}). Choose another file.") from error
    if not lines or lines[0] != first:
        return []
    kept = []
    for line in lines[1:]:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break  # a process that was killed while it wrote left half a line
    return kept


def plain_update(update: MaskUpdate) -> dict[str, Any]:
    """An update as it stands in the report: what it holds and what follows from it."""
    layers = [
        {**dataclasses.asdict(layer), "density": layer.density, "iou": layer.iou} for layer in update.layers
    ]  # fmt: skip
    return {
        **update.to_plain(), "layers": layers, "dropped": update.dropped, "grown": update.grown, "regrown": update.regrown,
        "iou": update.iou, "density": update.density, "explored_fraction": update.explored_fraction,
    }  # fmt: skip


def scalars(update: MaskUpdate) -> dict[str, float]:
    """The numbers of an update by TensorBoard tag; densities also layer by layer."""
    found: dict[str, float | None] = {
        "masks/drop_fraction": update.drop_fraction,
        "masks/dropped": update.dropped,
        "masks/grown": update.grown,
        "masks/regrown": update.regrown,
        "masks/iou": update.iou,
        "masks/density": update.density,
        "masks/explored_fraction": update.explored_fraction,
        "masks/oscillated": update.total("oscillated"),
        "masks/revisited": update.total("revisited"),
        "masks/milliseconds": update.milliseconds,
        **{f"masks/density/{layer.name}": layer.density for layer in update.layers},
    }
    return {tag: float(value) for tag, value in found.items() if value is not None}
