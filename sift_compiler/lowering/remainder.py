"""What remains of a graph beside its sparse kernels, and how much a compiler that fuses operations could save of it.

Fusing two operations of which one reads what the other returned saves writing and reading that tensor, and one call. Products
(convolutions, linear layers, attention) and operators of other libraries are not fused; views cost a call only. So at most

    saved = Σ 2 · bytes of what is handed over + calls · CALL_BYTES

of all bytes that the graph reads and writes. The sparse kernels' bytes count in the whole; that they compute, too, is left out, so the
share is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils import _pytree as pytree

from sift_compiler.lowering.fuse import mutates

CALL_BYTES = 2**16
"""What a call of an operation costs, told in bytes: 5 to 10 µs at 10 GB/s."""
_PRODUCTS = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
    ]
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a graph reads and writes, calls included at :data:`CALL_BYTES`.

    Attributes:
        whole: of all operations.
        saved: most that fusing could save.
    """

    whole: int
    saved: int

    @property
    def share(self) -> float:
        """What could be saved, in [0, 1]."""
        return min(1.0, self.saved / self.whole) if self.whole else 0.0

    def __str__(self) -> str:
        return f"at most {100 * self.share:.1f} % of {self.whole / 1e6:.0f} MB read and written"


def traffic(graph: fx.Graph) -> Traffic | None:
    """What ``graph`` reads and writes; None if it holds what cannot be judged: modules, subgraphs, results without a known shape.

    The nodes must carry fake tensors, as Dynamo leaves them. Sizes that are free count as they are now; nothing is guarded.
    """
    whole = saved = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if not _known(node):
            return None
        if not _tensors(node):  # arithmetic on sizes
            continue
        whole += CALL_BYTES
        if _is_view(node):
            saved += CALL_BYTES
            continue
        whole += _bytes(tensor for source in node.all_input_nodes for tensor in _tensors(source)) + _bytes(
            _tensors(node)
        )
        if _is_product(node):
            continue
        saved += CALL_BYTES
        for source in dict.fromkeys(_owner(each) for each in node.all_input_nodes):
            if source.op == "call_function" or source.op == "call_method":
                saved += 0 if _is_product(source) else 2 * _bytes(_tensors(source))
    return Traffic(whole, saved)


def _known(node: fx.Node) -> bool:
    """Whether an operation on tensors says what it returns."""
    if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    return "example_value" in node.meta or "val" in node.meta


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("example_value", node.meta.get("val"))
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    sizes = 0
    for tensor in tensors:
        count = tensor.element_size()
        for size in tensor.shape:
            count *= optimization_hint(size, fallback=1)
        sizes += count
    return sizes


def _memory(node: fx.Node) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(node)}


def _is_view(node: fx.Node) -> bool:
    """Whether everything it returns lies in the memory of what it was given, and stays as it was."""
    given = {place for source in node.all_input_nodes for place in _memory(source)}
    return bool(given) and _memory(node) <= given and not mutates(node)


def _owner(node: fx.Node) -> fx.Node:
    """The node that made the memory of which ``node`` is a view."""
    while node.op in ("call_function", "call_method") and _tensors(node) and _is_view(node):
        place = _memory(node)
        node = next(source for source in node.all_input_nodes if _memory(source) & place)
    return node


def _is_product(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        name = str(target._qualified_op_name)
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
    else:
        name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    space, _, operator = name.rpartition("::")
    return operator in _PRODUCTS or space not in ("", "aten", "prims")
