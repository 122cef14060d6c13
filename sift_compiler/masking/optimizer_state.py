"""Let an optimizer go on with another parameter in the place of one that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from sift_compiler.masking.transition import per_weight_states


@dataclass(frozen=True, eq=False)
class Succession:
    """One parameter after another.

    Attributes:
        old: the parameter that the optimizer holds.
        new: the one it shall hold.
        convert: makes a tensor of the shape of ``new`` of one of the shape of ``old``: for the gradient and every per-weight state.
    """

    old: nn.Parameter
    new: nn.Parameter
    convert: Callable[[Tensor], Tensor]


def succeed(optimizer: Optimizer, successions: Sequence[Succession]) -> None:
    """Exchange parameters in place: each keeps its group, its place there and its options.

    Tensors with one number per weight (momentum, exp_avg, …) are converted; step counters and numbers stay.

    Raises:
        UnsupportedError: the optimizer's state has a layout that is not known. Nothing is changed then.
    """
    for each in successions:
        list(per_weight_states(optimizer.state.get(each.old, {}), each.old))
    by_old = {id(each.old): each for each in successions}
    for group in optimizer.param_groups:
        group["params"][:] = [by_old[id(one)].new if id(one) in by_old else one for one in group["params"]]
    for each in successions:
        if each.old in optimizer.state:
            state = optimizer.state.pop(each.old)
            optimizer.state[each.new] = {name: _converted(entry, each) for name, entry in state.items()}


def _converted(entry: object, succession: Succession) -> object:
    per_weight = isinstance(entry, Tensor) and entry.dim() and entry.shape == succession.old.shape
    return succession.convert(entry) if per_weight and isinstance(entry, Tensor) else entry
