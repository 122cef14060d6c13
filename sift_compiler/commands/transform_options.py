"""Transformations on the command line: one for all layers, or several by pattern of module paths.

    --transform doped --sigma relu --structure nm:2:4
    --member 'layer1.*=parallel,sigma=relu' --member 'layer4.*=doped,sparsity=0.9' --member 'fc=dense'

Options of the command hold for every member that has them; those of a member, after its name, hold for it alone. Seed and
initialisation are the model's and no member has its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sift_compiler.commands.arguments import STRUCTURE_FORMS
from sift_compiler.errors import UserError, unknown_name
from sift_compiler.ir.mask_structure import NM, UNSTRUCTURED, Block, Channel, ConstantFanIn, Structure, TransposableNM
from sift_compiler.options import DISTRIBUTIONS, TRANSFORMATIONS, Transformation, from_mapping

DENSE = "dense"
"""What a member is called that keeps its layers as they are."""

_STRUCTURES: Mapping[str, tuple[type[Structure], int]] = {
    "nm": (NM, 2),
    "transposable": (TransposableNM, 2),
    "block": (Block, 2),
    "constant-fan-in": (ConstantFanIn, 0),
    "channel": (Channel, 0),
}
"""Every structure as it is written on the command line."""

_SHARED = ("seed", "init", "dense")


def transform_of(
    name: str | None, members: Sequence[str], options: Mapping[str, Any]
) -> Transformation | dict[str, Transformation | None]:
    """What ``sift.rewrite`` takes as its transformation.

    Args:
        name: of the transformation of all layers, or with ``members`` of those that no member names; None then keeps these, and
            without members means ``"wide"``.
        members: ``"PATTERN=NAME[,option=value…]"``, the first that fits a layer has it.
        options: of the command, by field; None where they were not given. Texts of structures and distributions are understood.

    Raises:
        UserError: a name, an option or a value that no transformation, or not this one, knows.
    """
    given = {field: understood(field, value) for field, value in options.items() if value is not None}
    if not members:
        return from_mapping(_kind(name or "wide"), given)
    mix: dict[str, Transformation | None] = {}
    kinds: list[type[Transformation]] = []
    for text in members:
        pattern, kind, own = _member(text)
        if pattern in mix:
            raise UserError(f"--member names the pattern {pattern!r} twice; write it once.")
        mix[pattern] = None if kind is None else _made(kind, {**given, **own}, own)
        kinds += [] if kind is None else [kind]
    if name is not None:
        mix["*"] = _made(_kind(name), given, {})
        kinds.append(_kind(name))
    for field in given:
        if kinds and not any(field in _fields(kind) for kind in kinds):
            raise unknown_name(f"option of {', '.join(kind.__name__ for kind in kinds)}", field, _known(kinds))
    return mix


def _member(text: str) -> tuple[str, type[Transformation] | None, dict[str, Any]]:
    """Pattern, transformation (None keeps dense) and own options of one ``--member``."""
    pattern, equals, rest = text.partition("=")
    name, *settings = [part.strip() for part in rest.split(",")]
    if not (equals and pattern.strip() and name):
        raise UserError(
            f"--member {text!r} is not understood. Write PATTERN=NAME, e.g. 'layer1.*=parallel', or with options of its own "
            f"'layer1.*=parallel,sparsity=0.75,sigma=relu'. Names: {', '.join(TRANSFORMATIONS)}, {DENSE}."
        )
    own: dict[str, Any] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not (equals and field and value):
            raise UserError(f"--member {text!r}: {setting!r} is not an option; write option=value, e.g. sparsity=0.75.")
        field = field.strip().replace("-", "_")
        if field in _SHARED:
            raise UserError(
                f"--member {text!r}: {field} is the model's, not a member's; give --{field} to the command."
            )
        own[field] = understood(field, value.strip())
    if name == DENSE:
        if own:
            raise UserError(f"--member {text!r}: layers that stay dense have no options.")
        return pattern.strip(), None, {}
    return pattern.strip(), _kind(name), own


def _made(kind: type[Transformation], given: Mapping[str, Any], own: Mapping[str, Any]) -> Transformation:
    """The transformation of one member; options of the command that it does not have are another's."""
    return from_mapping(
        kind, {field: value for field, value in given.items() if field in own or field in _fields(kind)}
    )


def _kind(name: str) -> type[Transformation]:
    if name not in TRANSFORMATIONS:
        raise unknown_name("transform", name, TRANSFORMATIONS)
    return TRANSFORMATIONS[name]


def _fields(kind: type[Transformation]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _known(kinds: Sequence[type[Transformation]]) -> set[str]:
    return set().union(*(_fields(kind) for kind in kinds))


def understood(field: str, value: Any) -> Any:
    """The value of a field from its text; anything but a text, and texts that mean themselves, as they are."""
    if not isinstance(value, str):
        return value
    if field == "structure":
        return structure_of(value)
    if field == "distribution" and "=" in value:
        return dict(_share(part) for part in value.split(","))
    if field == "pin":
        return tuple(value.split("+"))
    reads = {"sparsity": (float, "a number such as 0.75"), "round_to": (int, "a whole number")}
    if field not in reads:
        return value
    read, expected = reads[field]
    try:
        return read(value)
    except ValueError:
        raise UserError(f"{field}={value!r} is not possible: it must be {expected}.") from None


def structure_of(text: str) -> Structure:
    """The structure that a text such as ``"nm:2:4"`` names.

    Raises:
        UserError: an unknown name, the wrong number of sizes, or sizes that are not possible.
    """
    name, *sizes = text.split(":")
    if name == "unstructured" and not sizes:
        return UNSTRUCTURED
    if name not in _STRUCTURES:
        raise unknown_name("structure", text, ["unstructured", *_STRUCTURES])
    kind, count = _STRUCTURES[name]
    if len(sizes) != count or not all(size.strip().isdecimal() for size in sizes):
        raise UserError(f"structure {text!r} is not understood. Expected is {STRUCTURE_FORMS}.")
    return kind(*(int(size) for size in sizes))


def _share(part: str) -> tuple[str, float]:
    """``"block1.*=0.9"`` as pattern and sparsity."""
    pattern, _, number = part.partition("=")
    try:
        return pattern.strip(), float(number)
    except ValueError:
        raise UserError(
            f"distribution {part!r} is not understood. Expected is one of {', '.join(DISTRIBUTIONS)}, or sparsities by pattern of module "
            "paths: 'block1.*=0.9,block2.*=0.5'."
        ) from None
