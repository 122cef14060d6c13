"""Networks that are compiled once and take the weights and masks of every run with the same graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .settings import BY_WIDTH, STRUCTURED, Cell

Forward = Callable[[Tensor], Tensor]


class Compiled:
    """Keeps what was compiled. A run that comes later enters the network of an earlier one; nothing is traced again."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[nn.Module, Forward]] = {}

    def network(self, cell: Cell, fresh: nn.Module) -> nn.Module:
        """``fresh``, or an earlier network of the same graph with the state of ``fresh``."""
        key = _graph(cell)
        if key not in self._made:
            self._made[key] = (fresh, _compile(fresh, cell))
        network = self._made[key][0]
        if network is not fresh:
            network.load_state_dict(fresh.state_dict())
            network.zero_grad()
        return network

    def forward(self, cell: Cell) -> Forward:
        """What runs the network. Mask hooks must be in its graph before the first call."""
        return self._made[_graph(cell)][1]


def _graph(cell: Cell) -> tuple[Any, ...]:
    """Runs that agree in this have the same graph: methods that move masks have hooks in it."""
    kind = cell.method if cell.method in BY_WIDTH else "resting" if cell.method.startswith("static") else "moving"
    return cell.dataset, cell.run, cell.sparsity, cell.recipe, cell.method in STRUCTURED, kind


def _compile(network: nn.Module, cell: Cell) -> Forward:
    if cell.run == "eager":
        return network
    if cell.method in BY_WIDTH:
        return torch.compile(network, dynamic=False)
    options: dict[str, Any] = {"threads": torch.get_num_threads()}
    return torch.compile(network, backend="sift", dynamic=False, options=options)
