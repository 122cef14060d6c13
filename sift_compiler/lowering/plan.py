"""LayerPlan and KernelPlan: what lowering decided, with its reasons, as frozen data that a runtime and a reader both understand."""

from __future__ import annotations

from dataclasses import dataclass

from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A tile that was measured, and its time; see :class:`Choice` and runtimes.tvm.tune for how many images (tokens)."""

    tile: Tile
    microseconds: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A tile, the part of the batch it computes, and why it was taken."""

    tile: Tile
    first: int
    """First image (token) it computes."""
    count: int
    """Images (tokens) it computes; parts may overlap by computing some twice."""
    reason: str
    microseconds: float | None = None
    """What its kernel takes on inputs packed beforehand, if tiles were measured."""
    rivals: tuple[Tile, ...] = ()
    """Tiles of the other kind, on kept weights alone or with zeros multiplied, that tuning should time, too."""
    timings: tuple[Timing, ...] = ()
    """The tiles that were measured, the rules' first, with times for ``count`` images (tokens); empty if none were."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer runs for one input shape."""

    name: str
    """The layer's module path."""
    spec: LayerSpec
    input_shape: tuple[int, ...]
    runtime: str
    parts: tuple[Choice, ...]
    """Usually one; two where a batch is not a multiple of the vector."""

    @property
    def microseconds(self) -> float | None:
        """What its parts take together, if all were measured; see :class:`Choice`."""
        times = [part.microseconds for part in self.parts if part.microseconds is not None]
        return sum(times) if times and len(times) == len(self.parts) else None

    @property
    def tile(self) -> Tile:
        """The tile of the largest part."""
        return max(self.parts, key=lambda part: part.count).tile

    @property
    def reason(self) -> str:
        """Why these tiles."""
        return "; ".join(part.reason for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """The plans of a graph's sparse layers, in the order they run."""

    layers: tuple[LayerPlan, ...]

    @property
    def microseconds(self) -> float | None:
        """Sum of the measured times, None unless every layer was measured."""
        times = [layer.microseconds for layer in self.layers]
        return None if None in times else sum(time for time in times if time is not None)
