"""Run a graph on fake tensors and note every node's value anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from sift_compiler.errors import PassError
from sift_compiler.ir.shadow import device_of, shadowed
from sift_compiler.passes.operators import place


def propagate_shapes(graph_module: GraphModule) -> None:
    """Write ``node.meta["val"]`` of every node anew, from the example values of the placeholders (a free batch stays free).

    Raises:
        PassError: an operator does not accept the shapes it now gets.
    """
    inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for value in inputs if hasattr(value, "fake_mode")), None) or FakeTensorMode()
    # Without the Python dispatcher, composite operators written in C++ ask for sizes as numbers and so fix the batch.
    with shadowed(graph_module, mode, device_of(inputs)), enable_python_dispatcher():
        _Propagation(graph_module).run(*inputs)


def output_shapes(graph_module: GraphModule) -> list[tuple[Any, ...]]:
    """The shapes of the graph's outputs, dynamic sizes as expressions."""
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    values = [node.meta.get("val") for node in output.all_input_nodes]
    return [tuple(str(size) for size in value.shape) for value in values if isinstance(value, Tensor)]


class _Propagation(fx.Interpreter):
    def run_node(self, n: Node) -> Any:
        """The value of ``n`` on stand-ins, which its metadata keeps."""
        try:
            value = super().run_node(n)
        except Exception as error:
            raise PassError(f"The {place(n)} does not accept the shapes it gets after the rewrite: {error}") from error
        if n.op != "output" and ("val" in n.meta or isinstance(value, (Tensor, tuple, list, torch.SymInt))):
            n.meta["val"] = value
            n.meta.pop("tensor_meta", None)
        return value
