"""Everything a user can choose, as frozen keyword-only dataclasses.

An option is checked when it is made, so that a wrong one fails where it was written, not minutes later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sift_compiler.errors import UserError, unknown_name

Initialisation = Literal["paper", "default"]
Decay = Literal["cosine", "constant"]
Distribution = Literal["uniform"]

_Options = TypeVar("_Options")


def _refuse(owner: object, field: str, expected: str) -> UserError:
    return UserError(
        f"{type(owner).__name__}({field}={getattr(owner, field)!r}) is not possible: {field} must be {expected}."
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SparseWide:
    """Widen every hidden layer by (1 - sparsity)^(-1/2) and sparsify it, at equal FLOPs (Sparse-IFT, Sec. 3.2.1)."""

    sparsity: float
    """Share of weights removed from a widened layer, in [0, 1); it sets the widening. The sparsity that is applied is the one that balances FLOPs."""
    round_to: int = 8
    """Widths are rounded to the nearest multiple of this, at least 1. With 1 widths are rounded down, as the released code of the paper does."""
    dense: tuple[str, ...] = ()
    """Module paths (shell patterns such as ``"layer1.*"``) that stay dense, besides the first convolution and the classifier."""
    pin: tuple[str, ...] = ()
    """Module paths or node names (shell patterns) whose sizes, in and out, stay as they are; for operators without a width rule."""
    seed: int = 0
    """Seed of the random masks and of the new weights."""
    init: Initialisation = "paper"
    """``"paper"``: Kaiming normal fan-out for convolutions and zero for the last norm of a residual block; ``"default"``: each module's own."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise _refuse(self, "sparsity", "at least 0 and below 1")
        if self.round_to < 1:
            raise _refuse(self, "round_to", "at least 1")
        if self.init not in ("paper", "default"):
            raise unknown_name("initialisation", self.init, ("paper", "default"))

    @property
    def widening(self) -> float:
        """Factor on every hidden width, (1 - sparsity)^(-1/2)."""
        return float((1 - self.sparsity) ** -0.5)


@dataclass(frozen=True, kw_only=True)
class MaskMethod:
    """What all methods that keep or move masks share; use one of its children."""

    seed: int = 0
    """Seed of every random choice of the method."""

    def __post_init__(self) -> None:
        if not _whole(self.seed):
            raise _refuse(self, "seed", "a whole number")

    @property
    def name(self) -> str:
        """The method's name in the literature."""
        return type(self).__name__


@dataclass(frozen=True, kw_only=True)
class Static(MaskMethod):
    """The mask drawn at the rewrite never moves."""


@dataclass(frozen=True, kw_only=True)
class _Dynamic(MaskMethod):
    delta_t: int = 100
    """Optimizer steps between two mask updates, at least 1."""
    drop_fraction: float = 0.3
    """Share of a layer's active weights replaced at the first update, in [0, 1]."""
    begin_step: int = 0
    """First optimizer step at which masks move. Steps are counted from 0, so with 0 they move on the very first gradient."""
    end_step: int = -1
    """Masks rest from this optimizer step on; it must be given. The papers use 75 % of training."""
    decay: Decay = "cosine"
    """How the drop fraction falls: ``"cosine"`` to 0 at ``end_step`` (α/2 · (1 + cos(π t / end_step))), or not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end_step == -1:
            raise UserError(
                f"{self.name} needs end_step, the optimizer step from which on masks rest. The papers use 75 % of "
                f"training: {self.name}(end_step=int(0.75 * epochs * len(loader)))."
            )
        for field in ("delta_t", "begin_step", "end_step"):
            if not _whole(getattr(self, field)):
                raise _refuse(self, field, "a whole number")
        if self.delta_t < 1:
            raise _refuse(self, "delta_t", "at least 1")
        if not isinstance(self.drop_fraction, int | float) or not 0 <= self.drop_fraction <= 1:
            raise _refuse(self, "drop_fraction", "between 0 and 1")
        if self.begin_step < 0:
            raise _refuse(self, "begin_step", "at least 0")
        if self.end_step < self.begin_step:
            raise _refuse(self, "end_step", f"at least begin_step ({self.begin_step})")
        if self.decay not in ("cosine", "constant"):
            raise unknown_name("decay", self.decay, ("cosine", "constant"))


@dataclass(frozen=True, kw_only=True)
class SET(_Dynamic):
    """Drop the smallest magnitudes, grow at random (Mocanu et al. 2018)."""


@dataclass(frozen=True, kw_only=True)
class RigL(_Dynamic):
    """Drop the smallest magnitudes, grow where the dense gradient is largest (Evci et al. 2020, Alg. 1)."""

    exclude_just_dropped: bool = False
    """Forbid that a weight dropped in an update is grown again in the same update; the reference implementation allows it and then keeps the weight's value and optimizer state."""
    skip_step: Literal["keep", "replace"] = "keep"
    """``"keep"``: the optimizer steps, then the mask moves; ``"replace"``: on an update step the mask moves instead (the reference implementation)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_step not in ("keep", "replace"):
            raise unknown_name("skip_step", self.skip_step, ("keep", "replace"))


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of ``torch.compile(model, backend="sift", options={...})``."""

    runtime: str = "tvm"
    """Who runs the sparse layers: ``"tvm"`` (mask-specialised machine code) or ``"eager"`` (the reference)."""
    rest: Literal["inductor", "eager"] = "inductor"
    """Who runs the rest of the graph."""
    threads: int | None = None
    """Threads of the sparse kernels; None takes ``torch.get_num_threads()`` at compile time."""

    def __post_init__(self) -> None:
        if self.rest not in ("inductor", "eager"):
            raise unknown_name("rest", self.rest, ("inductor", "eager"))
        if self.threads is not None and self.threads < 1:
            raise _refuse(self, "threads", "at least 1, or None")


def from_mapping(kind: type[_Options], values: Mapping[str, Any]) -> _Options:
    """Make options from names and values; a name that ``kind`` does not have is refused with the list of those it has."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown_name(f"option of {kind.__name__}", name, known)
    return kind(**values)
