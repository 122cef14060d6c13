"""Structure: what the mask of a layer must look like.

A structure is data on the layer. It sees the dense weight as groups of units of entries, ``layout`` int64 [groups, units, entries]:

    structure        a group is                        a unit is                       at most kept per group
    Unstructured     the whole weight                  an entry                        all
    NM(n, m)         m neighbouring inputs             an entry                        n
    TransposableNM   an m × m square                   an entry                        n per row and per column
    Block(r, c)      the whole weight                  r outputs × c inputs            all
    ConstantFanIn    an output                         an entry                        as many as every other output, or none
    Channel          the whole weight                  an output                       all

Inputs are the second dimension of a weight [out, in, kernel height, kernel width]; every position of a kernel has groups and units of its
own, but for ConstantFanIn and Channel, where a whole output belongs together. Whatever fits the limits may be kept, so any count that
whole units add up to is possible up to the largest, and FLOPs can be balanced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sift_compiler.errors import UserError, unknown_name
from sift_compiler.ir.pattern import Pattern, kept_entries
from sift_compiler.ir.transposable import transposable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """What all structures share; use one of its children."""

    equal: ClassVar[bool] = False
    """Whether all groups that keep anything keep the same number."""

    def layout(self, shape: Shape) -> Tensor:
        """Positions in the flattened weight, int64 [groups, units, entries], each exactly once.

        Raises:
            UserError: a weight of ``shape`` cannot have this structure.
        """
        raise NotImplementedError

    def most(self, shape: Shape) -> int:
        """Units a group may keep."""
        return self.layout(shape).shape[1]

    def granule(self, shape: Shape) -> int:
        """Kept counts are multiples of this many entries."""
        groups, _, entries = self.layout(shape).shape
        return groups * entries if self.equal else entries

    def largest(self, shape: Shape) -> int:
        """The most entries a weight of ``shape`` may keep."""
        groups, _, entries = self.layout(shape).shape
        return groups * self.most(shape) * entries

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Entries kept at ``sparsity``, rounded down to what the structure can keep (RigL's count where it can keep anything)."""
        granule = self.granule(shape)
        return min(kept_entries(math.prod(shape), sparsity), self.largest(shape)) // granule * granule

    def random(self, shape: Shape, nnz: int, generator: torch.Generator | None = None) -> Pattern:
        """Exactly ``nnz`` entries at random.

        Raises:
            UserError: the structure cannot keep exactly ``nnz`` of a weight of ``shape``.
        """
        scores = torch.rand(math.prod(shape), generator=generator)
        return Pattern.from_mask(self.project(scores.view(shape), nnz))

    def project(self, scores: Tensor, nnz: int, ties: Tensor | None = None) -> Tensor:
        """The mask of ``nnz`` entries whose ``scores`` add up to the most.

        Args:
            scores: finite, of the dense weight's shape.
            nnz: entries to keep.
            ties: int64 [numel]; among equal scores the larger wins.

        Returns:
            bool, of the shape of ``scores``.

        Raises:
            UserError: the structure cannot keep exactly ``nnz`` of such a weight.
        """
        shape = tuple(scores.shape)
        self.check_count(shape, nnz)
        layout = self.layout(shape).to(scores.device)
        groups, _, entries = layout.shape
        room = nnz // (groups * entries) if self.equal and groups else self.most(shape)
        by_unit = scores.reshape(-1)[layout].sum(-1)
        unit_ties = None if ties is None else ties[layout[..., 0]]
        rooms = torch.full((groups,), room, device=scores.device)
        chosen = best_units(by_unit, torch.ones_like(by_unit, dtype=torch.bool), rooms, nnz // entries, unit_ties)
        return scattered(chosen, layout, shape)

    def check_count(self, shape: Shape, nnz: int) -> None:
        """Raise UserError unless ``nnz`` entries of a weight of ``shape`` can be kept."""
        granule, largest = self.granule(shape), self.largest(shape)
        if not 0 <= nnz <= largest or nnz % granule:
            raise UserError(
                f"{self} cannot keep {nnz} of the {math.prod(shape)} entries of a weight of shape {shape}: it keeps at most {largest}, "
                f"in multiples of {granule}. Keep {min(nnz, largest) // granule * granule}."
            )

    def check(self, pattern: Pattern) -> None:
        """Raise UserError, naming the violation, unless ``pattern`` is sound and has this structure."""
        pattern.check()
        layout = self.layout(pattern.shape).to(pattern.index.device)
        units = pattern.mask().reshape(-1)[layout]
        whole = units.all(-1)
        torn = (units.any(-1) & ~whole).nonzero()
        if torn.numel():
            group, unit = torn[0].tolist()
            raise UserError(
                f"The pattern is not {self}: of unit {unit} of group {group} (entry {int(layout[group, unit, 0])} and on of shape "
                f"{pattern.shape}) {int(units[group, unit].sum())} of {units.shape[-1]} entries are kept; expected all or none."
            )
        self._check_groups(whole.sum(1), pattern.shape)

    def _check_groups(self, counts: Tensor, shape: Shape) -> None:
        most = self.most(shape)
        full = (counts > most).nonzero()
        if full.numel():
            group = int(full[0])
            raise UserError(
                f"The pattern of shape {shape} is not {self}: group {group} keeps {int(counts[group])}, expected at most {most}."
            )
        used = counts[counts > 0]
        if self.equal and used.numel() and bool((used != used[0]).any()):
            raise UserError(
                f"The pattern of shape {shape} is not {self}: outputs keep from {int(used.min())} to {int(used.max())} entries; expected "
                "the same number in every output that keeps any."
            )

    def to_plain(self) -> dict[str, Any]:
        """Name and sizes as plain data."""
        return {"name": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Unstructured(Structure):
    """Any entry may be kept."""

    def layout(self, shape: Shape) -> Tensor:
        """One group, its units the entries."""
        return torch.arange(math.prod(shape)).view(1, -1, 1)

    def most(self, shape: Shape) -> int:
        """All."""
        return math.prod(shape)

    def granule(self, shape: Shape) -> int:
        """1."""
        return 1

    def random(self, shape: Shape, nnz: int, generator: torch.Generator | None = None) -> Pattern:
        """See :meth:`Pattern.random`."""
        return Pattern.random(shape, nnz, generator)

    def check(self, pattern: Pattern) -> None:
        """Raise UserError unless ``pattern`` is sound."""
        pattern.check()


@dataclass(frozen=True)
class _Ratio(Structure):
    n: int
    """Most kept of a group (of a row and a column of a square)."""
    m: int
    """Size of a group (side of a square)."""

    def __post_init__(self) -> None:
        for size in (self.n, self.m):
            if isinstance(size, bool) or not isinstance(size, int):
                raise UserError(f"{self} is not possible: n and m must be whole numbers.")
        if not 0 < self.n <= self.m:
            raise UserError(f"{self} is not possible: n must be at least 1 and at most m.")


@dataclass(frozen=True)
class NM(_Ratio):
    """At most n of m neighbouring inputs are kept, for every output and kernel position (Zhou et al. 2021)."""

    def layout(self, shape: Shape) -> Tensor:
        """Groups along the inputs."""
        _divisible(self, shape, 1, self.m)
        last = torch.arange(math.prod(shape)).view(shape[0], shape[1], -1).transpose(1, 2)
        return last.reshape(-1, self.m, 1)

    def most(self, shape: Shape) -> int:
        """n."""
        return self.n


@dataclass(frozen=True)
class TransposableNM(_Ratio):
    """At most n of m in every row and every column of every m × m square over outputs and inputs, so that the transposed weight of the
    backward pass is N:M too (Hubara et al. 2021)."""

    exact: bool = True
    """Best mask of a square by an exact solver; otherwise the greedy 2-approximation of the paper."""

    def layout(self, shape: Shape) -> Tensor:
        """A group is a square, row by row."""
        _divisible(self, shape, 0, self.m)
        _divisible(self, shape, 1, self.m)
        m = self.m
        places = torch.arange(math.prod(shape)).view(shape[0] // m, m, shape[1] // m, m, -1)
        return places.permute(0, 2, 4, 1, 3).reshape(-1, m * m, 1)

    def most(self, shape: Shape) -> int:
        """n per row."""
        return self.n * self.m

    def project(self, scores: Tensor, nnz: int, ties: Tensor | None = None) -> Tensor:
        """As for all structures; by solving each square and, if fewer are kept, leaving out the smallest scores of all squares."""
        shape = tuple(scores.shape)
        self.check_count(shape, nnz)
        layout = self.layout(shape).to(scores.device)
        squares = scores.reshape(-1)[layout[..., 0]]
        order = None if ties is None else ties[layout[..., 0]]
        solved = transposable(squares.view(-1, self.m, self.m), self.n, exact=self.exact).flatten(1)
        rooms = torch.full((len(layout),), self.m * self.m, device=scores.device)
        return scattered(best_units(squares, solved, rooms, nnz, order), layout, shape)

    def check(self, pattern: Pattern) -> None:
        """Raise UserError, naming the violation, unless no row and no column of a square keeps more than n."""
        pattern.check()
        layout = self.layout(pattern.shape).to(pattern.index.device)
        squares = pattern.mask().reshape(-1)[layout[..., 0]].view(-1, self.m, self.m)
        for axis, name in ((2, "row"), (1, "column")):
            counts = squares.sum(axis)
            full = (counts > self.n).nonzero()
            if full.numel():
                square, line = full[0].tolist()
                raise UserError(
                    f"The pattern of shape {pattern.shape} is not {self}: {name} {line} of square {square} keeps "
                    f"{int(counts[square, line])}, expected at most {self.n}."
                )


@dataclass(frozen=True)
class Block(Structure):
    """Blocks of outputs × inputs are kept or removed as a whole, at every kernel position for itself."""

    rows: int
    """Outputs of a block."""
    columns: int
    """Inputs of a block."""

    def __post_init__(self) -> None:
        for size in (self.rows, self.columns):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise UserError(f"{self} is not possible: rows and columns must be whole numbers of at least 1.")

    def layout(self, shape: Shape) -> Tensor:
        """One group, its units the blocks."""
        _divisible(self, shape, 0, self.rows)
        _divisible(self, shape, 1, self.columns)
        r, c = self.rows, self.columns
        places = torch.arange(math.prod(shape)).view(shape[0] // r, r, shape[1] // c, c, -1)
        return places.permute(0, 2, 4, 1, 3).reshape(1, -1, r * c)


@dataclass(frozen=True)
class ConstantFanIn(Structure):
    """Every output keeps the same number of its inputs, or none where it is ablated (Lasby et al. 2024, SRigL)."""

    equal: ClassVar[bool] = True

    def layout(self, shape: Shape) -> Tensor:
        """A group is an output."""
        return torch.arange(math.prod(shape)).view(shape[0], -1, 1)


@dataclass(frozen=True)
class Channel(Structure):
    """Outputs are kept or removed as a whole."""

    def layout(self, shape: Shape) -> Tensor:
        """One group, its units the outputs."""
        return torch.arange(math.prod(shape)).view(1, shape[0], -1)


UNSTRUCTURED = Unstructured()
"""The structure of a layer that was given none."""

STRUCTURES: Mapping[str, type[Structure]] = {
    kind.__name__: kind for kind in (Unstructured, NM, TransposableNM, Block, ConstantFanIn, Channel)
}
"""Every structure by its name."""


def structure_from_plain(plain: Mapping[str, Any]) -> Structure:
    """The inverse of :meth:`Structure.to_plain`; UserError for a name that is not known."""
    options = dict(plain)
    name = options.pop("name", None)
    if name not in STRUCTURES:
        raise unknown_name("structure", name, STRUCTURES)
    return STRUCTURES[name](**options)


def best_units(scores: Tensor, allowed: Tensor, rooms: Tensor, count: int, ties: Tensor | None = None) -> Tensor:
    """Choose ``count`` units, at most ``rooms`` per group, with the largest scores; fewer where there are not as many.

    Greedy is optimal here: the limits form a matroid.

    Args:
        scores: [groups, units], finite.
        allowed: bool [groups, units], which may be chosen.
        rooms: whole numbers [groups].
        count: how many to choose.
        ties: int64 [groups, units]; among equal scores the larger wins, then the earlier.

    Returns:
        bool [groups, units].
    """
    fits = allowed
    if bool((rooms < allowed.sum(1)).any()):
        fits = _best_in_groups(scores.masked_fill(~allowed, -torch.inf), rooms, ties) & allowed
    candidates = fits.reshape(-1).nonzero().squeeze(1)
    if count < candidates.numel():
        order = None if ties is None else ties.reshape(-1)[candidates][None]
        found = scores.reshape(-1)[candidates][None]
        rooms = torch.full((1,), count, device=scores.device)
        candidates = candidates[_best_in_groups(found, rooms, order)[0]]
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[candidates] = True
    return chosen.view(scores.shape)


def _best_in_groups(scores: Tensor, rooms: Tensor, ties: Tensor | None) -> Tensor:
    """The ``rooms`` largest of every group, bool [groups, units]; all of a group with more room than units."""
    units = scores.shape[1]
    most = min(units, int(rooms.max())) if rooms.numel() else 0
    if most <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # topk's values are defined, its indices among equals are not; sorting all of a group would take many times longer.
    largest = scores.topk(most, dim=1).values
    threshold = largest.gather(1, (rooms.clamp(1, most) - 1)[:, None])
    above, tied = scores > threshold, scores == threshold
    left = rooms - above.sum(1)
    crowded = (tied.sum(1) > left).nonzero().squeeze(1)
    if crowded.numel():
        order = torch.zeros_like(tied[crowded], dtype=torch.long) if ties is None else ties[crowded]
        order = torch.where(tied[crowded], order, torch.iinfo(torch.long).min)
        place = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        tied[crowded] &= place < left[crowded, None]
    return (above | tied) & (rooms > 0)[:, None]


def scattered(chosen: Tensor, layout: Tensor, shape: Shape) -> Tensor:
    """The mask, bool of ``shape``, of the chosen units, bool [groups, units]."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=chosen.device)
    mask[layout[chosen].reshape(-1)] = True
    return mask.view(shape)


def _divisible(structure: Structure, shape: Shape, axis: int, size: int) -> None:
    if shape[axis] % size:
        raise UserError(
            f"{structure} does not fit a weight of shape {shape}: it has {shape[axis]} {('outputs', 'inputs')[axis]}, which must be a "
            f"multiple of {size}. Choose sizes that divide it, round widths to a multiple (round_to={size}), or use Unstructured() or "
            "ConstantFanIn()."
        )
