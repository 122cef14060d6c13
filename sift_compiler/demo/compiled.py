"""A sparse network behind ``torch.compile(backend="sift")``, kept compiled from seed to seed, and what its kernels counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from sift_compiler import dynamo
from sift_compiler.demo.train import EVALUATION_BATCH, Network
from sift_compiler.dynamo import Compilation
from sift_compiler.runtimes.base import LiveKernel

EXPECTED_GRAPHS = 2
"""One to train, one to evaluate."""


@dataclass(frozen=True, kw_only=True)
class Respecialisation:
    """How the kernels followed their masks."""

    kernels: int
    """Live kernels in the training graph, one per sparse layer."""
    repacks: int
    """Times a kernel of the training graph was packed anew."""
    ms_per_update: float
    """Milliseconds to bring all kernels of the training graph up to date after one mask update."""
    builds: int
    """Kernels compiled, in both graphs."""
    build_ms: float


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """What Dynamo traced for one network over all seeds."""

    traced: int
    recompiles: int
    """Graphs beyond the two that are needed."""
    kernels: int
    refused: tuple[str, ...]
    """Sparse layers that run on the dense reference path, with the reason."""
    rest: tuple[str, ...]
    """Who ran the dense rest: of the training graph, of the evaluation graph."""


class CompiledSparse:
    """Compiles ``sparse`` once for training and once for evaluation.

    The training graph leaves its dense rest (norms, activations, loss) to eager mode: inductor gains nothing measurable there at
    this size and would compile C++ for longer than the demo trains. The evaluation graph, the one that is timed, goes to inductor.

    Args:
        sparse: what rewrite returned; its tensors may be replaced in place afterwards, see :meth:`restart`.
        runtime: who runs the sparse layers.
        threads: threads of their kernels.
    """

    def __init__(self, sparse: fx.GraphModule, runtime: str, threads: int) -> None:
        self.module = sparse
        self._made: list[Compilation] = []
        self._evaluate = self._compile(runtime, threads, "inductor")
        self.network = Network(sparse, self._compile(runtime, threads, "eager"), self._evaluate)

    def _compile(self, runtime: str, threads: int, rest: str) -> Callable[[Tensor], Tensor]:
        options: dict[str, str | int | bool | Callable[..., Any]] = {
            "runtime": runtime,
            "threads": threads,
            "rest": rest,
        }
        compiled = torch.compile(self.module, backend="sift", dynamic=False, options=options)

        def call(x: Tensor) -> Tensor:
            """As ``compiled``; what the backend makes for it is remembered."""
            known = set(dynamo.compilations())
            y = compiled(x)
            self._made += set(dynamo.compilations()) - known
            return cast(Tensor, y)

        return call

    def restart(self, fresh: fx.GraphModule) -> None:
        """Take the weights and masks of ``fresh``, another rewrite of the same network, in place: nothing is traced again."""
        self.module.load_state_dict(fresh.state_dict())

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What the backend made of this network so far: training graphs first."""
        return tuple(sorted(self._made, key=lambda made: made.options.rest != "eager"))

    @torch.no_grad()
    def difference(self, x: Tensor) -> float:
        """Largest deviation of the compiled network from the eager one in evaluation, over the largest eager logit.

        Args:
            x: [:data:`EVALUATION_BATCH`, C, H, W].
        """
        assert len(x) == EVALUATION_BATCH
        self.module.eval()
        reference = self.module(x)
        return float((self._evaluate(x) - reference).abs().max() / reference.abs().max())

    def respecialisation(self) -> Respecialisation | None:
        """What the kernels counted; None for a runtime without kernels that follow masks."""
        training = _kernels(made for made in self.compilations if made.options.rest == "eager")
        everywhere = [kernel.specialisations for kernel in _kernels(self.compilations)]
        if not any(counted.builds for counted in everywhere):
            return None
        counters = [kernel.specialisations for kernel in training]
        return Respecialisation(
            kernels=len(training),
            repacks=sum(counted.repacks for counted in counters),
            ms_per_update=sum(counted.repack_ms / counted.repacks for counted in counters if counted.repacks),
            builds=sum(counted.builds for counted in everywhere),
            build_ms=sum(counted.build_ms for counted in everywhere),
        )

    def graphs(self) -> Graphs:
        """What was traced."""
        made = self.compilations
        return Graphs(
            traced=len(made),
            recompiles=max(0, len(made) - EXPECTED_GRAPHS),
            kernels=len(_kernels(made)),
            refused=tuple(f"{layer}: {reason}" for one in made for layer, reason in one.refused),
            rest=tuple(one.rest for one in made),
        )


def _kernels(compilations: Iterable[Compilation]) -> list[LiveKernel]:
    return [kernel for made in compilations for kernel in made.kernels]
