"""What ``sift demo`` found, as frozen data: written to ``report.json``, shown as a table and as curves."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from typing import Any

from sift_compiler.demo.compiled import Graphs, Respecialisation
from sift_compiler.demo.latency import ForwardTime
from sift_compiler.demo.machine import Machine
from sift_compiler.demo.memory import TrainingMemory
from sift_compiler.demo.options import DemoOptions, Recipe
from sift_compiler.demo.train import TrainingRun


@dataclass(frozen=True, kw_only=True)
class SparseResult:
    """What only a sparse network has."""

    sparsity: float
    """As asked for."""
    applied_sparsity: float
    """Removed share of all sparse layers' weights together, the one that balances FLOPs."""
    respecialisation: Respecialisation | None
    """None if the runtime has no kernels that follow masks."""
    graphs: Graphs
    compiled_difference: float
    """Largest deviation of the compiled network from the eager one, over the largest eager logit (last seed, after training)."""
    masked_forward: ForwardTime
    """The same widened network with dense layers whose weights are zero where the mask is."""
    masked_by: str
    """Who compiled that network and the dense one."""
    masked_memory: TrainingMemory
    """Training state of that network, masks as booleans included: what simulating sparsity costs."""


@dataclass(frozen=True, kw_only=True)
class NetworkResult:
    """One network over all seeds."""

    name: str
    flops: int
    """Of one image, forward: 2 per multiply-add of kept weights."""
    parameters: int
    """Trained numbers: kept weights, norms and biases."""
    widths: tuple[int, ...]
    """Channels of the two stages."""
    runs: tuple[TrainingRun, ...]
    """One per seed."""
    forward: ForwardTime
    """As compiled, in evaluation."""
    sparse: SparseResult | None = None

    @property
    def memory(self) -> TrainingMemory:
        """Training state; the same for every seed."""
        return self.runs[0].memory

    @property
    def accuracy_mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(run.accuracy for run in self.runs)

    @property
    def accuracy_std(self) -> float:
        """Sample standard deviation over the seeds; 0 for one seed."""
        return statistics.stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else 0.0

    def to_plain(self, dense: NetworkResult) -> dict[str, Any]:
        """Everything as JSON values, with the ratios to ``dense``."""
        plain = dataclasses.asdict(self)
        plain.update(
            accuracy_mean=self.accuracy_mean,
            accuracy_std=self.accuracy_std,
            flop_ratio=self.flops / dense.flops,
            parameter_ratio=self.parameters / dense.parameters,
            memory_total=self.memory.total,
            memory_ratio=self.memory.total / dense.memory.total,
            forward_ratio=self.forward.median_ms / dense.forward.median_ms,
        )
        if self.sparse is not None:
            plain["sparse"].update(
                masked_memory_total=self.sparse.masked_memory.total,
                speedup_over_masked=self.sparse.masked_forward.median_ms / self.forward.median_ms,
            )
        return plain


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The trained sparse network that was written to a file."""

    file: str
    network: str
    seed: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What a demo found. The first network is the dense one."""

    options: DemoOptions
    recipe: Recipe
    machine: Machine
    threads: int
    train_images: int
    test_images: int
    image_shape: tuple[int, int, int]
    batch: int
    """Images of a timed forward pass."""
    networks: tuple[NetworkResult, ...]
    files: dict[str, str]
    """Written files by what they are."""
    saved: Saved
    seconds: float
    """Wall-clock time of the whole demo."""
    stages: dict[str, float]
    """Seconds by stage."""

    @property
    def dense(self) -> NetworkResult:
        """The dense ancestor."""
        return self.networks[0]

    def to_plain(self) -> dict[str, Any]:
        """Everything as JSON values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("recipe", "machine", "saved"):
            plain[name] = dataclasses.asdict(plain[name])
        options = dataclasses.asdict(self.options)
        plain["options"] = {key: str(value) if key in ("data", "out") and value is not None else value for key, value in options.items()}  # fmt: skip
        plain["networks"] = [network.to_plain(self.dense) for network in self.networks]
        return plain

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.to_plain(), indent=1)
