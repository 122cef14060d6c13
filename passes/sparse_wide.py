"""Sparse Wide, the geometry: scale every free width by k = (1 - s)^(-1/2)  (Sparse-IFT, Sec. 3.2.1).

    W [out, in]  →  W' [k out, k in]

Parameters whose shape changes lose their values (they are on the meta device until the initialise pass draws new ones), numbers in
the graph that are widths are rewritten, shapes are propagated anew, and the graph's outputs must have the shapes they had.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sift_compiler.errors import PassError, UnsupportedError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.scheme import Scheme, read_scheme
from sift_compiler.ir.width import Literal, WidthTable
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED, SHAPES_KNOWN, WIDTHS_KNOWN
from sift_compiler.passes.operators import parameter_paths
from sift_compiler.passes.propagate_shapes import output_shapes, propagate_shapes


def widened(size: int, widening: float, round_to: int) -> int:
    """A width after widening: rounded to the nearest multiple of ``round_to``, never below ``size``; with 1, rounded down.

    ``widened(64, k, 1)`` is 90, 128, 202 for k = 2 ** .5, 2, 10 ** .5, as in the released code of the paper.
    """
    if widening == 1:
        return size
    exact = size * widening
    multiple = int(exact + 1e-9) if round_to == 1 else round_to * int(exact / round_to + 0.5)
    return max(size, multiple)


def widened_head(size: int, widening: float, round_to: int) -> int:
    """The width of an attention head after widening: the nearest multiple of ``round_to``, or of the largest power of two below it that
    stays within a sixteenth of ``size * widening``, so that small heads neither stay as they are nor eat the budget.
    """
    exact, multiple = size * widening, round_to
    while multiple > 1 and abs(widened(size, widening, multiple) - exact) > exact / 16:
        multiple //= 2
    return max(size, multiple * int(exact / multiple + 0.5))


class SparseWide(Pass):
    """Widen a graph whose widths are inferred.

    Args:
        widening: factor on every free width, at least 1.
        round_to: widths are rounded to the nearest multiple of it; with 1 they are rounded down.
        seed: of the numbers drawn for bare parameters.
        rule: pattern under which the transformation takes layers.

    Raises:
        UserError: the widening is too small to change any width.
        UnsupportedError: a buffer that is not constant would have to grow.
        PassError: the widened graph does not fit together.
    """

    requires = (SHAPES_KNOWN, LAYERS_DECIDED, WIDTHS_KNOWN)
    ensures = (SHAPES_KNOWN,)

    def __init__(self, widening: float, round_to: int = 8, seed: int = 0, rule: str = "") -> None:
        self.widening, self.round_to, self.seed, self.rule = widening, round_to, seed, rule

    def call(self, graph_module: GraphModule) -> PassResult:
        """Widen parameters, modules and literals."""
        if self.widening == 1:
            return PassResult(graph_module)
        table = notes.widths(graph_module)
        assert table is not None
        sizes = {key: self._widened(table, key) for key in table.sizes}
        if sizes == dict(table.sizes):
            raise UserError(
                f"A widening of {self.widening:.4f} changes no width of the model at round_to={self.round_to}: "
                f"{_why_nothing_grows(table)} Use a larger sparsity or a smaller round_to."
            )
        before = output_shapes(graph_module)
        changes = _Resizer(graph_module, table, sizes.__getitem__, self.seed).run()
        propagate_shapes(graph_module)
        if output_shapes(graph_module) != before:
            raise PassError(
                f"Widening changed the shapes of the model's outputs from {before} to {output_shapes(graph_module)}."
            )
        self._redecide(graph_module)
        return PassResult(graph_module, changes)

    def _widened(self, table: WidthTable, key: int) -> int:
        if key in table.counts:
            return max(table.sizes[key], int(table.sizes[key] * self.widening + 0.5))
        if key in table.head_widths:
            return widened_head(table.sizes[key], self.widening, self.round_to)
        return self._widened_width(table, key)

    def _widened_width(self, table: WidthTable, key: int) -> int:
        """The new size of a class: not it, but the output widths it is a part of (4 * class for four groups) are to be round."""
        factors = [
            factor for widths in table.tensors.values() if widths for each, factor in widths[0].terms if each == key
        ]
        together = math.gcd(*factors) if factors else 1
        return widened(table.sizes[key], self.widening, self.round_to // math.gcd(self.round_to, together))

    def _redecide(self, graph_module: GraphModule) -> None:
        """A layer that could not grow stays dense: a mask would only take weights from it."""
        made = {}
        for path, decision in notes.decisions(graph_module).items():
            weight: Any = graph_module.get_submodule(path).weight
            decision = dataclasses.replace(decision, widened_shape=tuple(weight.shape))
            own = decision.sparse and decision.rule == self.rule
            if own and decision.widened_shape == decision.weight_shape:
                decision = dataclasses.replace(
                    decision, sparse=False, reason="neither its input nor its output can grow"
                )
            made[path] = decision
        notes.set_decisions(graph_module, made)


def _why_nothing_grows(table: WidthTable) -> str:
    if table.sizes:
        return f"its free widths are {', '.join(str(size) for size in sorted(set(table.sizes.values())))}."
    pins = "; ".join(f"{origin} because {reason}" for origin, reason in list(table.pins.items())[:3])
    return f"all widths are fixed ({pins})." if pins else "it has no hidden width."


class _Resizer:
    """Replaces tensors, the modules that own them, and literals."""

    def __init__(self, graph_module: GraphModule, table: WidthTable, sizes: Callable[[int], int], seed: int) -> None:
        self.graph_module, self.table, self.sizes = graph_module, table, sizes
        self.generator = torch.Generator().manual_seed(seed)
        self.replaced: dict[int, Tensor] = {}
        self.paths = parameter_paths(graph_module)
        self.module_literals: dict[str, dict[str, Any]] = {}
        self.own: set[str] = set()

    def run(self) -> tuple[str, ...]:
        nodes = {node.name: node for node in self.graph_module.graph.nodes}
        for literal in self.table.literals:
            self._rewrite_literal(nodes[literal.node], literal)
        for path, literals in self.module_literals.items():
            for name, number in literals.items():
                setattr(self._own(path), name, number)
        changes = []
        for name, widths in self.table.tensors.items():
            path, _, attribute = name.rpartition(".")
            tensor = getattr(self.graph_module.get_submodule(path), attribute)
            shape = tuple(width.size(self.sizes) for width in widths)
            if tuple(tensor.shape) != shape:
                self._replace(path, attribute, tensor, shape)
                changes.append(f"{name}: {tuple(tensor.shape)} → {shape}")
        return tuple(changes)

    def _rewrite_literal(self, node: Node, literal: Literal) -> None:
        number = literal.number(self.sizes)
        if not isinstance(node.target, (str, torch._ops.OpOverload)):
            assert literal.position is not None
            node.update_arg(literal.position, number)
            return
        if node.op == "call_module":
            self.module_literals.setdefault(str(node.target), {})[literal.argument] = number
            return
        schema = node.target._schema  # type: ignore[union-attr]
        place = next(index for index, argument in enumerate(schema.arguments) if argument.name == literal.argument)
        value = node.args[place] if place < len(node.args) else node.kwargs[literal.argument]
        if literal.position is not None:
            value = [number if index == literal.position else each for index, each in enumerate(value)]  # type: ignore[arg-type]
        else:
            value = number
        if place < len(node.args):
            node.update_arg(place, value)
        else:
            node.update_kwarg(literal.argument, value)

    def _replace(self, path: str, attribute: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        owner = self._own(path)
        if id(tensor) not in self.replaced:
            self.replaced[id(tensor)] = self._resized(f"{path}.{attribute}", owner, tensor, shape)
        new = self.replaced[id(tensor)]
        table: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
        table[attribute] = new
        _update_settings(owner)

    def _own(self, path: str) -> nn.Module:
        """A shallow copy of the module, put in its place: what the graph module held before stays whole."""
        module = self.graph_module.get_submodule(path)
        if not path or path in self.own:
            return module
        self.own.add(path)
        own = module.__class__.__new__(module.__class__)
        own.__dict__.update(module.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            own.__dict__[name] = dict(module.__dict__[name])
        parent, _, name = path.rpartition(".")
        self.graph_module.get_submodule(parent)._modules[name] = own
        return own

    def _resized(self, name: str, owner: nn.Module, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """On the meta device where a module knows how to draw it, else with the mean and deviation of what it replaces.

        Embeddings are among the latter, with a head that is tied to them: every model has a scale of its own for them.
        """
        embedding = self._embedding(tensor)
        if tensor.is_meta or (embedding is None and _draws_itself(owner)):
            new = torch.empty(shape, dtype=tensor.dtype, device="meta")
        else:
            data = tensor.detach()
            if not isinstance(tensor, nn.Parameter) and data.numel() and bool((data != data.reshape(-1)[0]).any()):
                raise UnsupportedError(
                    f"The buffer {name.lstrip('.')} of shape {tuple(tensor.shape)} would have to grow to {shape}, and its values are "
                    f"not all the same, so they cannot be made up. Pin its module: pin=({name.rpartition('.')[0] or name!r},)."
                )
            scheme = self._scheme(tensor) or read_scheme(data, fans=False)
            new = torch.randn(shape, generator=self.generator) * scheme.deviation + scheme.mean
            new = new.to(tensor)
            if embedding is not None and embedding.padding_idx is not None:
                new[embedding.padding_idx] = 0
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    def _scheme(self, tensor: Tensor) -> Scheme | None:
        """The scheme that was read of ``tensor``; of a tied one, that of the embedding."""
        known = notes.schemes(self.graph_module)
        found = [known[name] for name in self.paths.get(id(tensor), ()) if name in known]
        return next((scheme for scheme in found if scheme.fan is None), None)

    def _embedding(self, tensor: Tensor) -> nn.Embedding | None:
        """The embedding that holds ``tensor``, if one does."""
        owners = [self.graph_module.get_submodule(name.rpartition(".")[0]) for name in self.paths.get(id(tensor), ())]
        return next((owner for owner in owners if isinstance(owner, nn.Embedding)), None)


_DRAWING = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LayerNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip


def _draws_itself(module: nn.Module) -> bool:
    return isinstance(module, _DRAWING)


def _update_settings(module: nn.Module) -> None:
    """Make the numbers a module keeps about its own shape true again."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        module.num_features = len(tensor) if tensor is not None else module.num_features
