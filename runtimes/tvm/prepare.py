"""Which part runs a choice."""

from __future__ import annotations

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.lane_part import LanePart
from sift_compiler.runtimes.tvm.pair_part import PairPart
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.row_part import RowPart
from sift_compiler.runtimes.tvm.winograd_lane_part import WinogradLanePart
from sift_compiler.runtimes.tvm.winograd_space_part import WinogradSpacePart

LayerPart = Part | RowPart | PairPart
"""What computes on kept weights alone."""
LivePart = LayerPart | LanePart | WinogradLanePart | WinogradSpacePart


def prepare(
    spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, threads: int, epilogue: Epilogue = PLAIN,
    freeze: bool = False, recorded: bool = False,
) -> LayerPart:  # fmt: skip
    """The part that runs ``choice`` on kept weights; arguments as those of :class:`Part`."""
    if choice.tile.lanes in ("weights", "tokens"):
        return RowPart(spec, choice, cpu, threads, epilogue, freeze, recorded)
    if choice.tile.lanes == "pairs":
        return PairPart(spec, choice, cpu, threads, epilogue, freeze, recorded)
    return Part(spec, choice, size, cpu, threads, epilogue, freeze, recorded)


def prepare_live(
    spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, threads: int, epilogue: Epilogue, freeze: bool,
    side_by_side: bool,
) -> LivePart:  # fmt: skip
    """The part that runs ``choice``, with images side by side before and after or in the usual order; arguments as those of :class:`Part`."""
    if choice.tile.lanes == "winograd":
        winograd = WinogradLanePart if side_by_side else WinogradSpacePart
        return winograd(spec, choice, size, cpu, threads, epilogue, freeze)
    if side_by_side:
        return LanePart(spec, choice, size, cpu, threads, epilogue, freeze)
    return prepare(spec, choice, size, cpu, threads, epilogue, freeze)
