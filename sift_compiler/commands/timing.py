"""``sift inspect --times``: every sparse layer on this machine's kernels, beside the dense layer and the machine's peak."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_compiler.commands.tile_candidates import Candidate, candidates_of
from sift_compiler.errors import UserError
from sift_compiler.lowering.plan import LayerPlan
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import SparseConv2d
from sift_compiler.nn.layer import SparseLayer
from sift_compiler.options import CompileOptions
from sift_compiler.runtimes.pruned import break_even
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.peak import peak_loop
from sift_compiler.runtimes.tvm.runtime import TvmRuntime


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One sparse layer, for one input shape. A refused layer has a reason and no times."""

    path: str
    sparsity: float
    input_shape: tuple[int, ...]
    tile: str
    """How it is cut; parts joined by ``+`` where a batch fills no whole vectors."""
    reason: str
    """Why this tile, or why the layer is refused."""
    microseconds: float | None = None
    """Median of a whole call: packing, kernel, plain output."""
    of_peak: float | None = None
    """FLOPs of kept weights over what the cores could do in that time, in [0, 1]."""
    dense_microseconds: float | None = None
    """Median of torch's dense layer."""
    break_even: float | None = None
    """Sparsity at which sparse code would take as long as dense, if its time is proportional to kept weights."""
    candidates: tuple[Candidate, ...] = ()
    """Tiles that come into question, with the times that ``sift compile`` measured; those for images side by side come last."""

    def to_plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return dataclasses.asdict(self)


def time_layers(model: nn.Module, inputs: tuple[Any, ...], threads: int, rounds: int = 7) -> tuple[LayerTime, ...]:
    """Time every sparse layer of ``model`` on what it gets when the model runs on ``inputs``, in the order of first calls.

    Args:
        model: runs on ``inputs``; left in the mode it is in.
        inputs: its positional arguments.
        threads: workers of kernels and of torch's dense layers.
        rounds: timed turns, at least 1. A turn is the peak, the kernel and the dense layer one after the other.

    Raises:
        UserError: the model has no sparse layer that is called.
    """
    seen = _layer_inputs(model, inputs)
    if not seen:
        raise UserError(
            "Times are those of sparse layers, and this model calls none. Make one: sift rewrite MODEL --out FILE.pt2."
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return tuple(_time_layer(path, layer, x, threads, rounds) for path, layer, x in seen)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _layer_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[str, SparseLayer, Tensor]]:
    """Every sparse layer and its input, once for each that is called."""
    seen: dict[str, tuple[str, SparseLayer, Tensor]] = {}
    handles = []
    for path, layer in model.named_modules():
        if isinstance(layer, SparseLayer):

            def remember(module: nn.Module, arguments: tuple[Any, ...], path: str = path) -> None:
                assert isinstance(module, SparseLayer)
                seen.setdefault(path, (path, module, arguments[0].detach().clone()))

            handles.append(layer.register_forward_pre_hook(remember))
    training = model.training
    try:
        model.eval()(*inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return list(seen.values())


def specification(layer: SparseLayer, x: Tensor) -> LayerSpec:
    """What a runtime has to know of ``layer`` when it gets ``x``."""
    geometry: dict[str, Any] = {}
    if isinstance(layer, SparseConv2d):
        geometry = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
    return LayerSpec(
        kind="conv2d" if isinstance(layer, SparseConv2d) else "linear", weight_shape=layer.weight_shape,
        bias=layer.bias is not None, dtype=str((x if x.dtype == layer.values.dtype else layer.values).dtype).removeprefix("torch."),
        nnz=layer.index.numel(), **geometry,
    )  # fmt: skip


@torch.no_grad()
def _time_layer(path: str, layer: SparseLayer, x: Tensor, threads: int, rounds: int) -> LayerTime:
    spec, runtime = specification(layer, x), TvmRuntime()
    known: dict[str, Any] = {"path": path, "sparsity": layer.sparsity, "input_shape": tuple(x.shape)}
    refusal = runtime.refuse(spec, str(x.device))
    if refusal is not None:
        return LayerTime(**known, tile="", reason=refusal)
    # What torch.compile would take by default, for inference.
    kernel = runtime.build(spec, path, threads, winograd=CompileOptions().winograd)
    weight = layer.dense_weight()
    y = kernel(x, layer.values, layer.index, layer.bias)
    plan = kernel.plan(tuple(x.shape))
    peak, peak_flops = peak_loop(threads)

    def dense() -> Tensor:
        if isinstance(layer, SparseConv2d):
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, weight, layer.bias)

    times = _medians(
        (peak, lambda: kernel(x, layer.values, layer.index, layer.bias), dense), rounds, one_thread=threads == 1
    )
    flops = 2 * layer.pattern.nnz * (y.numel() // layer.weight_shape[0])
    # With zeros multiplied the time does not follow the number of weights.
    zeros = any(part.tile.lanes == "winograd" for part in plan.parts)
    even = None if zeros else break_even(layer.sparsity, times[1], times[2])
    return LayerTime(
        **known, tile=" + ".join(str(part.tile) for part in plan.parts), reason=plan.reason,
        microseconds=1e6 * times[1], of_peak=flops / times[1] / (peak_flops / times[0]), dense_microseconds=1e6 * times[2],
        break_even=even, candidates=_candidates(kernel, plan, layer.index),
    )  # fmt: skip


def _candidates(kernel: TvmKernel, plan: LayerPlan, index: Tensor) -> tuple[Candidate, ...]:
    """Those of ``plan``, and those that a compiled network has where images lie side by side: there they are measured apart."""
    made, lanes = candidates_of(plan, kernel.cpu), kernel.cpu.lanes
    images, *shape = plan.input_shape
    if kernel.spec.kind == "conv2d" and images % lanes == 0:
        made += candidates_of(kernel.plan((images // lanes, *shape, lanes), index), kernel.cpu)
    return made


def _medians(runs: tuple[Callable[[], object], ...], rounds: int, one_thread: bool) -> list[float]:
    """Seconds of each. With one thread they are processor time, which leaves out what other programs took of a shared core."""
    clock = time.thread_time if one_thread else time.perf_counter
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(-1, rounds):
        for each, run in zip(taken, runs, strict=True):
            begin = clock()
            run()
            if turn >= 0:
                each.append(clock() - begin)
    return [statistics.median(each) for each in taken]
