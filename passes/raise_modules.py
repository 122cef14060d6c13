"""Make operator calls on a module's parameters calls of that module again, so that ``.train()`` and ``.eval()`` work.

    %y = aten.batch_norm(%x, %bn_weight, %bn_bias, %bn_running_mean, %bn_running_var, True, .1, 1e-5, False)
      →  %y = call_module[bn](%x)            with bn = nn.BatchNorm2d at its original path

Parameters and buffers are taken over as they are, so names, order and tying of the state dict stay. A call is raised only where
one module owns exactly the tensors the call reads; a functional call on a bare parameter stays an operator.
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.errors import UnsupportedError
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.module_kinds import READERS, Call, aten, tensor_of
from sift_compiler.passes.operators import arguments, is_operator, module_path, module_type, parameter_paths, place


class RaiseModules(Pass):
    """conv, linear, batch norm, layer norm, embedding, dropout and the sparse operators become modules.

    Raises:
        UnsupportedError: an operator that behaves differently in training and evaluation could not be given to a module.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Raise every call that can be raised."""
        raised: dict[str, tuple[object, ...]] = {}
        paths = parameter_paths(graph_module)
        changes: list[str] = []
        for node in list(graph_module.graph.nodes):
            reader = READERS.get(node.target) if is_operator(node) else None
            call = reader(graph_module, node) if reader is not None else None
            if call is None:
                continue
            path = _home(graph_module, node, call, paths, raised)
            if path is None:
                continue
            if path not in raised:
                _install(graph_module, path, call)
                raised[path] = call.settings
            _replace(graph_module, node, path, call)
            changes.append(f"{node.name} → {path}")
        _drop_batch_counters(graph_module)
        graph_module.graph.eliminate_dead_code()
        for part in graph_module.modules():  # a region under no_grad or checkpointing is a graph module of its own
            if isinstance(part, GraphModule):
                for node in part.graph.nodes:
                    _refuse_frozen_training(node)
        return PassResult(graph_module, tuple(changes))


def _home(
    graph_module: GraphModule,
    node: Node,
    call: Call,
    paths: dict[int, list[str]],
    raised: dict[str, tuple[object, ...]],
) -> str | None:
    """The path of the module that makes this call, or None."""
    if not call.tensors:
        return _home_without_tensors(graph_module, node, call, raised)
    first = tensor_of(graph_module, next(argument for argument in call.tensors.values() if argument is not None))
    owners = [name.rpartition(".")[0] for name in paths.get(id(first), [])]
    for path in dict.fromkeys([module_path(node), *owners]):
        if path and raised.get(path, call.settings) == call.settings and _owns_exactly(graph_module, path, call):
            return path
    return None


def _home_without_tensors(
    graph_module: GraphModule, node: Node, call: Call, raised: dict[str, tuple[object, ...]]
) -> str:
    path, kind = module_path(node), call.settings[0]
    known = getattr(kind, "__name__", "") == module_type(node)
    free = not _exists(graph_module, path) or raised.get(path) == call.settings
    if path and known and free:
        return path
    name, number = node.target._schema.name.split("::")[-1], 1  # type: ignore[union-attr]
    while _exists(graph_module, f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"


def _exists(graph_module: GraphModule, path: str) -> bool:
    return any(name == path for name, _ in graph_module.named_modules(remove_duplicate=False))


def _owns_exactly(graph_module: GraphModule, path: str, call: Call) -> bool:
    if not _exists(graph_module, path):
        return False
    owner = graph_module.get_submodule(path)
    own = {**owner._parameters, **owner._buffers}
    own = {name: tensor for name, tensor in own.items() if tensor is not None}
    wanted = {
        name: tensor_of(graph_module, argument) for name, argument in call.tensors.items() if argument is not None
    }
    same = all(tensor is not None and own.get(name) is tensor for name, tensor in wanted.items())
    return same and not owner._modules and set(own) <= {*wanted, *call.extra}


def _install(graph_module: GraphModule, path: str, call: Call) -> None:
    module = call.build()
    module.training = graph_module.training
    if _exists(graph_module, path):
        owner = graph_module.get_submodule(path)
        module._parameters.update({name: tensor for name, tensor in owner._parameters.items() if tensor is not None})
        module._buffers.update({name: tensor for name, tensor in owner._buffers.items() if tensor is not None})
        module._non_persistent_buffers_set = set(owner._non_persistent_buffers_set)
        parent, _, name = path.rpartition(".")
        setattr(graph_module.get_submodule(parent), name, module)
    else:
        graph_module.add_submodule(path, module)


def _replace(graph_module: GraphModule, node: Node, path: str, call: Call) -> None:
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_module(path, call.inputs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)


def _drop_batch_counters(graph_module: GraphModule) -> None:
    """Raised batch norms count their batches themselves."""
    for node in list(graph_module.graph.nodes):
        if node.target not in (aten.add_.Tensor, aten.add.Tensor) or not isinstance(node.args[0], Node):
            continue
        counter = node.args[0]
        path, _, name = str(counter.target).rpartition(".")
        if counter.op != "get_attr" or name != "num_batches_tracked" or not _exists(graph_module, path):
            continue
        if isinstance(graph_module.get_submodule(path), nn.modules.batchnorm._NormBase) and not node.users:
            graph_module.graph.erase_node(node)


def _refuse_frozen_training(node: Node) -> None:
    """A literal "in training" that no module owns would stay in training under .eval()."""
    if not is_operator(node):
        return
    call = arguments(node)
    trains = bool(call.get("training", call.get("train", False)))
    if node.target is aten.batch_norm.default and call["running_mean"] is None:
        trains = False
    elif "dropout" in call:
        trains = trains and call["dropout"] > 0
    probability = call.get("dropout_p", 0.0)
    if trains or (isinstance(probability, float) and probability > 0):
        raise UnsupportedError(
            f"The {place(node)} behaves differently in training and evaluation, but no module owns it, so the captured "
            "model could not follow .train() and .eval(). Make it a module of its own (nn.BatchNorm2d, nn.Dropout), or set "
            "its dropout probability to 0."
        )
