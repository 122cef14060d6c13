"""``schedule(module, optimizer, method)``: masks that move by themselves on ``optimizer.step()``.

Optimizer steps are counted from 0. At step t a backward pass leaves the dense gradients (if the method ranks them), the optimizer
steps, and then the masks move. ``begin_step=0``, the default, makes step 0 an update step: masks move on the very first gradient.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sift_compiler.attachment import Attachment, attach
from sift_compiler.errors import StaleArtifactError, UnsupportedError, UserError, unknown_name
from sift_compiler.masking import criteria, gradients, methods, schedules, transition
from sift_compiler.masking.history import LayerUpdate, MaskUpdate
from sift_compiler.masking.transition import Transition
from sift_compiler.options import MaskMethod, RigL

log = logging.getLogger(__name__)

_FORMAT = 1

Listener = Callable[[MaskUpdate], None]


def schedule(module: nn.Module, optimizer: Optimizer, method: MaskMethod) -> MaskScheduler:
    """Let the masks of ``module`` move on ``optimizer.step()``.

    Call it before the first call of a compiled module: the hooks that carry dense gradients become part of its graph.

    Args:
        module: what :func:`sift_compiler.rewrite` returned, or any module that holds sparse layers.
        optimizer: one of torch.optim with per-weight state (SGD, Adam, AdamW, …) that holds the layers' ``values``.
        method: ``RigL(end_step=…)``, ``SET(end_step=…)`` or ``Static()``.

    Raises:
        UserError: an argument of the wrong kind, no sparse layer, values that the optimizer does not hold, or masks that
            another scheduler moves already.
        UnsupportedError: layers that share their values; later, an optimizer whose state is not understood.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"module must be a torch.nn.Module, not {type(module).__name__}.")
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    if isinstance(method, str):
        raise unknown_name(
            "mask method (pass an object such as sift.RigL(end_step=…))", method, ("RigL", "SET", "Static")
        )
    if not isinstance(method, MaskMethod):
        raise UserError(
            f"method must be an object such as sift.RigL(end_step=…), sift.SET(end_step=…) or sift.Static(), not {method!r}."
        )
    return MaskScheduler(module, optimizer, method)


class MaskScheduler:
    """Moves masks on optimizer steps; made by :func:`schedule`.

    Attributes:
        method: the method and its options.
        step_count: optimizer steps seen.
        updates: a record per mask update, oldest first.
        skipped: updates (``"not finite"``) and layers of updates (``"missing"``) left out because a gradient or weight was
            NaN or infinite, or because no backward pass reached the layer.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, method: MaskMethod) -> None:
        self.method = method
        self._criterion = methods.combination(method)
        self._ranks_gradients = self._criterion is not None and self._criterion.needs_gradient
        self._layers = attach(module, optimizer, with_hooks=self._criterion is not None)
        self._claim()
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._listeners: list[Listener] = []
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self.step_count = 0
        self.updates: list[MaskUpdate] = []
        self.skipped = {"missing": 0, "not finite": 0}
        self._layer_updates = {one.name: 0 for one in self._layers}
        self._prepare_step()

    def on_update(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener(record)`` after every mask update; returns a function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def remove(self) -> None:
        """Let go of the optimizer and the layers; masks rest from now on. The hooks stay in the graph and do nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for one in self._layers:
            one.disarm()
            if one.hook is not None:
                one.hook.probe.claimed = False

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UserError(
            "A mask scheduler belongs to one module and one optimizer and cannot be copied. Copy those, then "
            "masks = sift.schedule(module_copy, optimizer_copy, method); masks.load_state_dict(original.state_dict())."
        )

    # --- on optimizer.step() ----------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._withheld = []
        if not (self._due() and isinstance(self.method, RigL) and self.method.skip_step == "replace"):
            return
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            raise UnsupportedError(
                'RigL(skip_step="replace") leaves out the optimizer step when masks move, which is not possible with a '
                'closure. Call backward() before optimizer.step(), or use skip_step="keep".'
            )
        # Optimizers of torch pass over parameters without gradient: neither momentum nor weight decay acts on them.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._withheld.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []
        if _skipped_by_scaler(optimizer):
            self._prepare_step()
            return
        if self._due():
            self._update()
        self.step_count += 1
        self._prepare_step()

    def _due(self) -> bool:
        return schedules.due(self.method, self.step_count)

    def _prepare_step(self) -> None:
        """Arm the probes if masks move at the step to come: its backward passes run before the optimizer's step."""
        if not self._ranks_gradients:
            return
        due = self._due()
        for one in self._layers:
            one.arm() if due else one.disarm()

    # --- an update --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self) -> None:
        start = time.perf_counter()
        found = {one.name: one.take() if self._ranks_gradients else None for one in self._layers}
        movable = self._movable(found)
        for one in movable:
            # Before any layer is changed: an optimizer that is not understood must leave everything as it was.
            list(transition.per_weight_states(self._state_of(one), one.layer.values))
        fraction = methods.fraction_at(self.method, self.step_count)
        moved = [self._move(one, found.pop(one.name), fraction) for one in movable]
        if moved:
            spent = (time.perf_counter() - start) * 1e3
            record = MaskUpdate(step=self.step_count, drop_fraction=fraction, layers=tuple(moved), milliseconds=spent)
            self._record(record)

    def _movable(self, found: Mapping[str, Tensor | None]) -> list[Attachment]:
        """The layers whose masks can move now. A number that is not finite anywhere stops the whole update."""
        conditions = []
        for one in self._layers:
            wanted = (one.layer.values, found[one.name]) if self._ranks_gradients else (one.layer.values,)
            conditions.append(gradients.condition(wanted))
        if self._layers:
            conditions = gradients.agreed(conditions, self._layers[0].layer.values.device)
        bad = [one.name for one, found_in in zip(self._layers, conditions, strict=True) if found_in == "not finite"]
        if bad:
            self._skip("not finite", 1, "no mask moves: NaN or infinity in the dense gradient or the weights of", bad)
            return []
        missing = [one.name for one, found_in in zip(self._layers, conditions, strict=True) if found_in == "missing"]
        if missing:
            why = (
                "no dense gradient came (is the layer used in the forward pass? was the module compiled and called "
                "before sift.schedule?), so the mask rests, of"
            )
            self._skip("missing", len(missing), why, missing)
        return [one for one in self._layers if one.name not in missing]

    def _skip(self, kind: str, count: int, why: str, names: list[str]) -> None:
        level = logging.DEBUG if self.skipped[kind] else logging.WARNING
        self.skipped[kind] += count
        log.log(
            level, "Mask update at step %d: %s %s", self.step_count, why, ", ".join(names[:5]) + " …" * (len(names) > 5)
        )

    def _move(self, one: Attachment, gradient: Tensor | None, fraction: float) -> LayerUpdate:
        layer, active = one.layer, one.layer.index.numel()
        assert self._criterion is not None
        change: Transition = methods.propose(
            self._criterion, layer.index, layer.values, None if gradient is None else gradients.averaged(gradient),
            layer.pattern.numel, schedules.replaced_weights(active, fraction),
            criteria.stream(self.method.seed, one.name, self.step_count),
            exclude_just_dropped=isinstance(self.method, RigL) and self.method.exclude_just_dropped,
        )  # fmt: skip
        transition.apply(change, layer.index, layer.values, self._state_of(one))
        self._layer_updates[one.name] += 1
        return LayerUpdate(
            name=one.name, active=active, dropped=change.dropped, grown=change.dropped, regrown=change.regrown
        )

    def _state_of(self, one: Attachment) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._optimizer.state.get(one.layer.values, {})
        return state

    def _record(self, record: MaskUpdate) -> None:
        self.updates.append(record)
        log.debug("Mask update at step %d: %d weights moved, %.1f ms", record.step, record.dropped, record.milliseconds)
        for listener in list(self._listeners):
            listener(record)

    def _claim(self) -> None:
        probes = [one.hook.probe for one in self._layers if one.hook is not None]
        if any(probe.claimed for probe in probes):
            raise UserError(
                "Another mask scheduler moves the masks of this module already. Call its remove() first, or keep using it."
            )
        for probe in probes:
            probe.claimed = True

    # --- saving and resuming ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors of the module and the optimizer, as numbers, strings, lists and dictionaries.

        The random choices of a method are a function of (seed, layer, step), so there is no generator to save.
        """
        return {
            "format": _FORMAT,
            "method": {"name": self.method.name, **dataclasses.asdict(self.method)},
            "step_count": self.step_count,
            "skipped": dict(self.skipped),
            "layers": {
                one.name: {"active": one.layer.index.numel(), "weight_shape": list(one.layer.weight_shape), "updates": self._layer_updates[one.name]}
                for one in self._layers
            },
            "updates": [record.to_plain() for record in self.updates],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Load the module and the optimizer too: masks live in the module.

        Raises:
            UserError: the state belongs to another method, or the same with other options.
            StaleArtifactError: the state is not one of a mask scheduler, or its layers are not those of this module.
        """
        try:
            self._check_fits(state)
            updates = [MaskUpdate.from_plain(record) for record in state["updates"]]
            step_count = int(state["step_count"])
            skipped = {kind: int(state["skipped"][kind]) for kind in self.skipped}
            layer_updates = {name: int(layer["updates"]) for name, layer in state["layers"].items()}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StaleArtifactError(
                f"This is not the state of a mask scheduler, or it is damaged ({type(error).__name__}: {error}). "
                "Pass what masks.state_dict() returned."
            ) from error
        self.updates, self.step_count, self.skipped, self._layer_updates = updates, step_count, skipped, layer_updates
        self._prepare_step()

    def _check_fits(self, state: Mapping[str, Any]) -> None:
        if state["format"] != _FORMAT:
            raise StaleArtifactError(
                f"The mask scheduler's state has format {state['format']!r}; this version reads {_FORMAT}. "
                "Resume with the version of sift_compiler that wrote it."
            )
        mine = {"name": self.method.name, **dataclasses.asdict(self.method)}
        theirs = dict(state["method"])
        if mine != theirs:
            raise UserError(
                f"The saved masks were moved by {_shown(theirs)}, this scheduler is {_shown(mine)}. To resume, call "
                "sift.schedule with the saved method and options; to start another schedule, do not load its state."
            )
        layers = {one.name: (one.layer.index.numel(), list(one.layer.weight_shape)) for one in self._layers}
        saved = {name: (layer["active"], list(layer["weight_shape"])) for name, layer in state["layers"].items()}
        if layers != saved:
            differing = sorted(name for name in layers.keys() | saved.keys() if layers.get(name) != saved.get(name))
            raise StaleArtifactError(
                f"The saved masks do not fit this module. Differing layers: {', '.join(differing[:5])}"
                f"{' …' if len(differing) > 5 else ''}. Resume with the module that was saved."
            )


def _skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler made a fused optimizer leave out this step; others are not called at all then."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.any())


def _shown(method: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in method.items() if name != "name")
    return f"{method.get('name')}({options})"
