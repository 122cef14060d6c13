"""Checkpoint: what a saved training run is made of, and how it goes on.

An optimizer's state is kept by parameter *name*: torch numbers parameters in the order they were passed, and a loaded module need
not list them in the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from sift_compiler.attachment import unwrapped
from sift_compiler.errors import StaleArtifactError, UserError
from sift_compiler.masking.methods import METHODS
from sift_compiler.options import MaskMethod, from_mapping
from sift_compiler.schedule import MaskScheduler


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What :func:`sift_compiler.load_checkpoint` reads back.

    checkpoint = sift.load_checkpoint("run.pt2")
    model = checkpoint.module
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = sift.schedule(model, optimizer, checkpoint.method)
    checkpoint.restore(optimizer=optimizer, masks=masks)
    """

    module: fx.GraphModule
    """The sparse module with its masks, without hooks; sift.schedule puts them in again."""
    masks: Mapping[str, Any] | None
    """The mask scheduler's state, if it was saved."""
    optimizer: Mapping[str, Any] | None
    """The optimizer's state by parameter name, if it was saved."""
    random: Mapping[str, Any]
    """States of torch's random number generators at the time of saving."""
    extra: Mapping[str, Any]
    """What the caller saved besides: epoch, learning-rate schedule, gradient scaler …"""
    metadata: Mapping[str, Any]
    """The file's description: versions, layers, mode."""

    @property
    def method(self) -> MaskMethod:
        """The mask method with the options that were saved.

        Raises:
            UserError: the checkpoint was saved without ``masks=``.
            StaleArtifactError: a method or option this version does not know.
        """
        if self.masks is None:
            raise UserError(
                "This checkpoint holds no mask schedule: it was saved without masks=. Pass a method of your own to sift.schedule."
            )
        options = dict(self.masks["method"])
        name = options.pop("name")
        try:
            return from_mapping(METHODS[name], options)
        except (KeyError, UserError) as error:
            raise StaleArtifactError(f"The saved mask method {name}({options}) is not known here: {error}") from error

    def restore(self, *, optimizer: Optimizer | None = None, masks: MaskScheduler | None = None) -> None:
        """Bring an optimizer and a mask scheduler of ``module``, and torch's random number generators, to the saved point.

        The generators get the states of the process that saved. Where there are several, whose dropout differs, keep those of all in
        ``extra``, as examples/train_distributed.py does.

        Raises:
            UserError: a state is asked for that was not saved, or the optimizer groups the parameters in another way.
            StaleArtifactError: the saved masks do not fit.
        """
        if optimizer is not None:
            if self.optimizer is None:
                raise UserError("This checkpoint holds no optimizer state: it was saved without optimizer=.")
            optimizer.load_state_dict(_by_number(self.optimizer, optimizer, self.module))
        if masks is not None:
            if self.masks is None:
                raise UserError("This checkpoint holds no mask schedule: it was saved without masks=.")
            masks.load_state_dict(self.masks)
        restore_random(self.random)


def random_states() -> dict[str, Any]:
    """The states of torch's generators: the CPU's, and those of all CUDA devices if CUDA is in use."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random(states: Mapping[str, Any]) -> None:
    """Set what :func:`random_states` returned; CUDA's only where there are as many devices as there were."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def optimizer_by_name(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """``optimizer.state_dict()`` with parameter names of ``module`` instead of numbers.

    Raises:
        UserError: the optimizer holds a parameter that is not one of the module's.
    """
    state = optimizer.state_dict()
    names = _names_of_groups(optimizer, module)
    numbered = {
        number: name
        for group, group_names in zip(state["param_groups"], names, strict=True)
        for number, name in zip(group["params"], group_names, strict=True)
    }
    return {
        "kind": type(optimizer).__name__,
        "state": {numbered[number]: entry for number, entry in state["state"].items()},
        "groups": [
            {**group, "params": group_names} for group, group_names in zip(state["param_groups"], names, strict=True)
        ],
    }


def _by_number(saved: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The inverse of :func:`optimizer_by_name` for an optimizer that may list the parameters of a group in another order."""
    if type(optimizer).__name__ != saved["kind"]:
        raise UserError(
            f"The checkpoint holds the state of {saved['kind']}, this optimizer is {type(optimizer).__name__}. "
            f"Make a {saved['kind']}, or restore only the masks."
        )
    numbers: dict[str, int] = {}
    groups = []
    names = _names_of_groups(optimizer, module)
    if [set(group) for group in names] != [set(group["params"]) for group in saved["groups"]]:
        raise UserError(
            f"The optimizer has {len(names)} parameter group(s) of {[len(group) for group in names]} parameters; the "
            f"checkpoint's have {[len(group['params']) for group in saved['groups']]}, or other parameters. Make the "
            "optimizer from the loaded module with the groups it was saved with."
        )
    for group, group_names in zip(saved["groups"], names, strict=True):
        for name in group_names:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group_names]})
    return {"state": {numbers[name]: entry for name, entry in saved["state"].items()}, "param_groups": groups}


def _names_of_groups(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in unwrapped(module).named_parameters()}
    groups = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    foreign = sum(name is None for group in groups for name in group)
    if foreign:
        raise UserError(
            f"{foreign} parameter(s) of the optimizer are not parameters of the module. Make the optimizer from the "
            "module's parameters, or keep its state with extra={'optimizer': optimizer.state_dict()}."
        )
    return [[str(name) for name in group] for group in groups]
