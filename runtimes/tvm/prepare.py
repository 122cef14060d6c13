"""Which part runs a choice."""

from __future__ import annotations

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.lane_part import LanePart
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.row_part import RowPart

LayerPart = Part | RowPart | LanePart


def prepare(
    spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, threads: int, epilogue: Epilogue = PLAIN,
    image_vectors: bool = False,
) -> LayerPart:  # fmt: skip
    """The part that runs ``choice``; arguments as those of :class:`Part`. ``image_vectors``: images lie side by side already."""
    if image_vectors:
        return LanePart(spec, choice, size, cpu, threads, epilogue)
    if choice.tile.lanes in ("weights", "tokens"):
        return RowPart(spec, choice, cpu, threads, epilogue)
    return Part(spec, choice, size, cpu, threads, epilogue)
