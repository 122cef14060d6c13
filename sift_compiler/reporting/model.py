"""What a rewrite made of a model: totals, layers, memory and the check of its FLOPs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sift_compiler.errors import UserError
from sift_compiler.ir.activation_memory import ActivationMemory
from sift_compiler.ir.training_state import TrainingState
from sift_compiler.reporting.layers import LayerReport, ReplacementReport
from sift_compiler.reporting.page import as_page
from sift_compiler.reporting.text import as_text
from sift_compiler.whole_file import appearing_whole


@dataclass(frozen=True)
class FlopCheck:
    """The FLOPs of all sparse layers, told twice: by formula, and counted while the example ran (nn/multiply_adds.py).

    Attributes:
        formula_flops: by ``torch.utils.flop_counter``.
        multiply_adds: executed ones: a kept weight counts once for each position of the output, in each image or row.
        on_padding: those of them near the border whose input is a zero of the padding; both counts include them.
    """

    formula_flops: int
    multiply_adds: int
    on_padding: int

    @property
    def difference(self) -> int:
        """FLOPs by formula less 2 for every executed multiply-add. A report with anything but 0 is not made."""
        return self.formula_flops - 2 * self.multiply_adds


@dataclass(frozen=True)
class TrainingStates:
    """Training state of both models under one optimizer."""

    dense: TrainingState
    sparse: TrainingState

    def to_plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        sides = {"dense": self.dense, "sparse": self.sparse}
        return {
            **{name: {**dataclasses.asdict(side), "total": side.total} for name, side in sides.items()},
            "ratio": _ratio(self.sparse.total, self.dense.total),
        }


@dataclass(frozen=True)
class Activations:
    """Activation memory of both models for the example inputs.

    Attributes:
        dense, sparse: None where it cannot be told.
        reason: why it cannot be told, otherwise empty.
    """

    dense: ActivationMemory | None
    sparse: ActivationMemory | None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """A dense model and the sparse one made of it.

    FLOPs are those of one forward pass of the example inputs by ``torch.utils.flop_counter``: 2 per multiply-add of convolutions,
    linear layers and matrix products, of kept weights only.

    Attributes:
        dense_flops: of the dense model.
        sparse_flops: of the sparse model.
        dense_parameters: numbers of parameters of the dense model, shared ones counted once.
        sparse_parameters: the same of the sparse model; of a sparse layer, its kept weights.
        dense_bytes: memory of parameters and buffers of the dense model.
        sparse_bytes: the same of the sparse model, positions of kept weights included.
        layers: every convolution and linear layer of the sparse model.
        replacements: the layers of the dense model that became several.
        name: what the model is called.
        example: element types and sizes of the example inputs, e.g. ``"float32 [2, 3, 224, 224]"``.
        activations: what a forward pass of the example in train mode keeps for the backward pass.
        training: what is kept from one step to the next, by optimizer.
        check: the FLOPs of the sparse layers beside executed multiply-adds; None if there are none or nothing was run.
        compared: False if one model was compared with itself, so that only the sparse side says something.
    """

    dense_flops: int
    sparse_flops: int
    dense_parameters: int
    sparse_parameters: int
    dense_bytes: int
    sparse_bytes: int
    layers: tuple[LayerReport, ...]
    replacements: tuple[ReplacementReport, ...] = ()
    name: str = "model"
    example: tuple[str, ...] = ()
    activations: Activations = field(default_factory=lambda: Activations(None, None, "not measured"))
    training: Mapping[str, TrainingStates] = field(default_factory=dict)
    check: FlopCheck | None = None
    compared: bool = True

    @property
    def ratio(self) -> float:
        """FLOPs of the sparse model over those of the dense one; 1 is iso-FLOP."""
        return self.sparse_flops / self.dense_flops

    @property
    def sparsity(self) -> float:
        """Removed share of the dense weights of all sparse layers together, in [0, 1]."""
        available = self.search_space
        return 1 - sum(layer.kept for layer in self.sparse_layers) / available if available else 0.0

    @property
    def search_space(self) -> int:
        """Weights the masks may choose from, over all sparse layers (the cardinality of Sparse-IFT, Sec. 3.1)."""
        return sum(layer.search_space for layer in self.layers)

    @property
    def sparse_layers(self) -> tuple[LayerReport, ...]:
        """The layers with a mask."""
        return tuple(layer for layer in self.layers if layer.sparse)

    @property
    def dense_flops_elsewhere(self) -> int:
        """FLOPs of the dense model outside the layers, such as the products of attention."""
        return self.dense_flops - _flops_before([*self.layers, *self.replacements])

    @property
    def sparse_flops_elsewhere(self) -> int:
        """FLOPs of the sparse model outside the layers."""
        return self.sparse_flops - sum(layer.flops_after for layer in self.layers)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        totals = {"ratio": self.ratio, "sparsity": self.sparsity, "search_space": self.search_space}
        plain = {
            **dataclasses.asdict(self),
            "layers": [{**dataclasses.asdict(layer), "search_space": layer.search_space} for layer in self.layers],
            "replacements": [each.to_plain() for each in self.replacements],
            "training": {name: states.to_plain() for name, states in self.training.items()},
            "check": None if self.check is None else {**dataclasses.asdict(self.check), "difference": self.check.difference},
            "dense_flops_elsewhere": self.dense_flops_elsewhere,
            "sparse_flops_elsewhere": self.sparse_flops_elsewhere,
        }  # fmt: skip
        return json.dumps({**totals, **plain}, indent=2)

    def to_html(self) -> str:
        """One HTML page that needs nothing but itself: no script, no network, no other file."""
        return as_page(self)

    def save(self, path: str | Path) -> None:
        """Write the report to ``path``: ``.html`` the page, ``.json`` all numbers, ``.txt`` the table.

        Raises:
            UserError: another suffix, or the file cannot be written. Nothing is changed then.
        """
        target = Path(path)
        forms = {".html": self.to_html, ".json": self.to_json, ".txt": self.__str__}
        check_suffix(target, forms)
        content = forms[target.suffix.lower()]()
        with appearing_whole(target) as unfinished:
            Path(unfinished).write_text(content + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """An aligned table, totals below."""
        return as_text(self)


def check_suffix(path: Path, known: Iterable[str] = (".html", ".json", ".txt")) -> None:
    """Raise UserError unless a report can be written to a file with the suffix of ``path``."""
    if path.suffix.lower() not in known:
        raise UserError(
            f"A report cannot be written to {path}: the suffix {path.suffix!r} says no form. Choose {', '.join(known)}."
        )


def _flops_before(parts: Iterable[LayerReport | ReplacementReport]) -> int:
    return sum(part.flops_before for part in parts)


def _ratio(sparse: int, dense: int) -> float | None:
    """None where there is nothing to compare with."""
    return sparse / dense if dense else None
