"""Example inputs from the command line: ``f32[16,3,224,224]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.export import ExportedProgram

from sift_compiler.errors import UserError, unknown_name

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
"""Names of element types on the command line."""

_SPEC = re.compile(r"(?P<dtype>[a-z]+\d*)\s*\[(?P<sizes>[\d\s,]*)\]")


def example_input(text: str) -> Tensor:
    """The tensor that ``text`` describes: standard normal numbers for floating types, zeros for all others (valid as token ids).

    Raises:
        UserError: ``text`` is not of the form ``dtype[size,size,...]``.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"--input {text!r} is not understood. Give an element type and the sizes in brackets, the batch first: "
            "--input 'f32[16,3,224,224]'."
        )
    if match["dtype"] not in DTYPES:
        raise unknown_name("element type of --input", match["dtype"], DTYPES)
    try:
        sizes = [int(size) for size in match["sizes"].split(",")] if match["sizes"].strip() else []
    except ValueError:
        raise UserError(
            f"--input {text!r}: sizes are whole numbers separated by commas, such as [16,3,32,32]."
        ) from None
    if 0 in sizes:
        raise UserError(f"--input {text!r}: every size must be at least 1.")
    dtype = DTYPES[match["dtype"]]
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(sizes, generator=generator) if dtype.is_floating_point else torch.zeros(sizes)
    return normal.to(dtype)


def example_inputs(texts: Sequence[str]) -> tuple[Tensor, ...]:
    """One tensor for every text; see :func:`example_input`."""
    return tuple(example_input(text) for text in texts)


def inputs_of(model: object, given: Sequence[str] | None) -> tuple[Any, ...]:
    """The inputs ``given`` as texts, or else those that the model's file remembers.

    Raises:
        UserError: a text is not understood, or none is given and the model remembers none.
    """
    if given:
        return example_inputs(given)
    if isinstance(model, fx.GraphModule):
        return remembered_inputs(model)
    if isinstance(model, ExportedProgram) and model.example_inputs is not None and not model.example_inputs[1]:
        return tuple(model.example_inputs[0])
    raise UserError(
        "The shapes of the model's inputs are not known. Give every one of them: --input 'f32[16,3,224,224]'."
    )


def remembered_inputs(module: fx.GraphModule) -> tuple[Any, ...]:
    """Zeros of the shapes a loaded graph was made for, with a batch of 1.

    Raises:
        UserError: the graph does not remember them, or a dimension other than the first is free.
    """
    inputs: list[Any] = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise UserError(
                f"The model does not tell the shape of its input {node.name!r}. Give every input: --input 'f32[…]'."
            )
        if any(isinstance(size, SymInt) for size in value.shape[1:]):
            raise UserError(f"The input {node.name!r} has several free dimensions. Give every input: --input 'f32[…]'.")
        sizes = [1 if isinstance(size, SymInt) else int(size) for size in value.shape]
        inputs.append(torch.zeros(sizes, dtype=value.dtype))
    return tuple(inputs)
