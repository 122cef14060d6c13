"""TvmKernel: one sparse layer as live machine code that follows its mask."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.plan import LayerPlan
from sift_compiler.lowering.program import Program
from sift_compiler.lowering.sharing import measured_loads
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.base import Specialisations
from sift_compiler.runtimes.recompile import MaskWatch
from sift_compiler.runtimes.tvm.input_gradient import InputGradient
from sift_compiler.runtimes.tvm.output import fresh_output
from sift_compiler.runtimes.tvm.prepare import LivePart, prepare_live
from sift_compiler.runtimes.tvm.tune import Tuner
from sift_compiler.runtimes.tvm.values_gradient import ValuesGradient
from sift_compiler.runtimes.tvm.workspace import scratch

_log = logging.getLogger(__name__)


class TvmKernel:
    """A live kernel (see runtimes.base.LiveKernel): any batch size, any mask of ``spec.nnz`` entries.

    Args:
        spec: the layer.
        name: its module path, for messages.
        threads: workers of the kernels.
        cpu: the processor to compile for.
        specialisations: counters to use, those of another kernel; by default its own.
        epilogue: what is done to finished sums; gradients know nothing of it.
        tuner: what chooses tiles, by measurements.
        freeze: bring values into the order of the program once (see program_values); gradients know nothing of it.
        winograd: largest tile of Winograd's convolution, 0 for none; gradients know nothing of it.
    """

    def __init__(
        self, spec: LayerSpec, name: str, threads: int, cpu: CpuFacts, specialisations: Specialisations | None = None,
        epilogue: Epilogue = PLAIN, tuner: Tuner | None = None, freeze: bool = False, winograd: int = 0,
    ) -> None:  # fmt: skip
        self.spec, self.name, self.threads, self.cpu, self.epilogue = spec, name, threads, cpu, epilogue
        self._freeze, self._winograd = freeze, winograd
        self.specialisations = specialisations or Specialisations(backward=Specialisations())
        backward = self.specialisations.backward or Specialisations()
        derived = functools.partial(
            TvmKernel,
            name=f"gradient of {name}",
            threads=threads,
            cpu=cpu,
            specialisations=backward,
            tuner=tuner,
        )
        self._input_gradient = InputGradient(spec, derived)
        self._watch = MaskWatch()
        self._shapes: dict[tuple[int, ...], tuple[LayerPlan, tuple[LivePart, ...], tuple[int, ...]]] = {}
        self._packed: dict[object, LivePart] = {}
        self._programs: dict[object, Program] = {}
        # No method of this kernel: in a cycle it would outlive the compiled function.
        known = functools.partial(_known, self._watch, self._programs)
        self._values_gradient = ValuesGradient(spec, name, threads, cpu, backward, known)
        self._tuner = tuner or Tuner()
        self._no_bias = torch.zeros(spec.out_channels)

    def plan(self, input_shape: tuple[int, ...], index: Tensor | None = None) -> LayerPlan:
        """How an input of ``input_shape`` would be computed; nothing is compiled.

        With the mask ``index`` its structure counts, and what was measured, or is measured if the tuner may; without it only the rules do.
        """
        self._check(input_shape)
        known = self._shapes.get(tuple(input_shape))
        if known is not None:
            return known[0]
        loads = None if index is None else measured_loads(index.numpy(), self.spec)
        parts = choose(
            self.spec, self._flat(input_shape), self.cpu, loads=loads, largest=self._winograd, frozen=self._freeze
        )
        if index is not None:
            host, size, side_by_side = index.numpy(), self._size(input_shape), len(input_shape) == 5
            parts = tuple(
                self._tuner.choose(self.spec, part, size, host, self.cpu, self.threads, side_by_side) for part in parts
            )
        return LayerPlan(name=self.name, spec=self.spec, input_shape=tuple(input_shape), runtime="tvm", parts=parts)

    @property
    def plans(self) -> tuple[LayerPlan, ...]:
        """One for every input shape seen."""
        return tuple(plan for plan, _, _ in self._shapes.values())

    @property
    def programs(self) -> int:
        """Programs of the mask that are kept."""
        return len(self._packed)

    def prepare(self, input_shape: tuple[int, ...], index: Tensor | None) -> None:
        """Make code and program for an input of ``input_shape``; tiles that are to be measured are left to the first call.

        Raises:
            UserError: the layer does not take such an input.
            RuntimeBuildError: the kernel cannot be compiled.
        """
        if index is None or self._tuner.level != "off" or input_shape in self._shapes:
            return
        if self._watch.moved(index):
            self._follow(index)
        self._prepare(input_shape, index)

    def __call__(
        self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, finish: Finish = NOTHING
    ) -> Tensor:
        """x [N, C, H, W] or [..., in] → [N, M, H', W'] or [..., out], contiguous float32; ``finish`` holds what the epilogue needs.

        With images side by side (see nn.image_vectors): [N / lanes, C, H, W, lanes] → [N / lanes, M, H', W', lanes].
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._call(x, values, index, bias, finish)
        return self._call(x, values, index, bias, finish)

    def _call(self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, finish: Finish) -> Tensor:
        if self._watch.moved(index):
            self._follow(index)
        shape = tuple(x.shape)
        prepared = self._shapes.get(shape)
        if prepared is None:
            prepared = self._prepare(shape, index)
        x, values = _plain(x), _plain(values)
        bias = self._no_bias if bias is None else _plain(bias)
        _, parts, output_shape = prepared
        y = fresh_output(output_shape)
        if y.numel():
            self._run(parts, x, values, bias, y, finish.contiguous())
        self.specialisations.calls += 1
        return y

    @torch.no_grad()
    def input_gradient(self, gradient: Tensor, values: Tensor, index: Tensor, input_shape: Sequence[int]) -> Tensor:
        """dL/dx of ``input_shape``, contiguous float32, from dL/dy [N, M, H', W'] or [..., out]."""
        self._check(tuple(input_shape))
        return self._input_gradient(gradient, values, index, tuple(input_shape))

    @torch.no_grad()
    def values_gradient(self, gradient: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """dL/dvalues [slots] from dL/dy and the layer's input: slots that are asleep get theirs, empty ones 0."""
        if not gradient.numel() or not index.numel():
            return torch.zeros(index.shape)
        gradient, x = gradient.detach().contiguous(), x.detach().contiguous()
        if self.spec.kind == "linear":
            gradient, x = gradient.view(-1, gradient.shape[-1]), x.view(-1, x.shape[-1])
        return self._values_gradient(gradient, x, index)

    # --- one call ---------------------------------------------------------------------------------------------------

    def _run(
        self, parts: tuple[LivePart, ...], x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish
    ) -> None:
        linear = self.spec.kind == "linear"
        source = x.view(-1, x.shape[-1]) if linear and x.dim() != 2 else x
        target = y.view(-1, y.shape[-1]) if linear and y.dim() != 2 else y
        finish = finish.like(target)
        if self.spec.nnz == 0 or self.spec.in_channels == 0:
            target.copy_(bias if linear else bias.view(-1, *(1 for _ in target.shape[2:])))
            target.copy_(finish.apply(target, self.epilogue.activation, 1))
            return
        if x.dim() == 5:
            parts[0].run(source, values, bias, target, finish)
            return
        for part in parts:
            first, last = part.choice.first, part.choice.first + part.choice.count
            inside = min(last, source.shape[0])
            if last == inside:
                whole = part.choice.count == source.shape[0]
                if whole:
                    part.run(source, values, bias, target, finish)
                else:
                    part.run(source[first:last], values, bias, target[first:last], finish.rows(first, last))
            else:
                rows = slice(first, inside)
                self._run_padded(part, source[rows], values, bias, target[rows], finish.rows(first, inside))

    def _run_padded(self, part: LivePart, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish) -> None:
        """Fewer images (tokens) than a vector has lanes: the lanes that are left over compute what nobody reads."""
        count, real = part.choice.count, x.shape[0]
        source = scratch("padded_x", count * x[0].numel())[: count * x[0].numel()].view(count, *x.shape[1:])
        target = scratch("padded_y", count * y[0].numel())[: count * y[0].numel()].view(count, *y.shape[1:])
        source[:real].copy_(x)
        source[real:].zero_()
        if finish.residual is not None:
            residual = scratch("padded_residual", target.numel())[: target.numel()].view(target.shape)
            residual[:real].copy_(finish.residual)
            residual[real:].zero_()
            finish = dataclasses.replace(finish, residual=residual)
        part.run(source, values, bias, target, finish)
        y.copy_(target[:real])

    # --- getting ready ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(
        self, shape: tuple[int, ...], index: Tensor
    ) -> tuple[LayerPlan, tuple[LivePart, ...], tuple[int, ...]]:
        plan = self.plan(shape, index)
        size = self._size(shape)
        begin = time.perf_counter()
        parts = tuple(
            prepare_live(self.spec, part, size, self.cpu, self.threads, self.epilogue, self._freeze, len(shape) == 5)
            for part in plan.parts
        )
        self.specialisations.builds += len(parts)
        self.specialisations.build_ms += 1e3 * (time.perf_counter() - begin)
        self._pack(parts, index)
        _log.info("%s: %s for %s (%s)", self.name, " + ".join(str(p.tile) for p in plan.parts), shape, plan.reason)
        self._shapes[shape] = (plan, parts, self._output_shape(shape))
        return self._shapes[shape]

    def _pack(self, parts: Sequence[LivePart], index: Tensor) -> None:
        """Bring ``parts`` up to date with the mask. Those that order it alike, for other sizes of batch, share one program."""
        for part in parts:
            alike = self._packed.setdefault(part.program_key, part)
            if alike is part:
                self._keep(part.program_key, part.repack(index.numpy()))
            else:
                part.share(alike)

    def _keep(self, key: object, program: object) -> None:
        # A part holds what is in it anyway. Of programs of rows it holds a copy, and no gradient takes them.
        if isinstance(program, Program):
            self._programs[key] = program

    def _follow(self, index: Tensor) -> None:
        """The mask has moved: pack its programs anew for every shape seen; no code is compiled."""
        if index.numel() != self.spec.nnz:
            raise UserError(
                f"{self.name}: the kernel was built for {self.spec.nnz} kept weights, the index has {index.numel()}."
            )
        parts = [part for _, parts, _ in self._shapes.values() for part in parts]
        if parts:
            begin = time.perf_counter()
            self._packed.clear()
            self._programs.clear()
            self._pack(parts, index)
            spent = 1e3 * (time.perf_counter() - begin)
            counters = self.specialisations
            counters.repacks, counters.repack_ms, counters.last_repack_ms = (
                counters.repacks + 1,
                counters.repack_ms + spent,
                spent,
            )
            _log.info("%s: mask moved, programs repacked in %.1f ms", self.name, spent)
        self._watch.seen(index)

    # --- shapes -----------------------------------------------------------------------------------------------------

    def _size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[2], shape[3]) if self.spec.kind == "conv2d" else (1, 1)

    def _flat(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.spec.kind == "conv2d" else (math.prod(shape[:-1]), shape[-1])

    def _check(self, shape: tuple[int, ...]) -> None:
        spec = self.spec
        if spec.kind == "linear":
            if not shape or shape[-1] != spec.in_channels:
                raise UserError(
                    f"{self.name}: expected an input of shape [..., {spec.in_channels}], got {list(shape)}."
                )
        elif len(shape) not in (4, 5) or shape[1] != spec.in_channels or shape[4:] not in ((), (self.cpu.lanes,)):
            raise UserError(
                f"{self.name}: expected an input of shape [N, {spec.in_channels}, H, W], or [N / {self.cpu.lanes}, {spec.in_channels}, "
                f"H, W, {self.cpu.lanes}], got {list(shape)}."
            )
        elif min(spec.output_size(shape[2], shape[3])) < 1:
            raise UserError(
                f"{self.name}: an input of {shape[2]} × {shape[3]} leaves no output for a kernel of {spec.kernel_size}, "
                f"padding {spec.padding}, dilation {spec.dilation}. Give a larger input."
            )

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.spec.kind == "linear":
            return (*shape[:-1], self.spec.out_channels)
        return (shape[0], self.spec.out_channels, *self.spec.output_size(shape[2], shape[3]), *shape[4:])


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it, contiguous and without gradients."""
    return tensor.detach().contiguous() if tensor.requires_grad or not tensor.is_contiguous() else tensor


def _known(watch: MaskWatch, programs: Mapping[object, Program], key: object, index: Tensor) -> Program | None:
    """The program of ``index`` among those of the layer's own parts with this ``program_key``, if there is one."""
    return None if watch.moved(index) else programs.get(key)
