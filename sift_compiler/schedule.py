"""``schedule(module, optimizer, method)``: masks that move by themselves on ``optimizer.step()``.

Optimizer steps are counted from 0. At step t a backward pass leaves the dense gradients (if the method ranks them), the optimizer
steps, and then the masks move. ``begin_step=0``, the default, makes step 0 an update step: masks move on the very first gradient.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sift_compiler import processes
from sift_compiler.attachment import Attachment, attach, optimizer_inside
from sift_compiler.errors import StaleArtifactError, UnsupportedError, UserError, unknown_name
from sift_compiler.ir.entries import Entries
from sift_compiler.loss_scale import LossScale, Scaler, checked_scaler, scaler_beside
from sift_compiler.masking import criteria, gradients, methods, schedules, transition
from sift_compiler.masking.history import LayerUpdate, MaskUpdate
from sift_compiler.masking.layer import LayerView, Memory
from sift_compiler.masking.rule import Choice, Rule, Target
from sift_compiler.masking.transition import Transition
from sift_compiler.options import MaskMethod, RigL
from sift_compiler.recorder import Recorder, Recording

log = logging.getLogger(__name__)

_FORMAT = 1
_SHARDED = (
    "No process sees all the weights it would rank. Train with DistributedDataParallel instead: sparse layers are compact, and so are "
    "their gradients and optimizer state. Or let masks rest: without sift.schedule sparse layers train under fully_shard."
)
_EXPLORATION = "exploration of the recorder"
"""Stands beside what a method remembers of a layer, in what is saved."""

Listener = Callable[[MaskUpdate], None]


def schedule(
    module: nn.Module, optimizer: Optimizer, method: MaskMethod, *, recorder: Recorder | None = None, scaler: Scaler | None = None
) -> MaskScheduler:  # fmt: skip
    """Let the masks of ``module`` move on ``optimizer.step()``.

    Call it before the first call of a compiled module: the hooks that carry dense gradients become part of its graph.

    With several processes call it in all, best with the DistributedDataParallel wrapper: its process group is the one gradients are averaged over,
    and it stops to broadcast masks on every forward pass. The masks are the same in all processes; that is checked.

    Args:
        module: what :func:`sift_compiler.rewrite` returned, any module that holds sparse layers, or a wrapper of one.
        optimizer: one of torch.optim with per-weight state (SGD, Adam, AdamW, …) that holds the layers' ``values``; also inside a wrapper
            of Accelerate or Lightning.
        method: ``RigL(end_step=…)``, ``SET(end_step=…)``, ``Static()`` or another method; or one of your own (sift.OwnMethod).
        recorder: where every update is written to, and how much of it is measured.
        scaler: what scales the loss, such as ``torch.amp.GradScaler``; by custom that of Accelerate's wrapper, if ``optimizer`` is in one.
            Methods that use the size of dense gradients (SNFS, BiDST) divide these by its scale; the others rank them and need none.

    Raises:
        UserError: an argument of the wrong kind, no sparse layer, values that the optimizer does not hold, a structure or storage that
            does not fit the method, or masks that another scheduler moves already. Later, a step by a scaler that should be known.
        UnsupportedError: layers that share their values or, sharded, spread them over processes; later, an optimizer whose state is not
            understood. Later, too, a UserError in all processes if their masks are not the same.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"module must be a torch.nn.Module, not {type(module).__name__}.")
    scaler = scaler_beside(optimizer) if scaler is None else checked_scaler(scaler)
    optimizer = optimizer_inside(optimizer)
    if isinstance(method, str):
        raise unknown_name(
            "mask method (pass an object such as sift.RigL(end_step=…))",
            method,
            methods.METHODS,
        )
    if not isinstance(method, MaskMethod):
        raise UserError(
            f"method must be an object such as sift.RigL(end_step=…), sift.SET(end_step=…) or sift.Static(), not {method!r}."
        )
    if recorder is not None and not isinstance(recorder, Recorder):
        raise UserError(f"recorder must be a sift.Recorder(…), not {recorder!r}.")
    return MaskScheduler(module, LossScale(optimizer, scaler), method, recorder or Recorder())


def schedulers_of(optimizer: Optimizer) -> list[MaskScheduler]:
    """The mask schedulers that listen to the steps of ``optimizer``."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values())
    return [each for each in owners if isinstance(each, MaskScheduler)]


class MaskScheduler:
    """Moves masks on optimizer steps; made by :func:`schedule`.

    Attributes:
        method: the method and its options.
        step_count: optimizer steps seen.
        updates: a record per mask update, oldest first; of methods that move masks on every step the last one only.
        skipped: updates (``"not finite"``) and layers of updates (``"missing"``) left out because a gradient or weight was
            NaN or infinite, or because no backward pass reached the layer, or more did than in any step before.
    """

    def __init__(self, module: nn.Module, scale: LossScale, method: MaskMethod, recorder: Recorder) -> None:
        optimizer = scale.optimizer
        self.method, self._scale = method, scale
        rule = methods.rule_of(method)
        self._rule = Rule(method) if rule is None else rule
        if rule is not None:
            processes.refuse_shards(module, "Moving masks", _SHARDED)
        self._layers = attach(module, optimizer, with_hooks=rule is not None)
        processes.keep_masks_local(module)
        self._group = processes.group_of(module)
        self._masks_agree = False
        self._memory: dict[str, Memory] = {one.name: {} for one in self._layers}
        self._optimizer = optimizer
        self.step_count = 0
        if rule is not None:
            for one in self._layers:
                view = self._view(one)
                rule.check_layer(view)
                rule.begin(view)
        self._recording = Recording(recorder, self._layers)
        self._claim()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._listeners: list[Listener] = []
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._acts_inside = False
        self.updates: list[MaskUpdate] = []
        self.skipped = {"missing": 0, "not finite": 0}
        self._layer_updates = {one.name: 0 for one in self._layers}
        self._prepare_step()

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The layers whose masks this moves, in the module's order."""
        return self._layers

    def acting_inside(self) -> Callable[[], None]:
        """For trainers that run the backward pass inside ``optimizer.step(closure)``: what they call after it, still in the closure, when
        their gradient scaler has unscaled the gradients unless the optimizer, being fused, does.

        Without this, a method that acts between the backward pass and the step (SRSTE, TopKAST, RigL(skip_step="replace")) refuses closures.
        """
        self._acts_inside = True
        return functools.partial(self._act, before_step=True)

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
            one.release()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UserError(
            "A mask scheduler belongs to one module and one optimizer and cannot be copied. Copy those, then "
            "masks = sift.schedule(module_copy, optimizer_copy, method); masks.load_state_dict(original.state_dict())."
        )

    # --- on optimizer.step() ----------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._masks_agree:
            # Not before: schedule() may be called in one process for now, a step is taken in all.
            self._require_same_masks()
        if self._rule.uses_gradient_size and self._wants_dense_gradient():
            self._scale.require_known(self.method.name)
        if self._acts_inside:
            # A scaler of such a trainer has the closure run before this hook.
            return
        self._withheld = []
        replaces = self._replaces()
        if not (replaces or self._rule.changes_steps):
            return
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            skipping, instead = ('(skip_step="replace")', ', or use skip_step="keep"') if replaces else ("", "")
            raise UnsupportedError(
                f"{self.method.name}{skipping} acts between the backward pass and the optimizer step, which is not "
                "possible with a closure. Call backward() before optimizer.step()"
                f"{instead}."
            )
        self._act()

    def _replaces(self) -> bool:
        return self._due() and isinstance(self.method, RigL) and self.method.skip_step == "replace"

    def _act(self, before_step: bool = False) -> None:
        """Between the backward pass and the optimizer's step."""
        optimizer, replaces, self._withheld = self._optimizer, self._replaces(), []
        if self._rule.changes_steps:
            scale = self._scale.of_gradients(before_step=before_step)
            for one in self._layers:
                self._rule.before_step(self._view(one), scale)
        if not replaces:
            return
        if before_step:
            self._scale.require_checked()
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
        for one in self._layers:
            one.end_step()
        if self._scale.step_is_skipped:
            self._prepare_step()
            return
        if self._rule.changes_steps:
            for one in self._layers:
                self._rule.after_step(self._view(one))
        if self._due() or self._rule.watches(self.step_count):
            self._update()
        self.step_count += 1
        self._prepare_step()

    def _due(self) -> bool:
        return schedules.due(self.method, self.step_count)

    def _prepare_step(self) -> None:
        """Arm the probes if the step to come needs dense gradients: its backward passes run before the optimizer's step."""
        if not self._wants_dense_gradient():
            for one in self._layers:
                one.disarm()
            return
        accumulates = getattr(self.method, "accumulates", None)
        for one, passes in zip(self._layers, self._known_passes(accumulates), strict=True):
            one.arm(functools.partial(self._reduced, one), passes=passes, strict=accumulates is False)

    def _known_passes(self, accumulates: bool | None) -> list[int]:
        """After how many backward passes a layer's dense gradient is complete; 0: not known before the optimizer's step."""
        seen = [one.passes for one in self._layers]
        if accumulates or not any(most for _, most in seen):
            # Nothing is asked of other processes before the first step: they might not be here.
            return [1 if accumulates is False and not gradients.distributed(self._group) else 0] * len(seen)
        known = gradients.agreed_passes(seen, self._layers[0].layer.index.device, self._group)
        return [min(1, passes) for passes in known] if accumulates is False else known

    @torch.no_grad()
    def _reduced(self, one: Attachment, gradient: Tensor) -> Tensor | Entries:
        """What is kept of a complete dense gradient, inside the backward pass; the mean over all processes if it is less than all."""
        view = self._view(one)
        if self._rule.watches(self.step_count) or not self._rule.reduces(view):
            return gradient
        gradient = self._dense(gradient)
        return self._rule.needed(view, gradient.reshape(-1))

    def _wants_dense_gradient(self) -> bool:
        return self._rule.watches(self.step_count) or (self._rule.needs_dense_gradient and self._due())

    # --- an update --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self) -> None:
        start = time.perf_counter()
        found = {one.name: one.take() if self._wants_dense_gradient() else None for one in self._layers}
        movable = self._movable(found)
        if self._due():
            for one in movable:
                # Before any layer is changed: an optimizer that is not understood must leave everything as it was.
                list(transition.per_weight_states(self._state_of(one), one.layer.values))
            targets: list[Target | None] = [*self._rule.targets([self._view(one) for one in movable], self.step_count)]
        else:
            targets = [None] * len(movable)
        moved = []
        for one, target in zip(movable, targets, strict=True):
            # One dense gradient at a time is averaged, used and released.
            view = self._view(one, found.pop(one.name))
            if self._rule.watches(self.step_count):
                self._rule.watch(view)
            if target is not None:
                moved.append(self._move(one, view, target))
        if moved:
            self._require_same_masks()
            spent = (time.perf_counter() - start) * 1e3
            fraction = self._rule.fraction(self.step_count)
            self._record(
                MaskUpdate(step=self.step_count, drop_fraction=fraction, layers=tuple(moved), milliseconds=spent)
            )

    def _view(self, one: Attachment, gradient: Tensor | Entries | None = None) -> LayerView:
        """``gradient`` is the dense one, of this process and scaled, or what is needed of that of all; the layer's own is as it stands."""
        layer = one.layer
        return LayerView(
            name=one.name, shape=layer.weight_shape, structure=layer.structure, index=layer.index,
            slot_values=layer.values.detach(), slot_gradient=layer.values.grad,
            fetch=None if gradient is None else functools.partial(self._dense, gradient),
            entries=gradient if isinstance(gradient, Entries) else None,
            memory=self._memory[one.name], step=self.step_count,
            seed=criteria.stream(self.method.seed, one.name, self.step_count),
        )  # fmt: skip

    def _dense(self, gradient: Tensor | Entries) -> Tensor:
        """The mean over all ranks, divided by the loss scale if the method cares; entries are taken of such a mean already."""
        if isinstance(gradient, Entries):
            return gradient.dense()
        gradient = gradients.averaged(gradient, self._group)
        return (
            gradients.unscaled(gradient, self._scale.of_dense_gradients())
            if self._rule.uses_gradient_size
            else gradient
        )

    def _require_same_masks(self) -> None:
        # What a method remembers follows from masks and means that all share, if all began with the same.
        memory = {} if self._masks_agree else self._memory
        processes.require_same_masks(
            {one.name: one.layer for one in self._layers}, memory, self._group, self.step_count
        )
        self._masks_agree = True

    def _movable(self, found: Mapping[str, Tensor | Entries | None]) -> list[Attachment]:
        """The layers whose masks can move now. A number that is not finite anywhere stops the whole update."""
        conditions = []
        for one in self._layers:
            wanted: list[Tensor | Entries | None] = [one.layer.values]
            if self._wants_dense_gradient():
                wanted.append(found[one.name])
            if self._rule.needs_gradient:
                wanted.append(one.layer.values.grad)
            conditions.append(gradients.condition(wanted))
        if self._layers:
            conditions = gradients.agreed(conditions, self._layers[0].layer.values.device, self._group)
        bad = [one.name for one, found_in in zip(self._layers, conditions, strict=True) if found_in == "not finite"]
        if bad:
            self._skip("not finite", 1, "no mask moves: NaN or infinity in the gradient or the weights of", bad)
            return []
        missing = [one.name for one, found_in in zip(self._layers, conditions, strict=True) if found_in == "missing"]
        if missing:
            why = (
                "no gradient came (is the layer used in the forward pass? was the module compiled and called "
                "before sift.schedule?), or more backward passes than in any step before, so the mask rests, of"
            )
            self._skip("missing", len(missing), why, missing)
        return [one for one in self._layers if one.name not in missing]

    def _skip(self, kind: str, count: int, why: str, names: list[str]) -> None:
        if not self._due():
            return
        level = logging.DEBUG if self.skipped[kind] else logging.WARNING
        self.skipped[kind] += count
        log.log(
            level, "Mask update at step %d: %s %s", self.step_count, why, ", ".join(names[:5]) + " …" * (len(names) > 5)
        )

    def _move(self, one: Attachment, view: LayerView, target: Target) -> LayerUpdate:
        layer = one.layer
        choice = self._rule.choose(view, target)
        change = _transition(self._rule, view, choice)
        transition.apply(change, layer.index, layer.values, self._state_of(one))
        if choice.forgotten is not None:
            for tensor in transition.per_weight_states(self._state_of(one), layer.values):
                tensor[choice.forgotten] = 0
        self._layer_updates[one.name] += 1
        update = LayerUpdate(
            name=one.name, active=change.active, dropped=change.dropped, grown=change.grown, regrown=change.regrown,
            numel=view.numel,
        )  # fmt: skip
        return self._recording.measured(update, layer.index)

    def _state_of(self, one: Attachment) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._optimizer.state.get(one.layer.values, {})
        return state

    def _record(self, record: MaskUpdate) -> None:
        self.updates = [*self.updates, record] if self._rule.keeps_history else [record]
        log.debug("Mask update at step %d: %d weights moved, %.1f ms", record.step, record.dropped, record.milliseconds)
        self._recording.record(record, methods.plain(self.method))
        for listener in list(self._listeners):
            listener(record)

    def _claim(self) -> None:
        if any(one.claimed for one in self._layers):
            raise UserError(
                "Another mask scheduler moves the masks of this module already. Call its remove() first, or keep using it."
            )
        for one in self._layers:
            one.claim()

    # --- saving and resuming ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors of the module and the optimizer, as numbers, strings, lists and dictionaries; tensors are only
        under ``"memory"``, what the method remembers of every layer.

        The random choices of a method are a function of (seed, layer, step), so there is no generator to save.
        """
        return {
            "format": _FORMAT,
            "method": methods.plain(self.method),
            "step_count": self.step_count,
            "skipped": dict(self.skipped),
            "layers": {
                one.name: {"active": one.layer.index.numel(), "weight_shape": list(one.layer.weight_shape), "updates": self._layer_updates[one.name]}
                for one in self._layers
            },
            "updates": [record.to_plain() for record in self.updates],
            "memory": self._remembered(),
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
            memory = self._restored(state["memory"])
            explored = {name: kept.pop(_EXPLORATION) for name, kept in memory.items() if _EXPLORATION in kept}
            self._recording.restore(explored)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StaleArtifactError(
                f"This is not the state of a mask scheduler, or it is damaged ({type(error).__name__}: {error}). "
                "Pass what masks.state_dict() returned."
            ) from error
        self.updates, self.step_count, self.skipped, self._layer_updates = updates, step_count, skipped, layer_updates
        self._memory = memory
        self._recording.reopen()
        self._masks_agree = False
        for one in self._layers:
            one.claim()
        self._prepare_step()

    def _remembered(self) -> dict[str, Memory]:
        made = {name: {key: tensor.clone() for key, tensor in kept.items()} for name, kept in self._memory.items()}
        for name, flags in self._recording.flags.items():
            made[name][_EXPLORATION] = flags.clone()
        return {name: kept for name, kept in made.items() if kept}

    def _restored(self, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Memory]:
        devices = {one.name: one.layer.index.device for one in self._layers}
        return {
            name: {key: tensor.to(device, copy=True) for key, tensor in saved.get(name, {}).items()}
            for name, device in devices.items()
        }

    def _check_fits(self, state: Mapping[str, Any]) -> None:
        if state["format"] != _FORMAT:
            raise StaleArtifactError(
                f"The mask scheduler's state has format {state['format']!r}; this version reads {_FORMAT}. "
                "Resume with the version of sift_compiler that wrote it."
            )
        mine = methods.plain(self.method)
        theirs = dict(state["method"])
        # How gradients are held changes no mask.
        if {**mine, "accumulates": None} != {**theirs, "accumulates": None}:
            raise UserError(
                f"The saved masks were moved by {methods.shown(theirs)}, this scheduler is {methods.shown(mine)}. To resume, call "
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


def _transition(rule: Rule, view: LayerView, choice: Choice) -> Transition:
    if rule.storage == "compact":
        return transition.plan(view.index, choice.kept, choice.grown)
    mask = torch.zeros(view.numel, dtype=torch.bool, device=view.index.device)
    mask[view.positions[choice.kept]] = True
    mask[choice.grown] = True
    return transition.switch(view.index, mask)
