"""The arguments a model is called with, by position or by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sift_compiler.errors import UserError

Inputs = tuple[Any, ...] | dict[str, Any]
"""Positional arguments, or keyword arguments by name."""


def as_inputs(example_inputs: object) -> Inputs:
    """The arguments of a model: a mapping gives keyword arguments, a tuple or list positional ones, a tensor the only one.

    A model whose only argument is a dict gets it in a tuple: ``({"k": tensor},)``.

    Raises:
        UserError: no tensor among them, or a name that is not a string.
    """
    inputs: Inputs
    if isinstance(example_inputs, Mapping):
        inputs = dict(example_inputs)
    else:
        inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs)):
        raise UserError(
            "example_inputs must be a tensor, a tuple of the model's positional arguments or a dict of its keyword arguments, "
            f"with at least one tensor; got {type(example_inputs).__name__}. Example: (torch.randn(2, 3, 224, 224),)."
        )
    if isinstance(inputs, dict) and not all(isinstance(name, str) for name in inputs):
        raise UserError(
            "example_inputs given as a dict holds the model's keyword arguments, so its keys must be their names. "
            "A model whose only argument is a dict gets it in a tuple: ({...},)."
        )
    return inputs


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` as positional and keyword arguments."""
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def called(module: nn.Module, inputs: Inputs) -> Any:
    """What ``module`` gives for ``inputs``."""
    args, kwargs = arguments_of(inputs)
    return module(*args, **kwargs)


def positional(module: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """``inputs`` in the order of the module's forward.

    Raises:
        UserError: forward has no arguments of these names, or cannot take them by position.
    """
    if not isinstance(inputs, dict):
        return inputs
    try:
        bound = inspect.signature(module.forward).bind(**inputs)
    except TypeError as error:
        raise UserError(f"{type(module).__name__} does not take the example inputs: {error}.") from error
    bound.apply_defaults()
    given = max(position for position, name in enumerate(bound.arguments) if name in inputs)
    if bound.kwargs and any(name in inputs for name in bound.kwargs):
        raise UserError(
            f"{type(module).__name__} takes {', '.join(name for name in bound.kwargs if name in inputs)} by name only. "
            "Rewrite the model first: the graph that sift.rewrite returns takes its inputs by position too."
        )
    return tuple(bound.args[: given + 1])
