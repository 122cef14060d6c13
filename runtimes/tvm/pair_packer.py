"""PairPacker: packs masks of one linear layer into pair programs with the compiled packer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.lowering.pair_program import COLUMN, FIELDS, LARGEST_COLUMN, PairProgram
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.pair_pack_kernel import MARKS, pack_mask_in_pairs
from sift_compiler.runtimes.tvm.workspace import scratch


class PairPacker:
    """Same arguments and same result as :func:`sift_compiler.lowering.pair_program.pack_pairs`, many times as fast.

    Args:
        spec: a linear layer.
        channels: input features of a block.
        panel: rows of a panel.
        unit: float32 numbers of a feature in a window and of a row in the sums.
        cpu: the compiler's name of the processor.

    Raises:
        UserError: a block is too long for columns of two bytes.
    """

    def __init__(self, spec: LayerSpec, channels: int, panel: int, unit: int, cpu: str) -> None:
        if (channels - 1) * (unit // COLUMN) > LARGEST_COLUMN:
            raise UserError(
                f"A block of {channels} channels, {unit} numbers each, is longer than the two bytes of a column reach. Take fewer channels."
            )
        self._spec, self._channels, self._panel, self._unit = spec, channels, panel, unit
        self.key = ("pairs", channels, panel, unit)
        """What the order of a program depends on, but for the layer."""
        self._blocks, self._words = -(-spec.in_channels // channels), -(-channels // MARKS)
        block, inside = np.divmod(np.arange(max(1, spec.in_channels)), channels)
        self._places = torch.from_numpy((block * self._words * MARKS + inside).astype(np.int32))
        self._kernel = compiled(pack_mask_in_pairs, cpu)

    @property
    def pairs(self) -> int:
        """Pairs of all panels and blocks."""
        rows, panel = self._spec.out_channels, self._panel
        whole, rest = divmod(rows, panel)
        return self._blocks * (whole * ((panel + 1) // 2) + (rest + 1) // 2)

    def pack(self, index: Tensor) -> PairProgram:
        """The program of ``index``: int32 [slots], distinct flat positions in the dense weight; a negative one is not in the mask."""
        spec, slots = self._spec, index.numel()
        panels = -(-spec.out_channels // self._panel)
        pairs = torch.zeros(max(1, self.pairs * FIELDS), dtype=torch.int32)
        columns = torch.zeros(max(1, slots), dtype=torch.int16)
        starts = torch.zeros(max(1, panels * self._blocks * 2), dtype=torch.int32)
        # What is not kept has no place in the order; the rest of it is zero.
        order = torch.zeros(max(1, slots), dtype=torch.int32)
        self._kernel(
            index.contiguous(), self._places, *self._scratch(slots), pairs, columns, starts, order,
            slots, spec.in_channels, spec.out_channels, self._blocks, self._words, self._channels, self._panel, self._unit,
            self._unit // COLUMN, 1 / max(1, spec.in_channels),
        )  # fmt: skip
        shared = int(pairs[2 : self.pairs * FIELDS : FIELDS].sum())
        kept = shared + int(pairs[2::FIELDS].sum() + 2 * pairs[3::FIELDS].sum() + pairs[4::FIELDS].sum())
        return PairProgram(
            pairs[: self.pairs * FIELDS].view(-1, FIELDS).numpy(), columns[: kept - shared].numpy(),
            starts[: panels * self._blocks * 2].view(-1, 2).numpy(), order[:slots].numpy(),
        )  # fmt: skip

    def _scratch(self, slots: int) -> tuple[Tensor, ...]:
        """What the kernel works in; bits are zero before."""
        rows, row_words = self._spec.out_channels, self._blocks * self._words
        pairs = (self._panel + 2) * FIELDS
        return (
            _integers("groups", rows + 1), _integers("positions", slots), _integers("slots", slots), _integers("cells", row_words * MARKS),
            torch.zeros((rows + 1) * row_words, dtype=torch.int64), _integers("sorted", slots), _integers("begins", (rows + 1) * self._blocks + 1),
            _integers("counts", self._panel + 2), _integers("rows", self._panel + 2), _integers("successors", self._panel + 2),
            _integers("histogram", self._channels + 2), _integers("pairs", pairs), _integers("by_one", pairs), _integers("by_both", pairs),
        )  # fmt: skip


def _integers(purpose: str, size: int) -> Tensor:
    return scratch(purpose, size).view(torch.int32)
