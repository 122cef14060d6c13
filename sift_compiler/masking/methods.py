"""Which rule belongs to which method; RigL is SET with one function changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sift_compiler.errors import UnsupportedError
from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import Rule
from sift_compiler.options import SET, MaskMethod, RigL, Static


class GradientGrowth(Rule):
    """RigL (Evci et al. 2020, Alg. 1): connections come where the dense gradient is largest."""

    needs_dense_gradient = True

    def grow_scores(self, layer: LayerView, candidates: Tensor) -> Tensor:
        """|g| at each candidate; g is the mean over all ranks."""
        return criteria.magnitude(layer.dense_gradient[candidates])


RULES: Mapping[type[MaskMethod], type[Rule] | None] = {Static: None, SET: Rule, RigL: GradientGrowth}
"""The rule of every method; None if its masks never move."""


def rule_of(method: MaskMethod) -> Rule | None:
    """The rule of ``method``, a fresh one for every scheduler; None if its masks never move.

    Raises:
        UnsupportedError: a method that has none.
    """
    if isinstance(method, Rule):
        return method
    for kind in type(method).__mro__:
        if kind in RULES:
            made = RULES[kind]
            return None if made is None else made(method)
    raise UnsupportedError(
        f"The mask method {method!r} has no rule. Known: {', '.join(kind.__name__ for kind in RULES)}. A method of your own derives "
        "from sift.OwnMethod; see examples/write_a_method.py."
    )
