"""PairPart: a linear layer for many tokens, prepared so that a call only passes pointers. The counterpart of Part for pair programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.pair_program import PairProgram
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.tvm import kernels
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.pair_kernel import pair_tile
from sift_compiler.runtimes.tvm.pair_packer import PairPacker
from sift_compiler.runtimes.tvm.part import Code
from sift_compiler.runtimes.tvm.program_values import ProgramValues
from sift_compiler.runtimes.tvm.shared import WORTH_A_WORKER
from sift_compiler.runtimes.tvm.target import host_cpu
from sift_compiler.runtimes.tvm.workspace import scratch

_PANEL = 1024
"""Rows of a panel: its partial sums should stay in the second-level cache, beside the tokens."""
_INDEX_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class _Mask:
    """The program of the present mask, as tensors of at least one number."""

    pairs: Tensor
    columns: Tensor
    starts: Tensor
    order: Tensor

    @classmethod
    def of(cls, program: PairProgram) -> _Mask:
        """The same numbers; TVM refuses the null pointer of an empty tensor."""
        arrays = (program.pairs.reshape(-1), program.columns, program.starts.reshape(-1), program.order)
        return cls(*(torch.from_numpy(each if each.size else np.zeros(1, each.dtype)) for each in arrays))


class PairPart:
    """One choice of pair programs, ready to run on ``choice.count`` tokens; see :class:`sift_compiler.runtimes.tvm.part.Part`.

    Args:
        spec: a linear layer.
        choice: its tile has lanes over "pairs".
        cpu: the processor.
        threads: workers; with 1 no thread pool is touched.
        epilogue: what is done to finished sums.
        freeze: see program_values.
        recorded: see Part.
    """

    workspace_count = 2
    packed_values_position = 4

    def __init__(
        self, spec: LayerSpec, choice: Choice, cpu: CpuFacts, threads: int, epilogue: Epilogue = PLAIN,
        freeze: bool = False, recorded: bool = False,
    ) -> None:  # fmt: skip
        self.spec, self.choice, self.threads, self._epilogue = spec, choice, threads, epilogue
        self._mask: _Mask | None = None
        self._nothing = torch.ones(1)  # stands where the kernel reads nothing
        self._panel = _panel_rows(spec.out_channels, threads, choice.tile.vector)
        packing_cpu = host_cpu() if recorded else cpu
        self._packer = PairPacker(spec, choice.tile.channels, self._panel, self._tile, packing_cpu.name)
        self._kernel: Callable[..., Any]
        self._values: ProgramValues | None = None
        if recorded:
            return
        generator, constants = self.code(inline=False)[1]
        self._kernel = compiled(generator, cpu.name, **constants)
        self._values = ProgramValues(compiled(kernels.gather, cpu.name, parallel=threads > 1), threads, freeze)

    @property
    def program_key(self) -> object:
        """Equal for parts whose program of a mask is the same."""
        return self._packer.key

    def share(self, other: object) -> None:
        """Use the program of ``other``, whose :attr:`program_key` is the same."""
        assert isinstance(other, PairPart)
        self._mask = other._mask

    def repack(self, index: np.ndarray[Any, np.dtype[np.int32]]) -> PairProgram:
        """Follow the mask ``index``: int32 [slots]."""
        program = self._packer.pack(torch.from_numpy(index))
        self._mask = _Mask.of(program)
        return program

    def run(self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish = NOTHING) -> None:
        """Compute ``y`` [count, out] from contiguous float32 ``x`` [count, in]; ``finish`` as in Part.run."""
        packed = self._in_order(values)
        step = self._tokens_at_once()
        for first in range(0, x.shape[0], step):
            # The last ones together with some before them: a call computes whole tiles.
            last = min(first + step, x.shape[0])
            first = min(first, max(0, last - self._tile))
            self._kernel(*self._arguments(x[first:last], packed, bias, finish.rows(first, last), y[first:last]))

    def trial(
        self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, share: float
    ) -> tuple[Callable[[], None], float]:
        """A call that computes about ``share`` of ``y``, at least a tile per worker; and how many times as long all of it takes.

        Arguments as those of :meth:`run`. Values are brought into order beforehand.
        """
        packed = self._in_order(values).clone()
        tiles = -(-x.shape[0] // self._tile)
        some = min(tiles, self.threads * max(1, round(share * tiles / self.threads)))
        tokens = min(x.shape[0], some * self._tile)
        arguments = self._arguments(x[:tokens], packed, bias, NOTHING, y[:tokens])
        return lambda: self._kernel(*arguments), tiles / some

    def _in_order(self, values: Tensor) -> Tensor:
        """The values in the program's order; as they are where kernel calls are only recorded."""
        assert self._mask is not None, "a part is packed before it runs"
        return values if self._values is None else self._values.of(values, self._mask.order, values.numel())

    def _arguments(self, x: Tensor, packed: Tensor, bias: Tensor, finish: Finish, y: Tensor) -> tuple[Any, ...]:
        """What the kernel takes."""
        mask, spec, tile = self._mask, self.spec, self.choice.tile
        assert mask is not None, "a part is packed before it runs"
        tokens, panels = x.shape[0], -(-spec.out_channels // self._panel)
        units = -(-tokens // self._tile) * panels
        worth = spec.nnz * -(-tokens // tile.vector) // WORTH_A_WORKER
        workers = max(1, min(self.threads, units, worth))
        extra = (self._nothing if t is None else t.view(-1) for t in (finish.scale, finish.shift, finish.residual))
        workspaces = (
            scratch("window", workers * spec.in_channels * self._tile),
            scratch("sums", workers * ((self._panel + 1) * self._tile + tile.vector**2)),
        )
        return (
            x.view(-1), mask.pairs, mask.columns, mask.starts, packed, bias, *extra, y.view(-1), *workspaces, workers, units, tokens,
            spec.in_channels, spec.out_channels, -(-spec.in_channels // tile.channels), tile.channels, panels, self._panel,
        )  # fmt: skip

    @property
    def _tile(self) -> int:
        """Tokens of a tile."""
        return self.choice.tile.vectors * self.choice.tile.vector

    def _tokens_at_once(self) -> int:
        """Whole tiles whose input and output are counted in 32 bits."""
        fits = _INDEX_LIMIT // max(self.spec.in_channels, self.spec.out_channels)
        return max(1, fits // self._tile) * self._tile

    # --- preparing ------------------------------------------------------------------------------------------------

    def code(self, inline: bool = True) -> tuple[Code | None, Code]:
        """What is compiled: nothing that packs the input, and the kernel, ``inline`` or of two functions."""
        tile = self.choice.tile
        constants = {
            "lanes": tile.vector, "vectors": tile.vectors, "parallel": self.threads > 1,
            "epilogue": self._epilogue, "inline": inline,
        }  # fmt: skip
        return None, (pair_tile, constants)

    def record(self, pack_kernel: Callable[..., Any] | None, kernel: Callable[..., Any]) -> None:
        """Hand the kernel calls of later runs to these instead of running them; values are not brought into order any more."""
        del pack_kernel
        self._kernel, self._values = kernel, None


def _panel_rows(rows: int, threads: int, lanes: int) -> int:
    """Rows of a panel: panels alike, whole cache lines of the output, and one for each worker where there is but one tile."""
    panels = max(-(-rows // _PANEL), min(threads, rows // lanes), 1)
    return max(1, -(-rows // panels // lanes)) * lanes
