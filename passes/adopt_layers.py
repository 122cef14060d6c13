"""Matrix products with a bare parameter become linear layers of their own, so that a transformation can take them.

    %y = aten.linear(%x, %attn_in_proj_weight, %attn_in_proj_bias)   →   %y = call_module[attn.in_proj]        (nn.MultiheadAttention)
    %y = aten.addmm(%c_fc_bias, %x, %c_fc_weight)                    →   %y = call_module[c_fc], weight transposed    (GPT-2's Conv1D)

Only in a rewrite: a captured graph keeps the parameters it was given, and what stayed dense goes back (``ReturnLayers``). A parameter
that is tied, or that something else reads too, stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.operators import arguments, attribute, is_operator, parameter_paths

aten = torch.ops.aten
_ADOPTED = "sift_adopted"
"""``graph_module.meta``: what each adopted layer was, by its path."""


@dataclass(frozen=True)
class _Product:
    """``x`` times a bare weight, plus a bare bias."""

    operator: Any
    x: Node
    weight: Node
    bias: Node | None

    @property
    def transposed(self) -> bool:
        """Whether the weight is [in, out]."""
        return self.operator is not aten.linear.default


@dataclass(frozen=True)
class _Adopted:
    """Where an adopted layer came from: qualified names, the operator, and the order of its owners' parameters by path."""

    weight: str
    bias: str
    operator: Any
    order: Mapping[str, tuple[str, ...]]


class AdoptLayers(Pass):
    """Give every matrix product with a bare parameter an ``nn.Linear``."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Adopt weight by weight."""
        tied = {name for names in parameter_paths(graph_module).values() if len(names) > 1 for name in names}
        calls: dict[str, list[tuple[Node, _Product]]] = {}
        for node in graph_module.graph.nodes:
            product = _product(node) if is_operator(node) else None
            if product is not None:
                calls.setdefault(str(product.weight.target), []).append((node, product))
        readers = _readers(graph_module)
        changes = []
        for name, found in calls.items():
            if name not in tied and _alone(graph_module, readers, found, tied):
                path, adopted = _adopt(graph_module, found[0][1])
                graph_module.meta.setdefault(_ADOPTED, {})[path] = adopted
                for node, product in found:
                    _call(graph_module, node, path, product)
                changes.append(f"{name} → {path}")
        return PassResult(graph_module, tuple(changes))


def _product(node: Node) -> _Product | None:
    call = arguments(node)
    if node.target is aten.linear.default:
        found = _Product(node.target, call["input"], call["weight"], call["bias"])
    elif node.target is aten.addmm.default and call["beta"] == call["alpha"] == 1:
        found = _Product(node.target, call["mat1"], call["mat2"], call["self"])
    elif node.target in (aten.matmul.default, aten.mm.default):
        found = _Product(node.target, node.args[0], node.args[1], None)  # type: ignore[arg-type]
    else:
        return None
    bare = [found.weight] if found.bias is None else [found.weight, found.bias]
    return found if all(isinstance(each, Node) and each.op == "get_attr" for each in bare) else None


def _readers(graph_module: GraphModule) -> Mapping[str, set[Node]]:
    readers: dict[str, set[Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), set()).update(node.users)
    return readers


def _alone(
    graph_module: GraphModule,
    readers: Mapping[str, set[Node]],
    found: list[tuple[Node, _Product]],
    tied: set[str],
) -> bool:
    """Whether these calls are alike and nothing else reads their weight and bias, which are parameters of fitting shapes."""
    first, nodes = found[0][1], {node for node, _ in found}
    weight, bias = attribute(graph_module, first.weight), attribute(graph_module, first.bias)
    alike = all(product.operator is first.operator and _name(product.bias) == _name(first.bias) for _, product in found)
    fitting = isinstance(weight, nn.Parameter) and weight.dim() == 2
    if first.bias is not None and fitting:
        out = weight.shape[1 if first.transposed else 0]
        fitting = isinstance(bias, nn.Parameter) and tuple(bias.shape) == (out,) and _name(first.bias) not in tied
    names = [name for name in (_name(first.weight), _name(first.bias)) if name]
    return alike and fitting and all(readers[name] <= nodes for name in names)


def _name(node: Node | None) -> str:
    return "" if node is None else str(node.target)


def _adopt(graph_module: GraphModule, product: _Product) -> tuple[str, _Adopted]:
    """Move weight and bias into an ``nn.Linear``; at the path of their owner where it has nothing else, else beneath it."""
    weight, bias = attribute(graph_module, product.weight), attribute(graph_module, product.bias)
    given = weight.detach().t().contiguous() if product.transposed else weight
    layer = nn.Linear(given.shape[1], given.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(given, weight.requires_grad) if product.transposed else weight
    layer.bias = bias
    layer.training = graph_module.training
    owner_path, _, name = _name(product.weight).rpartition(".")
    owner = graph_module.get_submodule(owner_path)
    own = {each for each, tensor in {**owner._parameters, **owner._buffers}.items() if tensor is not None}
    moved = {name} | ({_name(product.bias).rpartition(".")[2]} if product.bias is not None else set())
    homes = [_name(each).rpartition(".")[0] for each in (product.weight, product.bias) if each is not None]
    order = {home: tuple(graph_module.get_submodule(home)._parameters) for home in homes}
    adopted = _Adopted(_name(product.weight), _name(product.bias), product.operator, order)
    if owner_path and own == moved and not owner._modules:
        path = owner_path
    else:
        for each in (product.weight, product.bias):
            if each is not None:
                home, _, attribute_name = _name(each).rpartition(".")
                del graph_module.get_submodule(home)._parameters[attribute_name]
        path = _free_path(graph_module, owner_path, name)
    parent, _, last = path.rpartition(".")
    graph_module.get_submodule(parent)._modules[last] = layer
    return path, adopted


def _free_path(graph_module: GraphModule, owner_path: str, name: str) -> str:
    """``in_proj`` for ``in_proj_weight``, with a number if the owner has something of that name."""
    owner = graph_module.get_submodule(owner_path)
    stem = name.removesuffix("weight").rstrip("_") or "linear"
    taken = {*owner._modules, *owner._parameters, *owner._buffers, *vars(owner)}
    candidates = [stem, *(f"{stem}_{number}" for number in range(1, len(taken) + 2))]
    free = next(each for each in candidates if each not in taken)
    return f"{owner_path}.{free}" if owner_path else free


def _call(graph_module: GraphModule, node: Node, path: str, product: _Product) -> None:
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_module(path, (product.x,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    for each in (product.weight, product.bias):
        if each is not None and not each.users:
            graph_module.graph.erase_node(each)


def given_as(graph_module: GraphModule, name: str) -> tuple[str, bool]:
    """The name that a parameter had in the model given, and whether it was transposed there."""
    path, _, attribute_name = name.rpartition(".")
    adopted = graph_module.meta.get(_ADOPTED, {}).get(path)
    if adopted is None:
        return name, False
    if attribute_name == "bias":
        return adopted.bias, False
    return adopted.weight, adopted.operator is not aten.linear.default


class ReturnLayers(Pass):
    """Make adopted layers that stayed dense bare parameters again, at their names and in their shapes."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Return layer by layer."""
        changes = []
        for path, adopted in graph_module.meta.pop(_ADOPTED, {}).items():
            modules = dict(graph_module.named_modules(remove_duplicate=False))
            layer = modules.get(path)
            if type(layer) is nn.Linear:
                _restore(graph_module, path, layer, adopted)
                for node in graph_module.graph.find_nodes(op="call_module", target=path):
                    _uncall(graph_module, node, adopted)
                changes.append(f"{path} → {adopted.weight}")
        return PassResult(graph_module, tuple(changes))


def _restore(graph_module: GraphModule, path: str, layer: nn.Linear, adopted: _Adopted) -> None:
    parent, _, last = path.rpartition(".")
    table = graph_module.get_submodule(parent)._modules
    if path in adopted.order:
        bare = nn.Module()
        bare.training = layer.training
        table[last] = bare
    else:
        del table[last]
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if adopted.operator is not aten.linear.default:
        weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    for name, parameter in ((adopted.weight, weight), (adopted.bias, layer.bias)):
        if name:
            home, _, attribute_name = name.rpartition(".")
            graph_module.get_submodule(home)._parameters[attribute_name] = parameter
    for home, order in adopted.order.items():
        parameters = graph_module.get_submodule(home)._parameters
        present = {name: parameters[name] for name in [*order, *parameters] if name in parameters}
        parameters.clear()
        parameters.update(present)


def _uncall(graph_module: GraphModule, node: Node, adopted: _Adopted) -> None:
    with graph_module.graph.inserting_before(node):
        weight = graph_module.graph.get_attr(adopted.weight)
        bias = (graph_module.graph.get_attr(adopted.bias),) if adopted.bias else ()
        args = (node.args[0], weight, *bias)
        if adopted.operator is aten.addmm.default:
            args = (*bias, node.args[0], weight)
        new = graph_module.graph.call_function(adopted.operator, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
