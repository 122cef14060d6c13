"""PackedMask: the program of the present mask, as tensors that a kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sift_compiler.lowering.program import Program


@dataclass(frozen=True)
class PackedMask:
    """What lowering.program.Program holds, int32 tensors of at least one number."""

    stream: Tensor
    block_column: Tensor
    block_value: Tensor
    order: Tensor

    @classmethod
    def of(cls, program: Program) -> PackedMask:
        """The same numbers; they share the program's memory."""
        arrays = (program.stream, program.block_column, program.block_value, program.order)
        return cls(*(torch.from_numpy(a) if a.size else nothing() for a in arrays))


def nothing() -> Tensor:
    """What stands for an empty table: TVM refuses the null pointer of an empty tensor."""
    return torch.zeros(1, dtype=torch.int32)
