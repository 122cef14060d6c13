"""The gradient of a layer's kept values, for any input, following its mask."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sift_compiler.ir.pattern import EMPTY, entry_of
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.program import Program
from sift_compiler.lowering.sharing import measured_loads
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import reference
from sift_compiler.runtimes.base import Specialisations
from sift_compiler.runtimes.recompile import MaskWatch
from sift_compiler.runtimes.tvm.sampled_part import SampledPart
from sift_compiler.runtimes.tvm.workspace import scratch

_log = logging.getLogger(__name__)

_PACKED_BYTES = 64 * 1024 * 1024
"""Packed input and output gradient held at once, unless one group of images needs more."""
_INDEX_LIMIT = 2**31 - 1
_MOST_DENSITY = 0.6
"""Above it the dense gradient is quicker: at .5 the sampled kernel measured 1.1 to 1.4 times as fast as torch (docs/performance.md), and
its time grows with the number of weights while that of the dense gradient does not."""


def dense_reason(spec: LayerSpec) -> str | None:
    """Why the gradient of a layer's values is gathered from the dense one, or None if it is computed by itself."""
    entries = math.prod(spec.weight_shape)
    if spec.nnz > _MOST_DENSITY * entries:
        return f"{spec.nnz} of {entries} weights have values: the dense gradient is quicker above {_MOST_DENSITY:.0%}"
    return None


@dataclass(frozen=True)
class _Stretch:
    """Images (tokens) ``first`` … ``last`` - 1, and who computes them."""

    part: SampledPart
    first: int
    last: int


class ValuesGradient:
    """dL/dvalues of one layer.

    Args:
        spec: the layer.
        name: its module path, for messages.
        threads: workers of the kernels.
        cpu: the processor to compile for.
        counters: what is counted here.
        known: gives the program of a mask if the layer's own kernel has packed it, by what its order depends on and the index.
    """

    def __init__(
        self, spec: LayerSpec, name: str, threads: int, cpu: CpuFacts, counters: Specialisations,
        known: Callable[[object, Tensor], Program | None],
    ) -> None:  # fmt: skip
        self._spec, self._name, self._threads, self._cpu, self._counters = spec, name, threads, cpu, counters
        self._known, self._watch = known, MaskWatch()
        self._shapes: dict[tuple[int, ...], tuple[_Stretch, ...]] = {}
        reason = dense_reason(spec)
        if reason is not None:
            _log.info("%s: gradient of values from the dense gradient: %s", name, reason)

    def __call__(self, gradient: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """dL/dvalues [slots] from contiguous float32 dL/dy [n, M, H', W'] or [n, out] and x [n, C, H, W] or [n, in]."""
        if dense_reason(self._spec) is not None:
            return self._by_way_of_dense(gradient, x, index)
        if self._watch.moved(index):
            self._follow(index)
        shape = tuple(x.shape)
        if shape not in self._shapes:
            self._shapes[shape] = self._prepare(shape, index)
        total = torch.zeros(index.numel())
        for stretch in self._shapes[shape]:
            source, upstream = x[stretch.first : stretch.last], gradient[stretch.first : stretch.last]
            lanes = stretch.part.tile.vector
            if stretch.part.tile.lanes == "batch" and source.shape[0] % lanes:
                source, upstream = _padded("padded_x", source, lanes), _padded("padded_y", upstream, lanes)
            total += stretch.part.run(source, upstream)
        self._counters.calls += 1
        return total

    def _by_way_of_dense(self, gradient: Tensor, x: Tensor, index: Tensor) -> Tensor:
        spec = self._spec
        if spec.kind == "linear":
            return reference.gather(reference.linear_weight_gradient(gradient, x), index)
        dense = reference.conv2d_weight_gradient(
            gradient, x, spec.weight_shape, spec.stride, spec.padding, spec.dilation, spec.groups
        )
        return reference.gather(dense, index)

    def _prepare(self, shape: tuple[int, ...], index: Tensor) -> tuple[_Stretch, ...]:
        size = (shape[2], shape[3]) if self._spec.kind == "conv2d" else (1, 1)
        loads = measured_loads(index.numpy(), self._spec)
        begin, stretches, done = time.perf_counter(), [], 0
        for choice in choose(self._spec, shape, self._cpu, whole_vectors=True, loads=loads):
            part = SampledPart(self._spec, choice.tile, choice.count, size, self._cpu, self._threads)
            self._counters.builds += 1
            self._repack(part, index)
            last = min(choice.first + choice.count, shape[0])
            step = self._items_at_once(part)
            stretches += [_Stretch(part, first, min(first + step, last)) for first in range(done, last, step)]
            done = last
            _log.info("%s: gradient of values by %s for %s", self._name, choice.tile, shape)
        self._counters.build_ms += 1e3 * (time.perf_counter() - begin)
        return tuple(stretches)

    def _items_at_once(self, part: SampledPart) -> int:
        """Images (tokens) per kernel call: within the packed budget and 32-bit indices, and enough for all workers."""
        if part.tile.lanes == "space":
            return part.images
        group = part.packed_per_group
        groups = max(1, min(max(_PACKED_BYTES // (4 * group), self._threads * part.tile.width), _INDEX_LIMIT // group))
        return groups * part.tile.vector

    def _follow(self, index: Tensor) -> None:
        """The mask has moved: pack its programs anew for every shape seen; no code is compiled."""
        parts = {id(stretch.part): stretch.part for made in self._shapes.values() for stretch in made}
        if parts:
            begin = time.perf_counter()
            for part in parts.values():
                self._repack(part, index)
            counters = self._counters
            counters.last_repack_ms = 1e3 * (time.perf_counter() - begin)
            counters.repack_ms += counters.last_repack_ms
            counters.repacks += 1
        self._watch.seen(index)

    def _repack(self, part: SampledPart, index: Tensor) -> None:
        if index.numel() and int(index.min()) < EMPTY:
            # Slots that sleep get a gradient, too: another mask than the forward pass has.
            part.repack(entry_of(index).int())
        else:
            part.repack(index, self._known(part.program_key, index))


def _padded(purpose: str, tensor: Tensor, lanes: int) -> Tensor:
    """``tensor`` with zero images (tokens) up to whole vectors."""
    count = -(-tensor.shape[0] // lanes) * lanes
    inner = tensor[0].numel()
    made = scratch(purpose, count * inner)[: count * inner].view(count, *tensor.shape[1:])
    made[: tensor.shape[0]].copy_(tensor)
    made[tensor.shape[0] :].zero_()
    return made
