"""What a width rule works with: the widths of its arguments, and a way to tie, pin and note literals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sift_compiler.ir.width import Literal, Width, fixed
from sift_compiler.options import Attention, Groups
from sift_compiler.passes.attention_heads import head_splits
from sift_compiler.passes.operators import attribute, parameter_paths, place
from sift_compiler.passes.width_solver import WidthSolver

Widths = tuple[Width, ...]
_PRIMES = (100003, 100019, 100043, 100049, 100057, 100069, 100103, 100109, 100129, 100151)


@dataclass(frozen=True, kw_only=True)
class WidthChoices:
    """Where a width is a product, which factor grows.

    Attributes:
        attention: ``"heads_fixed"``: every head gets wider; ``"head_dim_fixed"``: there are more heads of the same width.
        groups: of grouped convolutions. ``"groups_fixed"``: every group gets wider; ``"group_width_fixed"``: there are more groups of
            the same width (ResNeXt). A depthwise convolution always has one channel per group.
        more_heads: nodes that split into more heads whatever ``attention`` says, because the width of their heads is fixed.
    """

    attention: Attention = "heads_fixed"
    groups: Groups = "groups_fixed"
    more_heads: frozenset[str] = frozenset()


class WidthContext:
    """The state of one width inference over a graph module."""

    def __init__(self, graph_module: GraphModule, choices: WidthChoices | None = None) -> None:
        self.graph_module = graph_module
        self.choices = choices or WidthChoices()
        self.head_splits = head_splits(graph_module)
        self.head_parts: list[tuple[Node, Width]] = []
        self.counts: list[Width] = []
        self.solver = WidthSolver()
        self.literals: list[Literal] = []
        self.tensors: dict[str, Widths] = {}
        self._paths = parameter_paths(graph_module)
        self._of_tensor: dict[int, Widths] = {}
        self._of_node: dict[Node, Any] = {}
        self._stand_ins: dict[Any, int] = {}

    def more_heads(self, node: Node) -> bool:
        """Whether a reshape that splits a width into heads makes more of them, rather than wider ones."""
        fixed_width = self.choices.attention == "head_dim_fixed" or node.name in self.choices.more_heads
        return node in self.head_splits and fixed_width

    # --- sizes ---------------------------------------------------------------------------------------------------------

    def sizes(self, value: Tensor) -> tuple[Width, ...]:
        """The dimensions of a fake tensor as fixed widths; a dynamic size gets a large prime of its own as stand-in."""
        return tuple(self._fixed(size) for size in value.shape)

    def _fixed(self, size: int | torch.SymInt) -> Width:
        if isinstance(size, int):
            return fixed(size)
        expression: Any = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self._stand_ins.setdefault(symbol, _PRIMES[len(self._stand_ins) % len(_PRIMES)])
        number = int(expression.subs(self._stand_ins))
        return fixed(number, dynamic=bool(expression.free_symbols))

    def size(self, width: Width) -> int:
        """The present size of a width."""
        return self.solver.size(width)

    def result(self, node: Node) -> tuple[Width, ...]:
        """The dimensions of a node's value, all fixed: the answer of a rule for what cannot grow."""
        value = node.meta["val"]
        return self.sizes(value) if isinstance(value, Tensor) else ()

    # --- widths --------------------------------------------------------------------------------------------------------

    def of(self, node: Any) -> Any:
        """Widths of a node's dimensions; a tuple of them for a node with several values; ``()`` for what is no tensor."""
        if not isinstance(node, Node):
            return ()
        if node.op == "get_attr" and node not in self._of_node:
            return self._of_attribute(node)
        return self.resolved(self._of_node[node])

    def _of_attribute(self, node: Node) -> Widths:
        """Widths of a bare parameter or buffer; sizes of 1 are there to be stretched, whole numbers are positions."""
        tensor = self.tensor(node)
        if tensor is None:
            return ()
        floating = tensor.is_floating_point()
        return self.parameter(
            tensor, [position for position, size in enumerate(tensor.shape) if size == 1 or not floating]
        )

    def resolved(self, widths: Any) -> Any:
        """The same widths in terms of free classes."""
        if isinstance(widths, Width):
            return self.solver.resolve(widths)
        return tuple(self.resolved(each) for each in widths)

    def record(self, node: Node, widths: Any) -> None:
        """Note the widths of a node."""
        self._of_node[node] = widths

    def parameter(self, tensor: Tensor | None, fixed_dimensions: Sequence[int] = ()) -> Widths:
        """Widths of a parameter's or buffer's dimensions; the first call decides which of them are fixed."""
        if tensor is None:
            return ()
        if id(tensor) not in self._paths:
            return tuple(fixed(size) for size in tensor.shape)  # a constant of the graph
        if id(tensor) not in self._of_tensor:
            names = self._paths[id(tensor)]
            self._of_tensor[id(tensor)] = tuple(
                fixed(size) if position in fixed_dimensions else self.solver.fresh(size, f"{names[0]}[{position}]")
                for position, size in enumerate(tensor.shape)
            )
            for name in names:
                self.tensors[name] = self._of_tensor[id(tensor)]
        return self.resolved(self._of_tensor[id(tensor)])  # type: ignore[no-any-return]

    def tensor(self, node: Any) -> Tensor | None:
        """The parameter or buffer behind a ``get_attr`` node."""
        value = attribute(self.graph_module, node)
        return value if isinstance(value, Tensor) else None

    def fresh(self, size: int, origin: str) -> Width:
        """A new class of present ``size``."""
        return self.solver.fresh(size, origin)

    def unify(self, left: Width, right: Width, node: Node) -> None:
        """Make two widths the same, because of ``node``."""
        self.solver.unify(left, right, place(node))

    def unify_all(self, left: Sequence[Width], right: Sequence[Width], node: Node) -> None:
        """Make widths the same pair by pair."""
        for one, other in zip(left, right, strict=True):
            self.unify(one, other, node)

    def pin(self, widths: Any, reason: str) -> None:
        """Keep sizes as they are."""
        if isinstance(widths, Width):
            self.solver.pin(widths, reason)
        else:
            for width in widths:
                self.pin(width, reason)

    def literal(self, node: Node, argument: str, position: int | None, width: Width, power: float = 1.0) -> None:
        """Note that a number of the node is a width (to a ``power``) and must follow it; a module's number is noted by its attribute."""
        self.literals.append(Literal(node.name, argument, position, width, power))


def flat(widths: Any) -> list[Width]:
    """All widths of a node's value or values."""
    return [widths] if isinstance(widths, Width) else [width for each in widths for width in flat(each)]


Rule = Callable[[WidthContext, Node], Any]
"""Ties the widths of a node's arguments and returns those of its value (a tuple of them for a node with several values)."""
