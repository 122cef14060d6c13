"""Make in-place operators functional and drop what export adds for its own checks.

    %y = aten.relu_(%x)   →   %y = aten.relu(%x)         later uses of %x become uses of %y

In-place on a tensor that another live node views cannot be written this way and is refused. Writes into a buffer of the model
(a counter, an average) are part of what the model does and stay.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from sift_compiler.errors import UnsupportedError
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.operators import is_operator, place

_CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


class RemoveMutation(Pass):
    """In-place operators become functional; guards and assertions go.

    Raises:
        UnsupportedError: an in-place write into a tensor that shares memory with one used later, or without functional form.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite every in-place operator on an activation."""
        changes: list[str] = []
        for node in list(graph_module.graph.nodes):
            if _is_check(node):
                changes.append(f"removed {node.name}")
                graph_module.graph.erase_node(node)
            elif is_operator(node) and _written(node) is not None:
                target = _written(node)
                assert target is not None
                if target.op != "get_attr":
                    _refuse_shared_memory(node, target)
                    _make_functional(node, target)
                    changes.append(f"{node.name} is functional")
        if hasattr(graph_module, "_guards_fn"):
            delattr(graph_module, "_guards_fn")
        return PassResult(graph_module, tuple(changes))


def _is_check(node: Node) -> bool:
    if node.op == "call_module":
        return node.target == "_guards_fn"
    return is_operator(node) and not node.users and node.target._schema.name.split("::")[-1] in _CHECKS  # type: ignore[union-attr]


def _written(node: Node) -> Node | None:
    """The argument an operator writes into."""
    schema = node.target._schema  # type: ignore[union-attr]
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            return value if isinstance(value, Node) else None
    return None


def _views(node: Node) -> Node | None:
    """The argument whose memory the node's result may share."""
    if not is_operator(node):
        return None
    schema = node.target._schema  # type: ignore[union-attr]
    if not any(value.alias_info is not None for value in schema.returns) or not node.args:
        return None
    return node.args[0] if isinstance(node.args[0], Node) else None


def _base(node: Node) -> Node:
    source = _views(node)
    return node if source is None else _base(source)


def _refuse_shared_memory(node: Node, target: Node) -> None:
    base, order = _base(target), {each: position for position, each in enumerate(node.graph.nodes)}
    for each in node.graph.nodes:
        shares = each is not target and each is not node and _base(each) is base
        if (
            shares
            and not _descends(each, node)
            and any(order[user] > order[node] and user is not node for user in each.users)
        ):
            raise UnsupportedError(
                f"The {place(node)} writes in place into memory that {each.name!r} shares and that is read afterwards. "
                "Write it without assignment into a slice or a view (torch.cat, torch.where, x = x + y)."
            )


def _descends(node: Node, ancestor: Node) -> bool:
    source: Node | None = node
    while source is not None:
        if source is ancestor:
            return True
        source = _views(source)
    return False


def _make_functional(node: Node, target: Node) -> None:
    overload = node.target
    assert isinstance(overload, torch._ops.OpOverload)
    name = overload._schema.name.split("::")[-1]
    packet = getattr(getattr(torch.ops, overload.namespace), name.removesuffix("_"), None)
    functional = getattr(packet, overload._overloadname, None)
    if not name.endswith("_") or functional is None:
        raise UnsupportedError(
            f"The {place(node)} writes into one of its arguments and has no functional form. Write the model without it."
        )
    node.target = functional
    order = {each: position for position, each in enumerate(node.graph.nodes)}
    target.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
