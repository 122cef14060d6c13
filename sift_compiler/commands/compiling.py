"""``sift compile``: run a model once on compiled code, so that kernels and measured tiles are on disk for whoever runs it next."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from sift_compiler import dynamo
from sift_compiler.commands.tile_candidates import Candidate, candidates_of
from sift_compiler.errors import UserError
from sift_compiler.options import Tune
from sift_compiler.runtimes.base import LiveKernel
from sift_compiler.runtimes.cache import default_folder
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel


@dataclass(frozen=True, kw_only=True)
class LayerCode:
    """One call of a sparse layer, or of a dense first convolution that runs on the same kernels, for one input shape.

    A refused call has a reason and no tile.
    """

    path: str
    input_shape: tuple[int, ...]
    """As the kernel sees it: five sizes where images lie side by side in vectors."""
    tile: str
    """How it is cut; parts joined by ``+`` where a batch fills no whole vectors."""
    microseconds: float | None
    """What the tiles took when they were measured, input packed beforehand; None where a part was never measured."""
    reason: str
    """Why this tile, or why the call is refused."""
    dense: bool = False
    """Whether the layer keeps every weight."""
    candidates: tuple[Candidate, ...] = ()
    """Tiles that come into question, with the times of those that were measured."""

    def row(self) -> tuple[str, str, str, str, str]:
        """Everything, as text."""
        took = "-" if self.microseconds is None else f"{self.microseconds:.0f}"
        why = f"dense, on the kernels of the sparse layers; {self.reason}" if self.dense else self.reason
        return self.path, "x".join(map(str, self.input_shape)), self.tile, took, why


@dataclass(frozen=True)
class CompiledModel:
    """What compiling left behind.

    Attributes:
        folder: where kernels and measured tiles are kept.
        tune: the level of measuring.
        threads: workers of the kernels; measured tiles hold for this number.
        rest: who runs the rest of each graph.
        layers: in the order of each graph, dense first convolutions before sparse layers; those that were refused last.
    """

    folder: str
    tune: Tune
    threads: int
    rest: tuple[str, ...]
    layers: tuple[LayerCode, ...]

    def to_plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return dataclasses.asdict(self)


def compile_model(model: nn.Module, inputs: tuple[Any, ...], *, tune: Tune, threads: int) -> CompiledModel:
    """Compile ``model`` for inference by ``backend="sift"`` and run it once on ``inputs``.

    Args:
        model: sparse; put in evaluation mode while it runs.
        inputs: its positional arguments; code is made for their shapes.
        tune: whether tiles are measured; see :class:`sift_compiler.options.CompileOptions`.
        threads: workers of the kernels, at least 1.

    Raises:
        UserError: an unknown ``tune``, or the model calls no sparse layer.
    """
    options = {"tune": tune, "threads": threads}
    before = set(dynamo.compilations())
    with _evaluating(model):
        run = torch.compile(model, backend="sift", dynamic=False, options=cast(Any, options))
        run(*inputs)
        made = [each for each in dynamo.compilations() if each not in before]
    layers = tuple(code for each in made for code in _layers(each))
    if all(code.dense for code in layers):
        raise UserError(
            "Only sparse layers have code to compile, and this model calls none. Make one: sift rewrite MODEL --out FILE.pt2."
        )
    return CompiledModel(str(default_folder()), tune, threads, tuple(each.rest for each in made), layers)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)


def _layers(compilation: dynamo.Compilation) -> Iterator[LayerCode]:
    for first in compilation.first:
        yield from _codes(first.kernel, dense=True)
    for kernel in compilation.kernels:
        yield from _codes(kernel, dense=False)
    for path, reason in compilation.refused:
        yield LayerCode(path=path, input_shape=(), tile="", microseconds=None, reason=reason)


def _codes(kernel: LiveKernel, dense: bool) -> Iterator[LayerCode]:
    """One for every input shape that ``kernel`` saw."""
    if not isinstance(kernel, TvmKernel):
        return
    for plan in kernel.plans:
        yield LayerCode(
            path=kernel.name, input_shape=plan.input_shape, tile=" + ".join(str(part.tile) for part in plan.parts),
            microseconds=plan.microseconds, reason=plan.reason, dense=dense, candidates=candidates_of(plan, kernel.cpu),
        )  # fmt: skip
