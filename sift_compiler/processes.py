"""Several processes that train one model: who they are, that they hold the same masks, and that masks are not sent around.

Every process moves its own masks, by the same numbers, to the same end; see masking/gradients.py. So there is nothing to send:
DistributedDataParallel need not broadcast index buffers as it does other buffers, on every forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.masking import criteria, gradients
from sift_compiler.masking.layer import Memory
from sift_compiler.nn import SparseLayer


def group_of(module: nn.Module) -> gradients.Group:
    """The processes that train ``module``: those of the DistributedDataParallel in or around it; None, all, where there is none.

    Raises:
        UnsupportedError: parts of the module are trained by different processes.
    """
    if not dist.is_available():
        return None
    groups = {id(one.process_group): one.process_group for one in _wrappers(module)}
    if len(groups) > 1:
        raise UnsupportedError(
            "Parts of the module are wrapped in DistributedDataParallel with different process groups, but the gradients that move masks are "
            "averaged over one. Call sift.schedule once for each part."
        )
    return next(iter(groups.values()), None)


def keep_masks_local(module: nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting masks on every forward pass. It still does once, when it wraps the module.

    Args:
        module: holds or is the wrapper; if it is what will be or is wrapped by another, that is found on the way of a forward pass.
    """
    if not dist.is_available():
        return
    wrappers = _wrappers(module)
    for one in wrappers:
        _leave_out_masks(one)
    if not wrappers:
        module.register_forward_pre_hook(_notice_wrapper)


def refuse_shards(module: nn.Module, doing: str, instead: str) -> None:
    """Raise UnsupportedError if the values of a sparse layer of ``module`` are spread over processes.

    Args:
        module: any.
        doing: what cannot be done then; the message begins with it.
        instead: what can; the message ends with it.
    """
    for name, layer in module.named_modules():
        how = _sharded_by(layer) if isinstance(layer, SparseLayer) else None
        if how is not None:
            raise UnsupportedError(
                f"{doing} is not possible: {how} spreads the values of sparse layer {name!r} over processes. {instead}"
            )


def require_same_masks(
    layers: Mapping[str, SparseLayer], memory: Mapping[str, Memory], group: gradients.Group, step: int
) -> None:
    """Raise UserError, in all processes, if they hold different masks. One collective of 16 bytes per layer.

    Args:
        layers: layers by module path.
        memory: what the method remembers of some of them, which must be the same, too.
        group: the processes.
        step: optimizer steps taken, for the message.
    """
    if not layers or not gradients.distributed(group):
        return
    mine = torch.stack(
        [
            sum((digest(kept) for _, kept in sorted(memory.get(name, {}).items())), digest(layer.index))
            for name, layer in layers.items()
        ]
    )
    # The largest of x and of its complement: they belong together only where all processes have the same x.
    extremes = torch.stack([mine, ~mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    different = (extremes[0] != ~extremes[1]).tolist()
    names = [name for name, differs in zip(layers, different, strict=True) if differs]
    if names:
        raise UserError(
            f"At optimizer step {step} the processes hold different masks of {len(names)} sparse layer(s): {', '.join(names[:5])}"
            f"{' …' if len(names) > 5 else ''}. All must train the same weights: make the model from the same seed or checkpoint in every process, "
            "or wrap it in DistributedDataParallel, which copies masks and weights of rank 0, before sift.schedule; and change "
            "neither of them in some processes only."
        )


def digest(tensor: Tensor) -> Tensor:
    """A number, int64 [] on the tensor's device, that depends on every element's bits and its place."""
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = criteria.priority(torch.arange(flat.numel(), device=flat.device), 0)
    return (weights * (flat.long() + 1)).sum()


def _wrappers(module: nn.Module) -> list[DistributedDataParallel]:
    return [one for one in module.modules() if isinstance(one, DistributedDataParallel)]


def _leave_out_masks(wrapper: DistributedDataParallel) -> None:
    # What it leaves out is a list of names it looks into before every broadcast; torch has no public way to add to it later.
    wrapped = wrapper.module
    masks = {f"{name}.index".lstrip(".") for name, layer in wrapped.named_modules() if isinstance(layer, SparseLayer)}
    wrapper.parameters_to_ignore = {*wrapper.parameters_to_ignore, *masks}
    wrapper._assign_modules_buffers()  # type: ignore[no-untyped-call]


def _notice_wrapper(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook: where a wrapper calls the module, tell it, and be gone."""
    if torch.compiler.is_compiling():
        return
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return
    _leave_out_masks(wrapper)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _notice_wrapper:
            del module._forward_pre_hooks[key]


def _sharded_by(layer: SparseLayer) -> str | None:
    if not dist.is_available():
        return None
    from torch.distributed.tensor import DTensor

    values: object = layer.values
    if isinstance(values, DTensor) or isinstance(layer.index, DTensor):
        return "fully_shard or tensor parallelism (DTensor)"
    # FullyShardedDataParallel marks the parameters it took, or takes them out of their modules.
    if getattr(values, "_fsdp_flattened", False) or not isinstance(values, nn.Parameter):
        return "FullyShardedDataParallel"
    return None
