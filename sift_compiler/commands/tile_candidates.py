"""The tiles that come into question for a layer, and what each took where it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sift_compiler.lowering.candidates import candidates
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice, LayerPlan


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A tile for one part of a batch."""

    tile: str
    images: tuple[int, int]
    """First image (token) of the part, and how many."""
    side_by_side: bool
    """For images that lie side by side in vectors, as between the sparse convolutions of a compiled network."""
    microseconds: float | None
    """What its kernel took for these images, input packed beforehand; None if it was never measured."""
    taken: bool
    """Whether the layer runs on it."""


def candidates_of(plan: LayerPlan, cpu: CpuFacts) -> tuple[Candidate, ...]:
    """Every tile that was measured for ``plan``; where none was, those that ``sift compile --tune quick`` would measure.

    Args:
        plan: of a layer whose mask was known when it was made.
        cpu: what it was made for.
    """
    return tuple(each for part in plan.parts for each in _of_part(plan, part, cpu))


def _of_part(plan: LayerPlan, part: Choice, cpu: CpuFacts) -> Iterator[Candidate]:
    size = (plan.input_shape[2], plan.input_shape[3]) if plan.spec.kind == "conv2d" else (1, 1)
    times: dict[str, float | None] = {str(timing.tile): timing.microseconds for timing in part.timings}
    if not times:
        times = {str(tile): None for tile in candidates(plan.spec, part, size, cpu, "quick")}
    for tile, microseconds in times.items():
        yield Candidate(
            tile=tile, images=(part.first, part.count), side_by_side=len(plan.input_shape) == 5, microseconds=microseconds,
            taken=tile == str(part.tile),
        )  # fmt: skip
