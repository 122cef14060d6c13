"""The networks of a demo, made and trained: the dense one, and Sparse Wide versions of it at equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sift_compiler.demo.compiled import CompiledSparse
from sift_compiler.demo.datasets import Dataset
from sift_compiler.demo.masked import masked_twin
from sift_compiler.demo.model import ResidualNet, build
from sift_compiler.demo.options import DemoOptions, Recipe, mask_method
from sift_compiler.demo.train import Network, TrainingRun, steps_of, train
from sift_compiler.ir.flops import count_flops
from sift_compiler.nn import SparseLayer
from sift_compiler.options import SparseWide
from sift_compiler.rewrite import rewrite

OnEpoch = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Dense:
    """The dense network with the weights of the last seed, and its training runs."""

    model: nn.Module
    runs: tuple[TrainingRun, ...]
    name: str = "dense"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A rewritten network before training.

    Attributes:
        sparsity: as asked for.
        compiled: the network with the weights of seed 0.
        twin: its dense twin, see :mod:`sift_compiler.demo.masked`.
    """

    sparsity: float
    compiled: CompiledSparse
    twin: nn.Module

    @property
    def name(self) -> str:
        """As in tables and pictures."""
        return f"Sparse Wide {100 * self.sparsity:g} %"


def example_of(data: Dataset) -> Tensor:
    """Two training images, [2, C, H, W]: what networks are rewritten and counted for."""
    return data.train_images[:2]


def dense_of(data: Dataset, recipe: Recipe, seed: int) -> ResidualNet:
    """The untrained dense network of a seed."""
    return build(data.image_shape[0], data.classes, recipe.width, seed)


def sparse_of(data: Dataset, recipe: Recipe, sparsity: float, seed: int) -> fx.GraphModule:
    """The untrained Sparse Wide version of the seed's dense network, masks drawn from the same seed.

    Raises:
        UserError: the sparsity does not balance FLOPs.
    """
    return rewrite(dense_of(data, recipe, seed), (example_of(data),), SparseWide(sparsity=sparsity, seed=seed))


def candidate(data: Dataset, options: DemoOptions, sparsity: float) -> Candidate:
    """Rewrite for one sparsity; nothing is trained or compiled yet.

    Raises:
        UserError: the sparsity does not balance FLOPs.
    """
    sparse = sparse_of(data, options.recipe, sparsity, seed=0)
    twin = masked_twin(sparse)
    return Candidate(sparsity, CompiledSparse(sparse, options.runtime, options.threads), twin)


def train_dense(data: Dataset, recipe: Recipe, on_epoch: OnEpoch) -> Dense:
    """Train the dense network once per seed, in eager mode."""
    runs = []
    for seed in range(recipe.seeds):
        model = dense_of(data, recipe, seed)
        runs.append(train(Network(model, model, model), data, recipe, seed, None, on_epoch))
    return Dense(model, tuple(runs))


def train_candidate(
    chosen: Candidate, data: Dataset, recipe: Recipe, method: str, on_epoch: OnEpoch
) -> tuple[TrainingRun, ...]:
    """Train a sparse network once per seed; later seeds enter the network that is compiled already."""
    runs = []
    for seed in range(recipe.seeds):
        if seed:
            chosen.compiled.restart(sparse_of(data, recipe, chosen.sparsity, seed))
        masks = mask_method(method, steps_of(data, recipe), seed)
        runs.append(train(chosen.compiled.network, data, recipe, seed, masks, on_epoch))
    return tuple(runs)


def flops_of(model: nn.Module, data: Dataset) -> int:
    """Forward FLOPs of one image."""
    example = example_of(data)
    return count_flops(model, (example,)).total // len(example)


def parameters_of(model: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


def widths_of(model: nn.Module) -> tuple[int, ...]:
    """Channels of the two stages; rewritten networks keep the module paths of the dense one."""
    return tuple(int(model.get_submodule(f"stage{stage}.0.conv1").out_channels) for stage in (1, 2))  # type: ignore[arg-type]


def applied_sparsity(model: nn.Module) -> float:
    """Removed share of all sparse layers' weights together, in [0, 1)."""
    patterns = [module.pattern for module in model.modules() if isinstance(module, SparseLayer)]
    return 1 - sum(pattern.nnz for pattern in patterns) / sum(pattern.numel for pattern in patterns)


def inference(model: nn.Module, compiled: bool) -> Callable[[Tensor], Tensor]:
    """``model`` in evaluation, by inductor if ``compiled``, else in eager mode."""
    model.eval()
    return torch.compile(model, dynamic=False) if compiled else model
