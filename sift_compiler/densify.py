"""Sparse to dense: a model without sparse layers, for other tools or for dense fine-tuning.

Dense fine-tuning after sparse pre-training is SPDF (Thangarasa et al., "SPDF: Sparse Pre-training and Dense Fine-tuning for Large
Language Models", UAI 2023, Sec. 2): the zeros that the mask left are revived and all weights are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sift_compiler.attachment import check_optimized, drop_hook, optimizer_inside, shared_values, unwrapped
from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.ir import annotations as decided
from sift_compiler.ir.mask_structure import UNSTRUCTURED
from sift_compiler.ir.pattern import Pattern
from sift_compiler.masking.optimizer_state import Succession, succeed
from sift_compiler.nn import MaskHook, SparseLayer
from sift_compiler.nn.exchange import dense_layer, exchange, scattered
from sift_compiler.passes.manager import run_passes
from sift_compiler.passes.strip_hooks import UNHOOKED, StripHooks
from sift_compiler.schedule import MaskScheduler, schedulers_of


def to_dense(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with nn.Linear and nn.Conv2d in the place of its sparse layers, zeros where nothing is kept.

    Paths and names stay, but for ``values`` and ``index`` of a layer, which become ``weight``: the state dict of a model made by
    sift.from_masked loads into the model it was made from. Weights asleep in dense storage count as zeros. It trains like any dense
    model; zeros do not stay zeros.

    Args:
        module: what sift.rewrite returned, any module that holds sparse layers, or a sparse layer; it is left as it is.

    Raises:
        UserError: there is no sparse layer.
        UnsupportedError: sparse layers that share their values.
    """
    dense = copy.deepcopy(_module(module, "to_dense"))
    return _exchanged(dense, {layer: dense_layer(layer) for layer in _untied(_sparse_layers(dense))})


def densify(module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Make every sparse layer of ``module`` a dense one, in place, whose entries all train: dense fine-tuning (SPDF).

    What the module computes stays: revived weights start at 0. A mask schedule of the module on ``optimizer`` ends. The optimizer keeps
    its groups, options and step counters, and the state of kept weights; that of revived ones is 0, as after a growth of RigL. (SPDF
    itself starts fine-tuning with a new optimizer: leave ``optimizer`` out and make one from the dense module's parameters.)

    A compiled module is traced again at its next call. Save and load it as before; there are no masks left to save.

    Args:
        module: holds sparse layers; changed and returned. What torch.compile returned may be given, and is returned.
        optimizer: holds the layers' values; without it, make a new one afterwards.

    Returns:
        ``module``; if that is itself a sparse layer, the dense layer.

    Raises:
        UserError: no sparse layer, an optimizer without the layers' values, or masks that another optimizer's schedule moves.
        UnsupportedError: a module inside DistributedDataParallel, sparse layers that share their values, or an optimizer whose state is
            not understood. Nothing is changed then.
    """
    inside = _module(module, "densify")
    _refuse_wrapped(module)
    layers = _sparse_layers(inside)
    ending: list[MaskScheduler] = []
    if optimizer is not None:
        optimizer = optimizer_inside(optimizer)
        check_optimized({name: one for name, one in layers.items() if one.values.requires_grad}, optimizer)
        ending = schedulers_of(optimizer)
    _check_ending(inside, ending)
    exchanged = {layer: _dense_twin(layer) for layer in _untied(layers)}
    if optimizer is not None:
        # First, since it may refuse: an optimizer that is not understood must leave everything as it was.
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        succeed(optimizer, [_succession(*each) for each in exchanged.items() if id(each[0].values) in held])
    for scheduler in ending:
        scheduler.remove()
    dense = _exchanged(inside, exchanged)
    return dense if module is inside else module


def dense_state_dict(state: Mapping[str, Tensor], dense: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sparse model in the form that ``dense.load_state_dict`` takes.

    Args:
        state: ``state_dict()`` of a model with sparse layers.
        dense: a model that has layers with a ``weight`` where the sparse one has ``values`` and ``index``; it is only looked at.

    Returns:
        A new dictionary; everything else in ``state`` is passed on.

    Raises:
        UserError: ``state`` has no sparse layer, ``dense`` no weight for one, or their sizes do not fit.
    """
    own = dense.state_dict()
    found = [name.removesuffix("index") for name in state if name == "index" or name.endswith(".index")]
    prefixes = [each for each in found if f"{each}values" in state and f"{each}values" not in own]
    if not prefixes:
        raise UserError(
            "This state dict holds no sparse layer (values and index) that the dense model lacks. Pass state_dict() of a sparse model; "
            "one of a dense model is loaded as it is."
        )
    made = {name: tensor for name, tensor in state.items() if not _belongs(name, prefixes)}
    for each in prefixes:
        weight = own.get(f"{each}weight")
        layer = each.removesuffix(".") or "the model itself"
        if weight is None:
            raise UserError(
                f"The dense model has no {each}weight for the sparse layer {layer!r}. Pass the model the sparse one was made from, or what "
                "sift.to_dense returned."
            )
        values, index = state[f"{each}values"], state[f"{each}index"]
        if values.shape != index.shape:
            raise UserError(
                f"Layer {layer!r} has {values.numel()} values but {index.numel()} positions. The state dict is damaged."
            )
        Pattern(tuple(weight.shape), index).check()
        made[f"{each}weight"] = scattered(values, index, tuple(weight.shape))
    return made


def _belongs(name: str, prefixes: list[str]) -> bool:
    return any(name in (f"{each}values", f"{each}index") for each in prefixes)


def _module(module: object, function: str) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise UserError(f"{function} expects a torch.nn.Module, not {type(module).__name__}.")
    return unwrapped(module)


def _refuse_wrapped(module: nn.Module) -> None:
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise UnsupportedError(
            "DistributedDataParallel reduces the gradients of the parameters it was given; dense ones would not be reduced. Call "
            "sift.densify(ddp.module, optimizer) and wrap the result again."
        )


def _sparse_layers(module: nn.Module) -> dict[str, SparseLayer]:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, SparseLayer)}
    if not layers:
        raise UserError(
            f"{type(module).__name__} holds no sparse layer (SparseLinear, SparseConv2d), so there is nothing to make dense."
        )
    return layers


def _check_ending(module: nn.Module, ending: Sequence[MaskScheduler]) -> None:
    """Every mask schedule of the module's layers must be among ``ending``, and move no others."""
    attachments = [each for scheduler in ending for each in scheduler.attachments]
    own, heard = {id(one) for one in module.modules()}, {id(each.hook) for each in attachments}
    if any(id(each.layer) not in own for each in attachments):
        raise UserError(
            "The optimizer's mask schedule also moves layers outside this module. Densify the module that was given to sift.schedule, or "
            "call remove() on what that returned."
        )
    if any(isinstance(one, MaskHook) and one.probe.claimed and id(one) not in heard for one in module.modules()):
        raise UserError(
            "A mask schedule moves the masks of this module. Pass its optimizer, sift.densify(module, optimizer), or call remove() on what "
            "sift.schedule returned."
        )


def _untied(layers: Mapping[str, SparseLayer]) -> list[SparseLayer]:
    shared = shared_values(layers)
    if shared is not None:
        raise UnsupportedError(
            f"The sparse layers {shared[0]!r} and {shared[1]!r} share their values, and would not as dense ones. Give each its own: "
            "layer.values = nn.Parameter(layer.values.detach().clone())."
        )
    return list(layers.values())


def _succession(layer: SparseLayer, dense: nn.Linear | nn.Conv2d) -> Succession:
    index, shape, new = layer.index.clone(), layer.weight_shape, dense.weight
    assert isinstance(new, nn.Parameter)
    return Succession(layer.values, new, lambda tensor: scattered(tensor, index, shape))


def _dense_twin(layer: SparseLayer) -> nn.Linear | nn.Conv2d:
    dense = dense_layer(layer)
    if layer.values.grad is not None:
        dense.weight.grad = scattered(layer.values.grad, layer.index, layer.weight_shape)
    return dense


def _exchanged(module: nn.Module, exchanged: Mapping[SparseLayer, nn.Linear | nn.Conv2d]) -> nn.Module:
    for layer in exchanged:
        drop_hook(layer)
    for part in [one for one in module.modules() if isinstance(one, fx.GraphModule)]:
        if UNHOOKED.problem(part) is not None:
            run_passes(part, (StripHooks(),))
    paths = {name for name, one in module.named_modules() if one in exchanged} if exchanged else set()
    dense = exchange(module, exchanged)
    if isinstance(module, fx.GraphModule):
        _redecide(module, paths)
    return dense


def _redecide(graph_module: fx.GraphModule, paths: Set[str]) -> None:
    """What the passes decided on these layers does not hold any more, nor the balance of FLOPs."""
    made = {
        path: replace(decision, sparse=False, kept=None, density=None, structure=UNSTRUCTURED, reason="was sparse")
        if path in paths
        else decision
        for path, decision in decided.decisions(graph_module).items()
    }
    if made:
        decided.set_decisions(graph_module, made)
    graph_module.meta.pop(decided.BALANCE, None)
