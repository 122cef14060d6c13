"""RowPart: a linear layer for few tokens, prepared so that a call only passes pointers. The counterpart of Part for row programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.row_program import BALANCED, RowProgram, column_type, pack_rows
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.tvm import kernels
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.part import Code
from sift_compiler.runtimes.tvm.program_values import ProgramValues
from sift_compiler.runtimes.tvm.row_kernel import few_tokens, one_token, pack_few_tokens
from sift_compiler.runtimes.tvm.target import gather_instruction
from sift_compiler.runtimes.tvm.workspace import scratch

_WEIGHTS_PER_WORKER = 16384
"""Kept weights below which another worker costs more than it saves."""


@dataclass(frozen=True)
class _Mask:
    """The program of the present mask, as tensors."""

    columns: Tensor
    starts: Tensor
    balanced: Tensor
    order: Tensor
    direct: bool

    @classmethod
    def of(cls, program: RowProgram, lanes: int) -> _Mask:
        """The same numbers as tensors, with a vector to spare."""
        # The last weights of a row are read as a whole vector, which may reach past the kept ones.
        columns = np.append(program.columns, np.zeros(lanes, program.columns.dtype))
        return cls(
            torch.from_numpy(columns), torch.from_numpy(program.starts), torch.from_numpy(program.balanced),
            torch.from_numpy(program.order), program.direct,
        )  # fmt: skip


class RowPart:
    """One choice of row programs, ready to run on ``choice.count`` tokens; see :class:`sift_compiler.runtimes.tvm.part.Part`.

    Args:
        spec: a linear layer with at least one vector of values.
        choice: its tile has lanes over "weights" (one token) or "tokens".
        cpu: the processor.
        threads: workers; with 1 no thread pool is touched.
        epilogue: what is done to finished sums.
        freeze: see program_values.
        recorded: see Part.
    """

    workspace_count = 1
    packed_values_position: int

    def __init__(
        self, spec: LayerSpec, choice: Choice, cpu: CpuFacts, threads: int, epilogue: Epilogue = PLAIN,
        freeze: bool = False, recorded: bool = False,
    ) -> None:  # fmt: skip
        self.spec, self.choice, self.threads, self._cpu, self._epilogue = spec, choice, threads, cpu, epilogue
        self._one = choice.tile.lanes == "weights"
        self.packed_values_position = 3 if self._one else 4
        self._mask: _Mask | None = None
        self._nothing = torch.ones(1)  # stands where the kernel reads nothing
        self._pack_kernel: Callable[..., Any] | None = None
        self._kernel: Callable[..., Any]
        self._values: ProgramValues | None = None
        if recorded:
            return
        packing, (generator, constants) = self.code()
        self._pack_kernel = packing and compiled(packing[0], cpu.name, **packing[1])
        self._kernel = compiled(generator, cpu.name, **constants)
        gather = compiled(kernels.gather, cpu.name, parallel=threads > 1)
        self._values = ProgramValues(gather, threads, freeze)

    program_key = "rows"
    """See Part; the program knows neither tiles nor tokens."""

    def share(self, other: object) -> None:
        """Use the program of another part of the same layer."""
        assert isinstance(other, RowPart)
        self._mask = other._mask

    def repack(self, index: np.ndarray[Any, np.dtype[np.int32]]) -> RowProgram:
        """Follow the mask ``index``: int32 [slots]."""
        program = pack_rows(index, self.spec)
        self._mask = _Mask.of(program, self._cpu.lanes)
        return program

    def run(self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish = NOTHING) -> None:
        """Compute ``y`` [count, out] from contiguous float32 ``x`` [count, in]; ``finish`` as in Part.run."""
        assert self._mask is not None, "a part is packed before it runs"
        values = self._in_order(values, self._mask)
        step = self.choice.count if self._one else self._tokens
        for first in range(0, x.shape[0], step):
            last = min(first + step, x.shape[0])
            self._run_together(x[first:last], values, bias, y[first:last], finish.rows(first, last))

    def _run_together(self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish) -> None:
        mask, spec, tokens = self._mask, self.spec, self._tokens
        assert mask is not None
        extra = tuple(self._nothing if t is None else t.view(-1) for t in (finish.scale, finish.shift, finish.residual))
        pieces = -(-spec.out_channels // (self._cpu.lanes if self._one else BALANCED))
        workers = max(1, min(self.threads, pieces, spec.nnz * tokens // _WEIGHTS_PER_WORKER))
        source, output = x.view(-1), y.view(-1)
        if self._one:
            sums = scratch("sums", workers * self._cpu.lanes**2)
            program: tuple[Tensor, ...] = (mask.columns, mask.starts)
            self._kernel(source, *program, values, bias, *extra, output, sums, workers, spec.out_channels)
            return
        assert self._pack_kernel is not None
        packed = scratch("packed", spec.in_channels * tokens)
        # The last token fills what is left.
        held = torch.arange(tokens, dtype=torch.int32).clamp_(max=x.shape[0] - 1)
        self._pack_kernel(source, held, packed, spec.in_channels)
        sums = scratch("sums", workers * (BALANCED + self._cpu.lanes) * tokens)
        program = (mask.columns, mask.starts, mask.balanced)
        self._kernel(packed, *program, values, bias, *extra, output, sums, workers, x.shape[0], spec.out_channels)

    def _in_order(self, values: Tensor, mask: _Mask) -> Tensor:
        """The values row by row: themselves, or a copy where the mask has moved weights between rows."""
        if mask.direct or self._values is None:
            return values
        return self._values.of(values, mask.order, values.numel())

    @property
    def _tokens(self) -> int:
        """Tokens side by side."""
        return self.choice.tile.vectors * self.choice.tile.vector

    # --- preparing ------------------------------------------------------------------------------------------------

    def code(self) -> tuple[Code | None, Code]:
        """What is compiled: the packing of the input (None for one token, which needs none) and the kernel."""
        lanes, columns = self._cpu.lanes, column_type(self.spec)
        shared = {"lanes": lanes, "columns": columns, "parallel": self.threads > 1, "epilogue": self._epilogue}
        if self._one:
            return None, (one_token, {**shared, "gather": gather_instruction(self._cpu.name)})
        packing = (pack_few_tokens, {"lanes": lanes, "tokens": self._tokens})
        return packing, (few_tokens, {**shared, "tokens": self._tokens, "rows": self.choice.tile.rows})

    def record(self, pack_kernel: Callable[..., Any] | None, kernel: Callable[..., Any]) -> None:
        """Hand the kernel calls of later runs to these instead of running them; values are not brought into order any more."""
        self._pack_kernel, self._kernel, self._values = pack_kernel, kernel, None
