"""Masked dense to sparse: layers, and models pruned by torch.nn.utils.prune or by masks kept anywhere else."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim import Optimizer

from sift_compiler.attachment import optimizer_inside, unwrapped
from sift_compiler.errors import UnsupportedError, UserError, unknown_name
from sift_compiler.ir.mask_structure import UNSTRUCTURED, Structure
from sift_compiler.ir.pattern import Pattern
from sift_compiler.masking.optimizer_state import Succession, succeed
from sift_compiler.nn import SparseConv2d, SparseLayer, SparseLinear
from sift_compiler.nn.exchange import exchange

log = logging.getLogger(__name__)

_KINDS = (nn.Linear, nn.Conv2d)


@overload
def from_masked(
    target: Tensor | nn.Linear | nn.Conv2d, mask: Tensor, *, structure: Structure = ..., optimizer: Optimizer | None = ...
) -> SparseLayer: ...  # fmt: skip


@overload
def from_masked(
    target: nn.Module, mask: Mapping[str, Tensor] | None = ..., *, structure: Structure = ..., optimizer: Optimizer | None = ...
) -> nn.Module: ...  # fmt: skip


def from_masked(
    target: Any, mask: Any = None, *, structure: Structure = UNSTRUCTURED, optimizer: Optimizer | None = None
) -> nn.Module:
    """Sparse layers from masked dense ones. The mask decides what is kept: a kept 0 is a weight like any other.

        layer = sift.from_masked(linear, mask)                        # nn.Linear, nn.Conv2d or a weight [out, in]
        model = sift.from_masked(model)                               # after torch.nn.utils.prune: weight_orig, weight_mask
        model = sift.from_masked(model, {"layer1.0.conv1.weight": mask, "fc.weight": other})

    Sparse layers have dense biases: a masked bias becomes 0 where its mask is, and trains again; a message says so.

    Args:
        target: a layer, a weight, or a model that holds masked layers.
        mask: for a layer or weight, its mask of the weight's shape; for a model, masks by parameter name, besides those of
            torch.nn.utils.prune. bool, or numbers that are all 0 or 1.
        structure: what every mask must look like, also when a mask method moves it.
        optimizer: holds the dense parameters. It then goes on with the sparse ones: groups, options and the state of kept weights stay.
            The model is changed in place in this case; otherwise it is left as it is and a copy returned.

    Raises:
        UserError: no mask, an unknown name, a mask of another shape, with other numbers, or that the structure does not allow.
        UnsupportedError: a masked parameter that is not weight or bias of an nn.Linear or nn.Conv2d, or a weight that is shared or
            parametrized.
    """
    if isinstance(target, Tensor):
        return _layer_of_weight(target, mask, structure)
    if not isinstance(target, nn.Module):
        raise UserError(f"from_masked expects a layer, a weight or a model, not {type(target).__name__}.")
    holder = None if optimizer is None else optimizer_inside(optimizer)
    model = unwrapped(target)
    if isinstance(mask, Tensor):
        if not isinstance(model, _KINDS):
            raise UserError(
                f"One mask is for one layer (nn.Linear, nn.Conv2d); {type(model).__name__} needs masks by parameter name: "
                "{'fc.weight': mask, …}."
            )
        mask = {"weight": mask}
    masks = _masks(model, mask)
    _check_layers(model, masks)
    if holder is None:
        model = _copy(model)
    return _converted(model, masks, structure, holder)


@dataclass(frozen=True, eq=False)
class _Masked:
    """A masked parameter: the path of its module, its name there, and the mask, bool."""

    path: str
    name: str
    mask: Tensor


def _masks(model: nn.Module, given: object) -> list[_Masked]:
    """All masks by the parameter's name: those in the model and those given."""
    found: dict[str, _Masked] = {}
    for path, module in model.named_modules():
        for name in [name.removesuffix("_mask") for name in module._buffers if name.endswith("_mask")]:
            if module._parameters.get(f"{name}_orig") is not None:
                full = f"{path}.{name}" if path else name
                shape = module._parameters[f"{name}_orig"].shape
                found[full] = _Masked(path, name, _binary(full, module._buffers[f"{name}_mask"], shape))
    if given is not None and not isinstance(given, Mapping):
        raise UserError(
            f"The masks of a model are a dictionary by parameter name, not {type(given).__name__}. Leave them out for a model pruned by "
            "torch.nn.utils.prune."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for full, mask in (given or {}).items():
        if full in found:
            raise UserError(
                f"{full!r} is masked twice: torch.nn.utils.prune masks it already. Leave it out of the masks given."
            )
        if full not in parameters:
            raise unknown_name("parameter", full, parameters)
        path, _, name = full.rpartition(".")
        found[full] = _Masked(path, name, _binary(full, mask, parameters[full].shape))
    if not any(each.name == "weight" for each in found.values()):
        raise UserError(
            f"{type(model).__name__} has no masked weight: it was not pruned by torch.nn.utils.prune (weight_orig, weight_mask), and no "
            "mask was given. Pass masks by parameter name: {'fc.weight': mask}; for zeros in plain weights: "
            "{name: parameter != 0 for name, parameter in model.named_parameters() if …}."
        )
    return list(found.values())


def _binary(name: str, mask: object, shape: torch.Size) -> Tensor:
    if not isinstance(mask, Tensor):
        raise UserError(f"The mask of {name!r} must be a tensor, not {type(mask).__name__}.")
    if mask.shape != shape:
        raise UserError(f"The mask of {name!r} has shape {tuple(mask.shape)}; the parameter has {tuple(shape)}.")
    if mask.dtype == torch.bool:
        return mask
    wrong = (mask != 0) & (mask != 1)
    if bool(wrong.any()):
        raise UserError(
            f"The mask of {name!r} holds {mask[wrong].reshape(-1)[0].item()!r} and {int(wrong.sum())} number(s) in all that are "
            "neither 0 nor 1. Say what is kept, e.g. mask > 0.5."
        )
    return mask != 0


def _check_layers(model: nn.Module, masks: list[_Masked]) -> None:
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))
    for each in masks:
        layer = model.get_submodule(each.path)
        full = f"{each.path}.{each.name}" if each.path else each.name
        # Children of these classes may hand their weight to others, as the projection of nn.MultiheadAttention does.
        if type(layer) not in _KINDS or each.name not in ("weight", "bias"):
            raise UnsupportedError(
                f"{full!r} belongs to {type(layer).__name__}; only weight and bias of nn.Linear and nn.Conv2d can become sparse. Make its "
                "mask permanent with torch.nn.utils.prune.remove, or leave it out."
            )
        if parametrize.is_parametrized(layer):
            raise UnsupportedError(
                f"{full!r} is computed by a parametrization. Remove it first: torch.nn.utils.parametrize.remove_parametrizations."
            )
        parameter = _parameter(layer, each.name)
        if len(owners[id(parameter)]) > 1:
            raise UnsupportedError(f"{full!r} is shared with another module and cannot become sparse on its own.")


def _parameter(layer: nn.Module, name: str) -> nn.Parameter:
    parameter = layer._parameters.get(f"{name}_orig", layer._parameters.get(name))
    assert parameter is not None
    return parameter


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; what torch.nn.utils.prune computed from its masks is no leaf, and would not be copied."""
    computed = [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor) and value.grad_fn is not None
    ]  # fmt: skip
    return copy.deepcopy(model, {id(each): each.detach().clone() for each in computed})


def _converted(model: nn.Module, masks: list[_Masked], structure: Structure, optimizer: Optimizer | None) -> nn.Module:
    by_layer: dict[nn.Module, dict[str, Tensor]] = {}
    for each in masks:
        by_layer.setdefault(model.get_submodule(each.path), {})[each.name] = each.mask
    patterns = {layer: Pattern.from_mask(found["weight"]) for layer, found in by_layer.items() if "weight" in found}
    for pattern in patterns.values():
        structure.check(pattern)
    # Everything that may be refused comes before the first change.
    pairs = {
        layer: _like(layer, _parameter(layer, "weight"), pattern, structure) for layer, pattern in patterns.items()
    }
    if optimizer is not None:
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        successions = [_succession(_parameter(layer, "weight"), sparse) for layer, sparse in pairs.items()]
        lost = sum(id(each.old) not in held and each.old.requires_grad for each in successions)
        if lost:
            raise UserError(
                f"{lost} masked weight(s) are not parameters of the optimizer. Pass the optimizer that trains this model."
            )
        succeed(optimizer, [each for each in successions if id(each.old) in held])
    _settle_biases(by_layer)
    for layer, sparse in pairs.items():
        if "weight_orig" in layer._parameters:
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        sparse.bias = layer.bias  # type: ignore[assignment]
    return exchange(model, pairs)


@torch.no_grad()
def _settle_biases(by_layer: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    zeros = 0
    for layer, found in by_layer.items():
        if "bias" not in found:
            continue
        if "bias_orig" in layer._parameters:
            prune.remove(layer, "bias")  # type: ignore[no-untyped-call]
        bias = _parameter(layer, "bias")
        bias.masked_fill_(~found["bias"].to(bias.device), 0)
        zeros += int((~found["bias"]).sum())
    if zeros:
        log.warning("%d masked bias entries are 0 now and train again: sparse layers have dense biases.", zeros)


def _like(layer: nn.Module, weight: Tensor, pattern: Pattern, structure: Structure) -> SparseLayer:
    sparse: SparseLayer
    with torch.random.fork_rng(devices=[]):
        if isinstance(layer, nn.Conv2d):
            sparse = SparseConv2d.like(layer, pattern, structure)
        else:
            assert isinstance(layer, nn.Linear)
            sparse = SparseLinear.like(layer, pattern, structure)
    sparse.set_weight(weight.detach())
    sparse.values.requires_grad_(weight.requires_grad)
    if weight.grad is not None:
        sparse.values.grad = _gathered(weight.grad, sparse.index)
    return sparse


def _succession(weight: nn.Parameter, sparse: SparseLayer) -> Succession:
    index = sparse.index
    return Succession(weight, sparse.values, lambda tensor: _gathered(tensor, index))


def _gathered(dense: Tensor, index: Tensor) -> Tensor:
    return dense.detach().reshape(-1)[index.long()]


def _layer_of_weight(weight: Tensor, mask: object, structure: Structure) -> SparseLayer:
    if weight.dim() != 2:
        raise UserError(
            f"A bare weight must be [out, in], not of shape {tuple(weight.shape)}: a kernel does not tell stride and padding. Pass the "
            "nn.Conv2d it belongs to."
        )
    pattern = Pattern.from_mask(_binary("weight", mask, weight.shape))
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    dense.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    return _like(dense, dense.weight, pattern, structure)
