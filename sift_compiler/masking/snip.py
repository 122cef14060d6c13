"""SNIP (Lee et al. 2019): the first mask, by the sensitivity |g ⊙ w| of every connection before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sift_compiler.errors import UserError, unknown_name
from sift_compiler.ir.mask_structure import Unstructured
from sift_compiler.ir.pattern import entry_of
from sift_compiler.ir.structure import SparseWeight
from sift_compiler.masking import criteria, transition
from sift_compiler.masking.gradual import shares_of_largest
from sift_compiler.masking.straight_through import largest_mask

Scope = Literal["layer", "global"]


def snip(
    module: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], *, scope: Scope = "layer", seed: int = 0
) -> nn.Module:  # fmt: skip
    """Choose the masks of ``module`` by connection sensitivity (its Eq. 6), from the gradient of the dense network.

    Args:
        module: sparse layers with dense storage (``sift.dense_storage``); only their masks change. Afterwards ``sift.compact``.
        batches: what ``loss`` takes; gradients of all batches add up.
        loss: ``loss(module, batch)`` → scalar.
        scope: ``"layer"``: every layer keeps its count, so FLOPs stay balanced; ``"global"``: the largest of all layers together, as in the
            paper; only for unstructured masks.
        seed: breaks ties.

    Returns:
        ``module``.

    Raises:
        UserError: a layer without dense storage, no batch, a gradient that is not finite, or a structure that ``scope`` cannot keep.
    """
    if scope not in ("layer", "global"):
        raise unknown_name("scope", scope, ("layer", "global"))
    layers = {name: each for name, each in module.named_modules() if isinstance(each, SparseWeight)}
    _check(layers, scope)
    scores = _sensitivities(module, layers, batches, loss)
    counts = {name: layer.pattern.nnz for name, layer in layers.items()}
    if scope == "global":
        shares = shares_of_largest(list(scores.values()), sum(counts.values()))
        counts = dict(zip(counts, shares, strict=True))
    for name, layer in layers.items():
        tie = criteria.stream(seed, name)
        mask = largest_mask(layer.structure, scores[name].view(layer.weight_shape), counts[name], tie)
        change = transition.switch(layer.index, mask.reshape(-1))
        transition.apply(change, layer.index, layer.values, {})
    return module


def _check(layers: dict[str, SparseWeight], scope: Scope) -> None:
    if not layers:
        raise UserError("snip found no sparse layer. Rewrite the model first: sift.rewrite(model, example_inputs, …).")
    for name, layer in layers.items():
        if layer.index.numel() != layer.pattern.numel:
            raise UserError(
                f"snip needs the dense weights of layer {name!r}, which has compact storage. Call sift.dense_storage(module) first, and "
                "sift.compact(module) afterwards."
            )
        if scope == "global" and not isinstance(layer.structure, Unstructured):
            raise UserError(
                f'snip(scope="global") moves weights between layers, which {layer.structure} (layer {name!r}) may not have room for. Use '
                'scope="layer", or Unstructured().'
            )


def _sensitivities(
    module: nn.Module, layers: dict[str, SparseWeight], batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """|g ⊙ w| [numel] of every layer, with all weights awake; buffers and random state are left as they were."""
    saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    values = [layer.values for layer in layers.values()]
    trained = [each.requires_grad for each in values]
    totals: list[Tensor] | None = None
    try:
        for layer, each in zip(layers.values(), values, strict=True):
            layer.index.copy_(entry_of(layer.index))
            each.requires_grad_(True)
        with torch.random.fork_rng():
            for batch in batches:
                found = torch.autograd.grad(loss(module, batch), values, allow_unused=True, materialize_grads=True)
                totals = list(found) if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)
        for each, needed in zip(values, trained, strict=True):
            each.requires_grad_(needed)
    if totals is None:
        raise UserError("snip got no batch; sensitivity is measured on at least one.")
    scores = {}
    for (name, layer), total in zip(layers.items(), totals, strict=True):
        by_slot = (total * layer.values).detach().abs()
        if not bool(by_slot.isfinite().all()):
            raise UserError(
                f"The sensitivity of layer {name!r} is not finite; check the loss and the batches given to snip."
            )
        scores[name] = torch.zeros_like(by_slot).index_copy_(0, entry_of(layer.index), by_slot)
    return scores
