"""Models pruned elsewhere: a dense layer whose weight holds many zeros, run as a sparse one in inference.

Whoever pruned the model left no mask but the zeros, so here, and only here, the mask is ``weight != 0``. That is right because nothing
trains: no gradient is computed in such a graph, a zero cannot be a weight that has only just been grown.

A weight is known by its memory and its version, which every in-place write raises; when either is new, the weight is read again.
A write past torch (through ``.data`` or a NumPy view) raises no version and is not seen.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.lowering.dense_layers import DenseLayer
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.options import Tune
from sift_compiler.runtimes.base import LiveKernel, Runtime
from sift_compiler.runtimes.recompile import MaskWatch

_log = logging.getLogger(__name__)
_RESTLESS = 8
"""Calls in a row with another weight each, after which reading it costs more than zeros can save."""
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class PrunedReport:
    """What became of a dense layer for one input shape, and why."""

    name: str
    sparsity: float
    """Share of zeros in the weight."""
    taken: bool
    """Whether sparse code runs it."""
    reason: str
    input_shape: tuple[int, ...] | None = None
    """None as long as it has not been called, and for layers left alone."""
    sparse_ms: float | None = None
    dense_ms: float | None = None

    @property
    def break_even(self) -> float | None:
        """Sparsity at which sparse code would take as long as dense, if its time is proportional to kept weights; None if not measured."""
        if self.sparse_ms is None or self.dense_ms is None:
            return None
        return break_even(self.sparsity, self.sparse_ms, self.dense_ms)

    def __str__(self) -> str:
        times = (
            "" if self.sparse_ms is None or self.dense_ms is None or self.break_even is None
            else f"; {self.sparse_ms:.3f} ms sparse, {self.dense_ms:.3f} ms dense, break-even at sparsity {self.break_even:.2f}"
        )  # fmt: skip
        return (
            f"{self.name}: {'sparse' if self.taken else 'dense'}, sparsity {self.sparsity:.3f} ({self.reason}{times})"
        )


def break_even(sparsity: float, sparse: float, dense: float) -> float:
    """Sparsity, in [0, 1], at which sparse code would take as long as dense, if its time is proportional to kept weights.

    Args:
        sparsity: at which ``sparse`` was measured.
        sparse, dense: times, in the same unit.
    """
    return min(1.0, max(0.0, 1 - (1 - sparsity) * dense / sparse))


def sparsity_of(weight: Tensor) -> float:
    """Share of zeros, in [0, 1]."""
    return 1 - int(torch.count_nonzero(weight)) / weight.numel() if weight.numel() else 0.0


def refuse(layer: DenseLayer, runtime: Runtime, threshold: float) -> str | None:
    """Why a dense layer stays as it is, or None."""
    if layer.refusal is not None:
        return layer.refusal
    sparsity = sparsity_of(layer.weight)
    if sparsity < threshold:
        return f"{sparsity:.0%} of its weight are zeros, sparse code is tried from {threshold:.0%} on"
    return runtime.refuse(layer.spec, str(layer.weight.device))


@dataclass
class _Sparse:
    """The weight as last read."""

    kernel: LiveKernel
    values: Tensor
    index: Tensor


class PrunedKernel:
    """A dense layer that runs as a sparse one where that measures faster (see nn.pruned.DenseKernel).

    Args:
        spec: the dense layer.
        name: its module path, for messages.
        runtime: who runs it when sparse.
        threads: workers of the sparse kernel.
        threshold: share of zeros below which the dense layer runs unmeasured.
        tune: whether the sparse kernel may time tiles.
        winograd: see :meth:`runtimes.base.Runtime.build`.
    """

    def __init__(
        self, spec: LayerSpec, name: str, runtime: Runtime, threads: int, threshold: float, tune: Tune = "off", winograd: int = 0
    ) -> None:  # fmt: skip
        self.spec, self.name = spec, name
        self._runtime, self._threads, self._threshold = runtime, threads, threshold
        self._tune, self._winograd = tune, winograd
        self._watch, self._unrest = MaskWatch(), 0
        self._sparsity = 0.0
        self._sparse: _Sparse | None = None
        self._reports: dict[tuple[int, ...], PrunedReport] = {}
        self.reads = 0
        """Times the weight was read because it was new or had changed."""

    @property
    def reports(self) -> tuple[PrunedReport, ...]:
        """One for every input shape seen."""
        return tuple(self._reports.values())

    @torch.no_grad()
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, C, H, W] or [..., in] → [N, M, H', W'] or [..., out], contiguous."""
        if self._unrest < _RESTLESS:
            if self._watch.moved(weight):
                self._unrest += 1
                self._read(weight)
            else:
                self._unrest = 0
        shape = tuple(x.shape)
        if shape not in self._reports:
            self._reports[shape] = self._decide(x, weight, bias)
            _log.info("%s", self._reports[shape])
        if self._sparse is not None and self._reports[shape].taken:
            return self._sparse.kernel(x, self._sparse.values, self._sparse.index, bias)
        return self._dense(x, weight, bias)

    def _read(self, weight: Tensor) -> None:
        """Take mask and values from ``weight``."""
        self.reads += 1
        self._watch.seen(weight)
        if self._unrest >= _RESTLESS:
            _log.warning("%s: its weight is another one at every call; it runs dense from now on.", self.name)
            self._sparse = None
            self._reports.clear()
            return
        flat = weight.detach().reshape(-1)
        self._sparsity = sparsity_of(flat)
        if self._sparsity < self._threshold:
            self._sparse = None
            self._reports.clear()
            return
        index = flat.nonzero().flatten().int()
        values = flat[index.long()]
        before = self._sparse
        if before is not None and before.kernel.spec.nnz == index.numel():
            moved = not torch.equal(before.index, index)
            self._sparse = _Sparse(before.kernel, values, index if moved else before.index)
            return
        spec = dataclasses.replace(self.spec, nnz=index.numel())
        self._sparse = _Sparse(
            self._runtime.build(spec, self.name, self._threads, tune=self._tune, freeze=True, winograd=self._winograd),
            values,
            index,
        )
        self._reports.clear()

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        spec = self.spec
        if spec.kind == "linear":
            return F.linear(x, weight, bias).contiguous()
        return F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups).contiguous()

    def _decide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> PrunedReport:
        sparse = self._sparse
        if sparse is None:
            reason = (
                "its weight changes at every call" if self._unrest >= _RESTLESS
                else f"fewer zeros than {self._threshold:.0%}"
            )  # fmt: skip
            return PrunedReport(
                name=self.name, sparsity=self._sparsity, taken=False, reason=reason, input_shape=tuple(x.shape)
            )
        milliseconds = _times(
            lambda: sparse.kernel(x, sparse.values, sparse.index, bias), lambda: self._dense(x, weight, bias)
        )
        faster = milliseconds[0] < milliseconds[1]
        return PrunedReport(
            name=self.name, sparsity=self._sparsity, taken=faster, input_shape=tuple(x.shape),
            reason="measured faster" if faster else "the dense layer measured faster",
            sparse_ms=milliseconds[0], dense_ms=milliseconds[1],
        )  # fmt: skip


def _times(*runs: Callable[[], object]) -> tuple[float, ...]:
    """Milliseconds of each: the best of a few interleaved calls, after one that does not count."""
    best = [float("inf")] * len(runs)
    for turn in range(_TRIES + 1):
        for position, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            if turn:
                best[position] = min(best[position], 1e3 * (time.perf_counter() - begin))
    return tuple(best)
