"""All mask methods, and which rule belongs to which; RigL is SET with one function changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sift_compiler.errors import UnsupportedError
from sift_compiler.ir.entries import Entries
from sift_compiler.ir.mask_structure import TransposableNM
from sift_compiler.masking import criteria, needed
from sift_compiler.masking.bame import BAME
from sift_compiler.masking.bidst import BiDST
from sift_compiler.masking.gradual import GMP, GraNet
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.mest import MEST
from sift_compiler.masking.rule import Rule
from sift_compiler.masking.snfs import SNFS
from sift_compiler.masking.srigl import SRigL
from sift_compiler.masking.straight_through import SRSTE, TopKAST
from sift_compiler.options import SET, MaskMethod, RigL, Static


class GradientGrowth(Rule):
    """RigL (Evci et al. 2020, Alg. 1): connections come where the dense gradient is largest."""

    needs_dense_gradient = True
    uses_gradient_size = False

    def grow_scores(self, layer: LayerView, candidates: Tensor) -> Tensor:
        """|g| at each candidate; g is the mean over all ranks."""
        return criteria.magnitude(layer.gradient_at(candidates))

    def reduces(self, layer: LayerView) -> bool:
        """All structures but the transposable one."""
        return not isinstance(layer.structure, TransposableNM)

    def needed(self, layer: LayerView, gradient: Tensor) -> Entries:
        """g of the active weights, any of which may be dropped and grown again, and the largest |g| elsewhere."""
        (target,) = self.targets([layer], layer.step)
        return needed.by_magnitude(layer, gradient, target.active - target.survivors)


METHODS: Mapping[str, type[MaskMethod]] = {
    kind.__name__: kind for kind in (Static, SET, RigL, SNFS, GMP, GraNet, MEST, SRigL, SRSTE, TopKAST, BAME, BiDST)
}
"""Every method by its name."""


def rule_of(method: MaskMethod) -> Rule | None:
    """The rule of ``method``; None if its masks never move.

    Raises:
        UnsupportedError: a method that has none.
    """
    if isinstance(method, Rule):
        return method
    if isinstance(method, RigL):
        return GradientGrowth(method)
    if isinstance(method, SET):
        return Rule(method)
    if isinstance(method, Static):
        return None
    raise UnsupportedError(
        f"The mask method {method!r} has no rule. Known: {', '.join(METHODS)}. A method of your own derives from "
        "sift.DynamicMethod; see examples/write_a_method.py."
    )


def plain(method: MaskMethod) -> dict[str, Any]:
    """Name and options as they come back from a file: tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(method)))
    return {"name": method.name, **plain}


def shown(method: Mapping[str, Any]) -> str:
    """What :func:`plain` made, as one would write it."""
    options = ", ".join(f"{name}={value!r}" for name, value in method.items() if name != "name")
    return f"{method.get('name')}({options})"
