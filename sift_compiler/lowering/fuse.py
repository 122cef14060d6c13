"""Fuse what follows a sparse layer into it, in graphs that are traced for inference.

    act(batch_norm(layer(x)) + r)  →  layer_fused(x, mean, var, γ, β, ε, r, act)

Each part may be missing; the order is that above. A step is taken only if its result is the only use of what goes in, keeps shape and
float32, and batch norm is in evaluation mode. The fused call stands where the last step stood; nothing between it and the layer may
change a tensor in place, for that tensor might be the layer's input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.partition import SparseNode, bound_arguments, fake
from sift_compiler.nn import fused as fused  # registers the operators

_aten = torch.ops.aten
# Graphs of torch.export, and what a rewrite makes of them, hold operators of ATen where models hold functions.
_ADDITIONS_IN_PLACE = (operator.iadd, "add_", _aten.add_.Tensor)
_ADDITIONS = (operator.add, torch.add, "add", _aten.add.Tensor, *_ADDITIONS_IN_PLACE)
_CLAMPS = (F.hardtanh, _aten.hardtanh.default, _aten.hardtanh_.default)
_GELUS = (F.gelu, _aten.gelu.default, _aten.gelu_.default)
_ACTIVATIONS: Mapping[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    _aten.relu.default: "relu", _aten.relu_.default: "relu",
    F.relu6: "relu6", _aten.relu6.default: "relu6", _aten.relu6_.default: "relu6",
    F.silu: "silu", _aten.silu.default: "silu", _aten.silu_.default: "silu",
    F.hardswish: "hard_swish", _aten.hardswish.default: "hard_swish", _aten.hardswish_.default: "hard_swish",
}  # fmt: skip
_NORM = ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps")
_MODES = ("_set_grad_enabled", "set_grad_enabled", "_enter_autocast", "_exit_autocast")


@dataclass(frozen=True)
class Chain:
    """What follows a sparse layer and can become its epilogue.

    Attributes:
        steps: the nodes, in order.
        norm: arguments of batch norm by the names of its parameters, or None.
        residual: what is added, or None.
        activation: one of nn.fused.ACTIVATIONS.
    """

    steps: tuple[fx.Node, ...] = ()
    norm: Mapping[str, Any] | None = None
    residual: fx.Node | None = None
    activation: str = "none"

    @property
    def epilogue(self) -> Epilogue:
        """What the kernel is built with."""
        return Epilogue(scaled=self.norm is not None, residual=self.residual is not None, activation=self.activation)


def needs_gradients(graph: fx.Graph, example_inputs: Sequence[Any]) -> bool:
    """Whether gradients may be asked of the graph: then nothing is fused."""
    switches = any(_name(node) in _MODES[:2] for node in graph.nodes)
    trained = any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
    return trained and (switches or torch.is_grad_enabled())


def find_chain(sparse: SparseNode) -> Chain:
    """The longest chain after a layer; one without steps if there is nothing to fuse."""
    chains = [Chain()]
    node = sparse.node
    while len(node.users) == 1:
        step = next(iter(node.users))
        longer = _extended(chains[-1], node, step) if _alike(step, sparse.node) else None
        if longer is None:
            break
        chains.append(longer)
        node = step
    return next(chain for chain in reversed(chains) if not _disturbed(sparse.node, chain))


def fuse(sparse: SparseNode, chain: Chain, handle: int) -> fx.Node:
    """Replace the layer and ``chain`` by one call of the kernel behind ``handle``, which is returned."""
    replaced = (sparse.node, *chain.steps)
    bound, graph, last = bound_arguments(sparse.node), sparse.node.graph, replaced[-1]
    with graph.inserting_before(last):
        norm = [None if chain.norm is None else chain.norm[name] for name in ("mean", "variance", "weight", "bias")]
        tensors = [bound[name] for name in ("x", "values", "index", "bias")]
        geometry = ("shape", "stride", "padding", "dilation", "groups") if sparse.spec.kind == "conv2d" else ("shape",)
        target = torch.ops.sift.conv2d_fused if sparse.spec.kind == "conv2d" else torch.ops.sift.linear_fused
        arguments = (
            *tensors,
            *norm,
            0.0 if chain.norm is None else chain.norm["eps"],
            chain.residual,
            chain.activation,
            *(bound[name] for name in geometry),
            handle,
        )
        made = graph.call_function(target, arguments)
    made.meta = {**last.meta, "nn_module_stack": sparse.node.meta.get("nn_module_stack")}
    last.replace_all_uses_with(made)
    for node in reversed(replaced):
        graph.erase_node(node)
    return made


# --- steps ----------------------------------------------------------------------------------------------------------


def _extended(chain: Chain, node: fx.Node, step: fx.Node) -> Chain | None:
    """``chain``, whose last result is ``node``, with ``step``; None if that cannot be part of it."""
    if chain.activation != "none":
        return None
    steps = (*chain.steps, step)
    if step.target in (F.batch_norm, torch.batch_norm) and chain.norm is None and chain.residual is None:
        norm = _norm(step) if step.target is F.batch_norm else None
        return None if norm is None or norm["input"] is not node else Chain(steps, norm)
    if step.target in _ADDITIONS and chain.residual is None:
        residual = _other(node, step)
        return None if residual is None else Chain(steps, chain.norm, residual)
    activation = _activation(step)
    return (
        None if activation is None or step.args[:1] != (node,) else Chain(steps, chain.norm, chain.residual, activation)
    )


def _norm(step: fx.Node) -> dict[str, Any] | None:
    """Arguments of a batch norm in evaluation mode with statistics in float32, else None."""
    defaults: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    named = {"running_mean": "mean", "running_var": "variance"}
    given = {named.get(name, name): value for name, value in step.kwargs.items()}
    norm = {**defaults, **dict(zip(_NORM, step.args, strict=False)), **given}
    tensors = [norm.get(name) for name in ("mean", "variance", "weight", "bias")]
    if norm["training"] is not False or tensors[0] is None or tensors[1] is None:
        return None
    plain = all(t is None or (isinstance(t, fx.Node) and fake(t).dtype == torch.float32) for t in tensors)
    rank = fake(step).dim()
    # Channels are dimension 1; of a linear layer's output that is the last one only if it has two.
    return norm if plain and rank in (2, 4) and not isinstance(norm["eps"], fx.Node) else None


def _other(node: fx.Node, step: fx.Node) -> fx.Node | None:
    """What ``step`` adds to ``node``: a tensor of the same shape; in place only into ``node`` itself."""
    if step.kwargs or len(step.args) != 2:
        return None
    left, right = step.args
    if right is node and left is not node and step.target not in _ADDITIONS_IN_PLACE:
        left, right = right, left
    if left is not node or not isinstance(right, fx.Node) or right is node:
        return None
    return right if _alike(right, node) else None


def _activation(step: fx.Node) -> str | None:
    arguments = step.args[1:]
    if step.target in _CLAMPS:
        bounds = (*arguments, *(step.kwargs.get(name) for name in ("min_val", "max_val")[len(arguments) :]))
        return "relu6" if bounds[:2] == (0.0, 6.0) else None
    if step.target in _GELUS:
        kind = step.kwargs.get("approximate", arguments[0] if arguments else "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(kind))
    return _ACTIVATIONS.get(step.target)


# --- conditions -----------------------------------------------------------------------------------------------------


def _alike(node: fx.Node, layer: fx.Node) -> bool:
    """Whether two nodes are float32 tensors of the same shape on the same device."""
    one, other = (n.meta.get("example_value", n.meta.get("val")) for n in (node, layer))
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.shape == other.shape and one.device == other.device and one.dtype == other.dtype == torch.float32


def _disturbed(layer: fx.Node, chain: Chain) -> bool:
    """Whether something between the layer and the end of the chain, but not of it, changes a tensor in place or a mode."""
    if not chain.steps:
        return False
    node = layer.next
    while node is not chain.steps[-1]:
        if node not in chain.steps and mutates(node):
            return True
        node = node.next
    return False


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


_INPLACE_OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    function for name, function in vars(operator).items() if name.startswith("i") and f"__{name}__" in vars(operator)
) | {operator.setitem, operator.delitem}


def mutates(node: fx.Node) -> bool:
    """Whether a node might change a tensor in place; in doubt, yes."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if node.op == "call_module" or node.target in _INPLACE_OPERATORS or _name(node) in _MODES:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = _name(node)
    flagged = any(value is True for value in node.args) or node.kwargs.get("inplace") is True
    return (name.endswith("_") and not name.endswith("__")) or flagged or "out" in node.kwargs
