"""``sift bench``: a model on mask-specialised code beside other engines, turn by turn, so that a busy machine hits all of them alike."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sift_compiler.commands.peers import PEERS, started, write_onnx
from sift_compiler.demo.machine import this_machine
from sift_compiler.errors import UserError, unknown_name
from sift_compiler.nn import SparseLayer
from sift_compiler.nn.exchange import dense_layer, exchange
from sift_compiler.passes.strip_hooks import StripHooks

ENGINES = ("inductor", *PEERS)
_REST = 0.05
"""Seconds between two runs, in which the threads of the engine before fall asleep."""
_WARM_UP = 2
_TOLERANCE = 1e-3
"""Largest deviation from torch's reference over its largest magnitude; float32 through some twenty layers stays far below."""


@dataclass(frozen=True, kw_only=True)
class EngineTime:
    """One engine, one batch size."""

    engine: str
    version: str
    batch: int
    threads: int
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    runs: int
    error: float
    """Largest deviation from the reference over its largest magnitude."""
    times_sift: float
    """Its median over sift's: above 1, sift is faster."""
    processor_ms: float
    """Median processor time of all its threads. With one thread this leaves out what other programs took of a shared core."""
    processor_times_sift: float
    """As ``times_sift``, of processor times."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured, where."""

    times: tuple[EngineTime, ...]
    machine: dict[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {"machine": self.machine, "times": [dataclasses.asdict(each) for each in self.times]}


@dataclass(frozen=True)
class _Engine:
    name: str
    version: str
    output: Tensor
    run: Callable[[], tuple[float, float]]


def bench(
    model: nn.Module, inputs: tuple[Tensor, ...], against: Sequence[str], *, batches: Sequence[int], threads: int,
    rounds: int, pythons: Mapping[str, str], ancestor: nn.Module | None = None,
) -> Bench:  # fmt: skip
    """Measure ``model`` in evaluation mode.

    Args:
        model: with sparse layers or without; the engines get the same weights in dense layers.
        inputs: float tensors; the first dimension of each is the batch.
        against: names of :data:`ENGINES`.
        batches: batch sizes, each at least 1.
        threads: of every engine.
        rounds: timed runs of every engine, at least 1.
        pythons: interpreters of engines that live in another environment.
        ancestor: another model of the same inputs, such as the dense one of as many FLOPs, which the engines run as well, in the same
            turns; they are then listed a second time, as "NAME, ancestor".

    Raises:
        UserError: an unknown engine, one that is missing or fails, or one that computes something else.
    """
    for name in against:
        if name not in ENGINES:
            raise unknown_name("engine", name, ENGINES)
    if rounds < 1 or threads < 1 or min(batches, default=1) < 1:
        raise UserError("Rounds, threads and batch sizes must be at least 1.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sparse, other = _frozen(model), None if ancestor is None else _frozen(ancestor)
        times = [
            each
            for batch in batches
            for each in _one_batch(sparse, other, _of_batch(inputs, batch), against, threads, rounds, pythons)
        ]
    finally:
        torch.set_num_threads(before)
    return Bench(times=tuple(times), machine=dataclasses.asdict(this_machine()))


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the same weights in dense layers, zeros included.

    Raises:
        UnsupportedError: a kind of sparse layer for which no dense one is known.
    """
    twin = copy.deepcopy(model)
    return exchange(twin, {layer: dense_layer(layer) for layer in twin.modules() if isinstance(layer, SparseLayer)})


def _frozen(model: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(model)
    if isinstance(frozen, fx.GraphModule):
        frozen = StripHooks()(frozen).graph_module
    return frozen.eval()


def _of_batch(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.dim() for x in inputs):
        raise UserError("sift bench measures models whose inputs are all floating tensors with a batch dimension.")
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn((batch, *x.shape[1:]), generator=generator, dtype=x.dtype) for x in inputs)


@torch.no_grad()
def _one_batch(
    sparse: nn.Module, ancestor: nn.Module | None, inputs: tuple[Tensor, ...], against: Sequence[str], threads: int,
    rounds: int, pythons: Mapping[str, str],
) -> list[EngineTime]:  # fmt: skip
    models = [("", dense_twin(sparse))] + ([(", ancestor", dense_twin(ancestor))] if ancestor is not None else [])
    references = [model(*inputs) for _, model in models]
    if not all(isinstance(reference, Tensor) for reference in references):
        raise UserError("sift bench measures models that return one tensor.")
    # The other engines keep weights in an order of their own, too.
    options: dict[str, Any] = {"threads": threads, "freeze": True}
    engines = [_in_process("sift", torch.compile(sparse, backend="sift", dynamic=False, options=options), inputs)]
    errors = {"sift": _error(engines[0], references[0])}
    with contextlib.ExitStack() as stack:
        for (what, dense), reference in zip(models, references, strict=True):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if any(name in PEERS for name in against):
                write_onnx(dense, inputs, folder / "model.onnx")
            for name in against:
                if name == "inductor":
                    engines.append(_in_process(name + what, torch.compile(dense, dynamic=False), inputs))
                else:
                    peer = stack.enter_context(started(name, pythons.get(name), folder / "model.onnx", inputs, threads))
                    engines.append(_Engine(name + what, peer.version, peer.output, peer.run))
                errors[engines[-1].name] = _error(engines[-1], reference)
        times = _interleaved(engines, rounds)
    return [_summary(each, inputs[0].shape[0], threads, times, errors[each.name]) for each in engines]


def _summary(
    engine: _Engine, batch: int, threads: int, times: Mapping[str, Sequence[tuple[float, float]]], error: float
) -> EngineTime:
    wall, processor = ([taken[kind] for taken in times[engine.name]] for kind in (0, 1))
    sift_wall, sift_processor = (statistics.median(taken[kind] for taken in times["sift"]) for kind in (0, 1))
    return EngineTime(
        engine=engine.name, version=engine.version, batch=batch, threads=threads, median_ms=statistics.median(wall),
        fastest_ms=min(wall), slowest_ms=max(wall), runs=len(wall), error=error,
        times_sift=statistics.median(wall) / sift_wall, processor_ms=statistics.median(processor),
        processor_times_sift=statistics.median(processor) / sift_processor,
    )  # fmt: skip


def _in_process(name: str, compiled: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Engine:
    def run() -> tuple[float, float]:
        """Milliseconds of one run, wall and processor time."""
        begin, spent = time.perf_counter(), time.process_time()
        compiled(*inputs)
        return 1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - spent)

    return _Engine(name, torch.__version__, compiled(*inputs).clone(), run)


def _error(engine: _Engine, reference: Tensor) -> float:
    if engine.output.shape != reference.shape:
        raise UserError(
            f"{engine.name} computes {tuple(engine.output.shape)} instead of {tuple(reference.shape)}; its time would mean nothing."
        )
    error = float((engine.output - reference).abs().max() / reference.abs().max())
    if not error <= _TOLERANCE:
        raise UserError(
            f"{engine.name} deviates from torch by {error:.1e} of the largest output, more than {_TOLERANCE}; its time would mean "
            "nothing. Outputs that are all zero or not finite cannot be compared: give the model trained or random weights."
        )
    return error


def _interleaved(engines: Sequence[_Engine], rounds: int) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
    for turn in range(-_WARM_UP, rounds):
        # Everyone follows everyone: the first of a round is another one each time.
        first = turn % len(engines)
        for engine in (*engines[first:], *engines[:first]):
            time.sleep(_REST)
            taken = engine.run()
            if turn >= 0:
                times[engine.name].append(taken)
    return times
