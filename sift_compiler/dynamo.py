"""``torch.compile(model, backend="sift")``: sparse layers to a runtime, the rest of the graph to inductor or left as it is.

The function :func:`sift` is registered under the entry point group ``torch_dynamo_backends``. It leaves the graph as it is but
for one constant per sparse layer: the handle of a live kernel. Masks may therefore move without a new trace.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from sift_compiler.lowering.dense_layers import call_kernel, dense_layers
from sift_compiler.lowering.direct_calls import call_directly
from sift_compiler.lowering.first_layers import take_first_layers
from sift_compiler.lowering.fuse import Chain, find_chain, fuse, needs_gradients
from sift_compiler.lowering.image_vectors import keep_image_vectors
from sift_compiler.lowering.partition import SparseNode, assign_handle, partition
from sift_compiler.lowering.pooling import take_pools
from sift_compiler.lowering.remainder import traffic
from sift_compiler.nn import live, pruned
from sift_compiler.nn.image_vectors import Pool
from sift_compiler.options import CompileOptions, from_mapping
from sift_compiler.runtimes import registry
from sift_compiler.runtimes.ahead import prepare_ahead
from sift_compiler.runtimes.base import LiveKernel, Runtime
from sift_compiler.runtimes.every_weight import EveryWeight
from sift_compiler.runtimes.pruned import PrunedKernel, PrunedReport, refuse, sparsity_of

log = logging.getLogger(__name__)

_WORTH_COMPILING = 0.05
"""Inductor takes half a minute the first time and seconds every other; it has to save more than this share of what is read and written."""

Compiled = Callable[..., Any]


@dataclass(eq=False)
class Compilation:
    """What the backend made of one graph. It lives as long as the compiled function does."""

    options: CompileOptions
    kernels: tuple[LiveKernel, ...] = ()
    """One live kernel per sparse layer call that the runtime took."""
    first: tuple[EveryWeight, ...] = ()
    """Kernels of dense convolutions at the beginning of the network, see lowering.first_layers."""
    fused: tuple[tuple[str, str], ...] = ()
    """(layer, what follows it) of every layer call that also computes what follows it: "batch norm + add + relu"."""
    side_by_side: int = 0
    """Convolution calls between which images stay side by side in vectors, see lowering.image_vectors."""
    refused: tuple[tuple[str, str], ...] = ()
    """(layer, reason) of every sparse layer call that runs on the reference path."""
    rest: str = ""
    """Who runs the rest of the graph, and why if it is not who was asked for."""
    handles: tuple[int, ...] = field(default=())
    pool: Pool | None = None
    """The kernel of max poolings, if the runtime has one and may use it."""
    pruned: tuple[PrunedKernel, ...] = ()
    """Dense layers with many zeros that sparse code may run, see runtimes.pruned."""
    left_dense: tuple[PrunedReport, ...] = ()
    """Dense layers that were looked at and left alone, with the reason."""

    @property
    def pruned_layers(self) -> tuple[PrunedReport, ...]:
        """What became of every dense layer that was looked at; one report per input shape for those that run."""
        return (*(report for kernel in self.pruned for report in kernel.reports), *self.left_dense)


_compilations: weakref.WeakSet[Compilation] = weakref.WeakSet()


def compilations() -> tuple[Compilation, ...]:
    """What the backend made of every graph whose compiled function is alive."""
    return tuple(_compilations)


def sift(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Compiled:
    """The torch.compile backend. Options: the fields of :class:`sift_compiler.options.CompileOptions`.

    Raises:
        UserError: an unknown option or runtime, or a value out of range.
        RuntimeBuildError: the runtime could not compile a layer that it took.
    """
    chosen = from_mapping(CompileOptions, dict(options or {}))
    runtime = registry.get(chosen.runtime)
    compilation = Compilation(chosen)
    threads = chosen.threads or torch.get_num_threads()
    inference = not needs_gradients(graph_module.graph, example_inputs)
    first: frozenset[fx.Node] = frozenset()
    if inference and runtime.image_lanes:
        first = take_first_layers(graph_module.graph)
    nodes = partition(graph_module.graph, runtime.refuse)
    taken = [node for node in nodes if node.refusal is None]
    calls = _take(taken, compilation, runtime, threads, inference, first)
    pool = runtime.pool(threads) if inference and taken else None
    if pool is not None:
        compilation.pool, handle = pool, live.register(pool)
        compilation.side_by_side = len(keep_image_vectors(graph_module.graph, calls, runtime.image_lanes, handle))
        take_pools(graph_module.graph, handle)
    if chosen.prune_threshold is not None and not torch.is_grad_enabled():
        _take_pruned(graph_module.graph, example_inputs, compilation, runtime, threads, chosen.prune_threshold)
    graph_module.recompile()
    prepare_ahead(graph_module.graph, example_inputs, (*compilation.kernels, *compilation.first), threads)
    compilation.refused = tuple((node.name, node.refusal) for node in nodes if node.refusal is not None)
    _announce(runtime.name, nodes, compilation)
    run, compilation.rest = _compile_rest(graph_module, example_inputs, chosen, inference and bool(taken))
    _compilations.add(compilation)
    return _owning(run, compilation)


def _owning(run: Compiled, compilation: Compilation) -> Compiled:
    @functools.wraps(run)
    def call(*args: Any) -> Any:
        return run(*args)

    # The registry of live kernels is weak: the compiled function is what keeps them.
    call.compilation = compilation  # type: ignore[attr-defined]
    return call


def _take(
    nodes: Sequence[SparseNode], compilation: Compilation, runtime: Runtime, threads: int, inference: bool,
    first: frozenset[fx.Node],
) -> list[fx.Node]:  # fmt: skip
    """Hand sparse layers to kernels; for inference with what follows them. Returns the fused calls of convolutions.

    The graph holds no index of the dense layers ``first``.
    """
    kernels: list[LiveKernel] = []
    dense: list[EveryWeight] = []
    handles, fused, calls = [], [], []
    for node in nodes:
        chain = find_chain(node) if inference else Chain()
        freeze = inference and compilation.options.freeze
        kernel: LiveKernel = runtime.build(
            node.spec, node.name, threads, chain.epilogue, compilation.options.tune, freeze,
            compilation.options.winograd if inference else 0,
        )  # fmt: skip
        if node.node in first:
            kernel = EveryWeight(kernel)
            dense.append(kernel)
        else:
            kernels.append(kernel)
        handles.append(live.register(kernel))
        convolution = inference and node.spec.kind == "conv2d"
        if chain.steps or convolution:
            call = fuse(node, chain, handles[-1])
            calls += [call] * convolution
            fused += [(node.name, str(chain.epilogue))] * bool(chain.steps)
        else:
            assign_handle(node, handles[-1])
    compilation.kernels, compilation.handles, compilation.fused = tuple(kernels), tuple(handles), tuple(fused)
    compilation.first = tuple(dense)
    return calls


def _take_pruned(
    graph: fx.Graph, example_inputs: Sequence[Any], compilation: Compilation, runtime: Runtime, threads: int, threshold: float
) -> None:  # fmt: skip
    """Hand dense layers with at least ``threshold`` zeros to kernels that run them as sparse ones."""
    kernels, left = [], []
    for layer in dense_layers(graph, example_inputs):
        reason = refuse(layer, runtime, threshold)
        if reason is None:
            options = compilation.options
            kernel = PrunedKernel(layer.spec, layer.name, runtime, threads, threshold, options.tune, options.winograd)
            call_kernel(layer, pruned.register(kernel))
            kernels.append(kernel)
        else:
            left.append(PrunedReport(name=layer.name, sparsity=sparsity_of(layer.weight), taken=False, reason=reason))
            log.debug("%s", left[-1])
    compilation.pruned, compilation.left_dense = tuple(kernels), tuple(left)
    if kernels:
        log.info("%d of %d dense layers hold enough zeros to run sparse", len(kernels), len(kernels) + len(left))


def _announce(runtime: str, nodes: Sequence[SparseNode], compilation: Compilation) -> None:
    log.info("%d of %d sparse layers run on %s", len(compilation.kernels), len(nodes) - len(compilation.first), runtime)
    for reason in dict.fromkeys(reason for _, reason in compilation.refused):
        names = [name for name, why in compilation.refused if why == reason]
        log.warning(
            "%d sparse layer(s) run on the dense reference path (no time is saved): %s. Layers: %s",
            len(names), reason, ", ".join(names[:5]) + (" …" if len(names) > 5 else ""),
        )  # fmt: skip


def _compile_rest(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions, may_stay: bool
) -> tuple[Compiled, str]:
    """Who runs the graph, and why. ``may_stay``: whether it is for inference and has sparse layers, so that little may be left to compile."""
    if options.rest == "eager":
        return _as_traced(graph_module, example_inputs, options), "eager"
    if options.rest == "auto" and may_stay:
        found = traffic(graph_module.graph)
        if found is not None and found.share <= _WORTH_COMPILING:
            return _as_traced(graph_module, example_inputs, options), f"eager: fusing the rest would save {found}"
    reason = _no_inductor(_devices(example_inputs))
    if reason is not None:
        _say_once(reason)
        return _as_traced(graph_module, example_inputs, options), f"eager: {reason}"
    return _inductor(graph_module, example_inputs), "inductor"


def _as_traced(graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions) -> Compiled:
    if call_directly(graph_module.graph, example_inputs, options.freeze):
        graph_module.recompile()
    return graph_module.forward


def _inductor(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    return cast(Compiled, compile_fx(graph_module, list(example_inputs)))


def _devices(example_inputs: Sequence[Any]) -> frozenset[str]:
    return frozenset(value.device.type for value in example_inputs if isinstance(value, torch.Tensor))


@functools.cache
def _no_inductor(devices: frozenset[str]) -> str | None:
    """Why inductor cannot compile for these devices here, or None."""
    if devices <= {"cpu"}:
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "no C++ compiler was found (install g++ or clang++, or set CXX)"
    return None


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("The dense part of the graph runs in eager mode, not in inductor: %s.", reason)
