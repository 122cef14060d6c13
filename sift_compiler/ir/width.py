"""Widths: what the size of a dimension is made of.

Widening couples dimensions through a graph. A *class* is a size that is free to grow; a *width* says how a dimension's size follows
from classes: ``C``, ``49 * C`` after a flatten of 7 x 7 pixels, ``A + B`` after a concatenation, or a plain number where nothing grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Width:
    """``sum(factor * class) + constant``; the terms stand in the order of a concatenation.

    Attributes:
        terms: pairs of a class and its factor, at least 1.
        constant: the part that never grows; the whole size where there are no terms.
        dynamic: the size is only known when the model runs (the batch); ``constant`` then is a stand-in.
    """

    terms: tuple[tuple[int, int], ...] = ()
    constant: int = 0
    dynamic: bool = False

    @property
    def fixed(self) -> bool:
        """Whether nothing in it can grow."""
        return not self.terms

    @property
    def factor(self) -> int:
        """The largest number that divides the width whatever its classes are."""
        return math.gcd(self.constant, *(factor for _, factor in self.terms))

    def times(self, number: int) -> Width:
        """The width of ``number`` copies."""
        return Width(tuple((key, factor * number) for key, factor in self.terms), self.constant * number, self.dynamic)

    def divided(self, number: int) -> Width:
        """One of ``number`` equal parts; ``number`` divides ``factor``."""
        assert self.factor % number == 0
        return Width(
            tuple((key, factor // number) for key, factor in self.terms), self.constant // number, self.dynamic
        )

    def plus(self, other: Width) -> Width:
        """The width of a concatenation."""
        return Width(_merged(self.terms + other.terms), self.constant + other.constant, self.dynamic or other.dynamic)

    def size(self, sizes: Callable[[int], int]) -> int:
        """The size, given that of every class."""
        return self.constant + sum(factor * sizes(key) for key, factor in self.terms)


def _merged(terms: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for key, factor in terms:
        if merged and merged[-1][0] == key:
            merged[-1] = (key, merged[-1][1] + factor)
        else:
            merged.append((key, factor))
    return tuple(merged)


def fixed(size: int, dynamic: bool = False) -> Width:
    """A width that never grows."""
    return Width((), size, dynamic)


@dataclass(frozen=True)
class Literal:
    """A number written in the graph that is a width.

    Attributes:
        node: name of the node that carries it.
        argument: name of the argument (of an operator) or attribute (of a module).
        position: place in a list argument, or None.
        width: what the number must be.
        power: the number is the width to this power; -0.5 for the scale of attention scores.
    """

    node: str
    argument: str
    position: int | None
    width: Width
    power: float = 1.0

    def number(self, sizes: Callable[[int], int]) -> int | float:
        """The number, given the size of every class."""
        size = self.width.size(sizes)
        return size if self.power == 1 else float(size) ** self.power


@dataclass(frozen=True)
class WidthTable:
    """The solved widths of a graph; every width is in terms of classes that are free.

    Attributes:
        sizes: present size of every free class.
        origins: where every free class was met first, for messages.
        tensors: widths of the dimensions of every parameter and buffer, by qualified name.
        literals: numbers in the graph that follow widths.
        pins: why a size that would have been free is fixed, by where it was met.
        head_widths: classes that are the width of one attention head.
        counts: classes that are numbers of attention heads or of groups, not of channels.
    """

    sizes: Mapping[int, int]
    origins: Mapping[int, str]
    tensors: Mapping[str, tuple[Width, ...]]
    literals: tuple[Literal, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    head_widths: frozenset[int] = frozenset()
    counts: frozenset[int] = frozenset()
