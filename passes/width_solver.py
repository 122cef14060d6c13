"""Solve equations between widths by substitution; what cannot be solved is pinned, which is always consistent."""

from __future__ import annotations

import math

from sift_compiler.errors import PassError
from sift_compiler.ir.width import Width, fixed


class WidthSolver:
    """Classes of sizes, what they are bound to, and why some may not grow."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.origins: list[str] = []
        self.pins: dict[str, str] = {}
        self._bound: dict[int, Width] = {}

    def fresh(self, size: int, origin: str) -> Width:
        """A new class of present ``size``, met at ``origin``."""
        self.sizes.append(size)
        self.origins.append(origin)
        return Width(((len(self.sizes) - 1, 1),))

    def resolve(self, width: Width) -> Width:
        """``width`` in terms of free classes."""
        result = Width((), width.constant, width.dynamic)
        for key, factor in width.terms:
            bound = self._bound.get(key)
            part = Width(((key, factor),)) if bound is None else self.resolve(bound).times(factor)
            result = result.plus(part)
        return result

    def size(self, width: Width) -> int:
        """The present size."""
        return self.resolve(width).size(self.sizes.__getitem__)

    def free_classes(self) -> list[int]:
        """Every class that may grow."""
        return [key for key in range(len(self.sizes)) if key not in self._bound]

    def pin(self, width: Width, reason: str) -> None:
        """Keep the size as it is."""
        for key, _ in self.resolve(width).terms:
            self._bound[key] = fixed(self.sizes[key])
            self.pins[self.origins[key]] = reason

    def unify(self, left: Width, right: Width, reason: str) -> None:
        """Make two widths the same; ``reason`` is kept where that means pinning.

        Raises:
            PassError: their present sizes differ, so the rule that asks is wrong.
        """
        left, right = self.resolve(left), self.resolve(right)
        if left == right:
            return
        if self.size(left) != self.size(right) and not (left.dynamic or right.dynamic):
            raise PassError(f"Sizes {self.size(left)} and {self.size(right)} cannot be one width ({reason}).")
        if left.fixed or right.fixed or not self._solve(left, right, reason):
            self.pin(left, reason)
            self.pin(right, reason)

    def _solve(self, left: Width, right: Width, reason: str) -> bool:
        return (
            self._bind(left, right)
            or self._bind(right, left)
            or self._bind_multiples(left, right)
            or self._unify_termwise(left, right, reason)
        )

    def _bind(self, single: Width, other: Width) -> bool:
        if len(single.terms) != 1 or single.constant or single.terms[0][1] != 1:
            return False
        key = single.terms[0][0]
        if any(key == each for each, _ in other.terms):
            return False
        self._bound[key] = other
        return True

    def _bind_multiples(self, left: Width, right: Width) -> bool:
        """a * x = b * y, with x and y multiples of a new class."""
        if len(left.terms) != 1 or len(right.terms) != 1 or left.constant or right.constant:
            return False
        (x, a), (y, b) = left.terms[0], right.terms[0]
        common = math.lcm(a, b)
        unit, rest = divmod(self.sizes[x], common // a)
        if x == y or rest:
            return False
        new = self.fresh(unit, self.origins[x])
        self._bound[x], self._bound[y] = new.times(common // a), new.times(common // b)
        return True

    def _unify_termwise(self, left: Width, right: Width, reason: str) -> bool:
        pairs = list(zip(left.terms, right.terms, strict=False))
        same = len(left.terms) == len(right.terms) and left.constant == right.constant
        if not same or any(self.sizes[x] * a != self.sizes[y] * b for (x, a), (y, b) in pairs):
            return False
        for first, second in pairs:
            self.unify(Width((first,)), Width((second,)), reason)
        return True
