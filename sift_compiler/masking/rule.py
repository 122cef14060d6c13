"""Rule: how a method answers *how much*, *which* and *what follows*; *when* is in its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.ir.entries import Entries
from sift_compiler.ir.mask_structure import (
    NM,
    Block,
    Channel,
    ConstantFanIn,
    Structure,
    TransposableNM,
    Unstructured,
)
from sift_compiler.masking import criteria, schedules, selection
from sift_compiler.masking.layer import LayerView
from sift_compiler.options import Dynamic, MaskMethod, Moving

Kinds = tuple[type[Structure], ...]


@dataclass(frozen=True)
class Target:
    """How many weights a layer has after dropping, and after growing."""

    survivors: int
    active: int


@dataclass(frozen=True, eq=False)
class Choice:
    """Which weights stay and which come.

    Attributes:
        kept: bool [active].
        grown: int64 [n], positions; dropped ones may come again.
        forgotten: bool [slots] or None; slots whose optimizer state becomes 0, besides those that change owner.
    """

    kept: Tensor
    grown: Tensor
    forgotten: Tensor | None = None


class Rule:
    """Sparse evolutionary training (Mocanu et al. 2018): the smallest magnitudes go, as many random connections come.

    Every other method changes what it does differently. A method of your own derives from :class:`DynamicMethod`.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether scores read the gradient of the active weights."""
    needs_dense_gradient: ClassVar[bool] = False
    """Whether they read the gradient of every entry of the dense weight, on update steps."""
    uses_gradient_size: ClassVar[bool] = True
    """Whether masks depend on the size of the dense gradient, beyond the order of its magnitudes in a step. If so it is divided by the scale
    of the loss; if not, one of a scaled loss will do."""
    changes_steps: ClassVar[bool] = False
    """Whether :meth:`before_step` and :meth:`after_step` have something to do on every optimizer step."""
    keeps_history: ClassVar[bool] = True
    """Whether every update is recorded; methods that move masks on every step keep the last one only."""
    storage: ClassVar[Literal["compact", "dense"]] = "compact"
    """``"dense"``: weights outside the mask have values and gradients too; see :mod:`sift_compiler.ir.pattern`."""
    structures: ClassVar[Kinds] = (Unstructured, NM, TransposableNM, Block, ConstantFanIn, Channel)
    """Structures the method can keep."""

    def __init__(self, method: MaskMethod) -> None:
        self.method = method

    # --- how much ---------------------------------------------------------------------------------------------------

    def fraction(self, step: int) -> float:
        """Share of the active weights that is replaced at ``step``."""
        method = self.method
        return schedules.fraction_at(method, step) if isinstance(method, Dynamic) else 0.0

    def targets(self, layers: Sequence[LayerView], step: int) -> list[Target]:
        """Of every layer; as many grow as are dropped."""
        fraction = self.fraction(step)
        return [replacing(layer, layer.active, fraction, free_only=self.excludes_just_dropped) for layer in layers]

    # --- which ------------------------------------------------------------------------------------------------------

    def drop_scores(self, layer: LayerView) -> Tensor:
        """Score [active] of each active weight; the smallest go."""
        return criteria.magnitude(layer.values)

    def grow_scores(self, layer: LayerView, candidates: Tensor) -> Tensor:
        """Score [n] of each position in ``candidates`` [n]; the largest come."""
        return criteria.priority(candidates, layer.stream("grow"))

    def choose(self, layer: LayerView, target: Target) -> Choice:
        """Drop down to ``target.survivors``, then grow up to ``target.active``."""
        kept = selection.survivors(layer, self.drop_scores(layer), target.survivors)
        if target.active == target.survivors:
            return Choice(kept, layer.positions[:0])
        if isinstance(layer.structure, TransposableNM):
            mask = selection.reprojected(layer, kept, target.active, lambda places: self.grow_scores(layer, places))
            return chosen(layer, mask)
        grown = selection.newcomers(
            layer, kept, target.active - target.survivors, lambda places: self.grow_scores(layer, places),
            exclude_just_dropped=self.excludes_just_dropped,
        )  # fmt: skip
        return Choice(kept, grown)

    @property
    def excludes_just_dropped(self) -> bool:
        """Whether a weight dropped in an update must not come again in the same."""
        return bool(getattr(self.method, "exclude_just_dropped", False))

    # --- besides ----------------------------------------------------------------------------------------------------

    def begin(self, layer: LayerView) -> None:
        """Once, before the first step: check the layer, fill its memory."""

    def reduces(self, layer: LayerView) -> bool:
        """Whether :meth:`needed` can say which entries of the dense gradient this update can depend on; if not, all are held until then."""
        return False

    def needed(self, layer: LayerView, gradient: Tensor) -> Entries:
        """Those entries, given all of the dense ``gradient`` [numel] but not yet the step of the optimizer that comes before the choice.
        :meth:`choose` finds zeros elsewhere, and must choose the same. Where the gradient is not finite, that is all there is to say."""
        raise NotImplementedError

    def watches(self, step: int) -> bool:
        """Whether :meth:`watch` wants the dense gradient of this step, be masks due or not."""
        return False

    def watch(self, layer: LayerView) -> None:
        """After a step that :meth:`watches` asked for, before masks move."""

    def before_step(self, layer: LayerView, scale: float) -> None:
        """Before every optimizer step: ``layer.slot_gradient`` may be changed in place; it is ``scale`` times the gradient."""

    def after_step(self, layer: LayerView) -> None:
        """After every optimizer step, before masks move: ``layer.slot_values`` may be changed in place."""

    def check_layer(self, layer: LayerView) -> None:
        """Raise UserError where the method cannot keep the layer's structure or needs other storage."""
        if not isinstance(layer.structure, self.structures):
            raise UserError(
                f"{self.method.name} cannot keep the structure {layer.structure} of layer {layer.name!r}. It works with "
                f"{', '.join(kind.__name__ for kind in self.structures)}."
            )
        asleep = bool((layer.index < -1).any())
        if self.storage == "dense" and layer.slots != layer.numel:
            raise UserError(
                f"{self.method.name} needs dense storage: a value for every entry of the dense weight; layer {layer.name!r} holds "
                f"{layer.slots} of {layer.numel}. Before you make the optimizer, call sift.dense_storage(module)."
            )
        if self.storage == "compact" and asleep:
            raise UserError(
                f"{self.method.name} moves compact weights; layer {layer.name!r} has dense storage. Call sift.compact(module) before you "
                "make the optimizer. Methods for dense storage: SRSTE, TopKAST."
            )
        if self.excludes_just_dropped and isinstance(layer.structure, NM | TransposableNM | ConstantFanIn):
            raise UserError(
                f"exclude_just_dropped=True is not possible with {layer.structure} (layer {layer.name!r}): a small group may have no other "
                "place. It works with Unstructured, Block, Channel."
            )


def replacing(layer: LayerView, active: int, fraction: float, *, free_only: bool = False) -> Target:
    """Drop ``fraction`` of ``active`` weights, rounded down to what comes and goes together, and grow as many.

    With ``free_only`` no more than there are entries without a weight.
    """
    granule = drop_granule(layer)
    units = schedules.replaced_weights(active // granule, fraction)
    if free_only:
        units = min(units, (layer.numel - active) // granule)
    return Target(active - units * granule, active)


def drop_granule(layer: LayerView) -> int:
    """Weights of this layer come and go in multiples of this: the entries of a unit, times the groups that must stay equal."""
    if isinstance(layer.structure, Unstructured):
        return 1
    layout = layer.structure.layout(layer.shape).to(layer.index.device)
    if not layer.structure.equal:
        return layout.shape[2]
    living = int(layer.mask()[layout].any(-1).any(1).sum())
    return max(1, living) * layout.shape[2]


def chosen(layer: LayerView, mask: Tensor) -> Choice:
    """The choice that makes ``mask``, bool [numel] or of the weight's shape, the layer's mask."""
    mask = mask.reshape(-1).clone()
    kept = mask[layer.positions]
    mask[layer.positions] = False
    return Choice(kept, mask.nonzero().squeeze(1))


class _RuleOfItself(Rule):
    @property
    def method(self) -> MaskMethod:  # type: ignore[override]
        """Itself: these methods are options and rule in one."""
        assert isinstance(self, MaskMethod)
        return self


@dataclass(frozen=True, kw_only=True)
class MovingMethod(Moving, _RuleOfItself):
    """Options and rule in one, for methods that decide themselves how many weights go and come."""


@dataclass(frozen=True, kw_only=True)
class DynamicMethod(Dynamic, _RuleOfItself):
    """Options and rule in one: SET, until a child changes what differs. Make your own; see examples/write_a_method.py."""
