"""The table of contents: which passes, in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from sift_compiler.ir.flops import FlopCount
from sift_compiler.ir.inputs import Inputs
from sift_compiler.observe.instruments import Dump, Observer, Timer
from sift_compiler.observe.log import configure_logging
from sift_compiler.observe.settings import from_environment
from sift_compiler.options import (
    LowRank,
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    SparseWide,
    Transformation,
)
from sift_compiler.passes.adopt_layers import AdoptLayers, ReturnLayers
from sift_compiler.passes.assign_rules import AssignRules, Rules
from sift_compiler.passes.attach_masks import AttachMasks
from sift_compiler.passes.balance_flops import BalanceFlops
from sift_compiler.passes.base import PassResult
from sift_compiler.passes.clean import Clean
from sift_compiler.passes.distribute_sparsity import DistributeSparsity
from sift_compiler.passes.infer_widths import InferWidths
from sift_compiler.passes.initialise import Initialise
from sift_compiler.passes.low_rank import LowRank as LowerRanks
from sift_compiler.passes.manager import Outcome, run_passes
from sift_compiler.passes.read_schemes import ReadSchemes
from sift_compiler.passes.select_layers import SelectLayers
from sift_compiler.passes.sparse_doped import SparseDoped as DopeLayers
from sift_compiler.passes.sparse_factorized import SparseFactorized as FactorizeLayers
from sift_compiler.passes.sparse_parallel import SparseParallel as AddBranches
from sift_compiler.passes.sparse_wide import SparseWide as WidenLayers
from sift_compiler.passes.width_context import WidthChoices

Step = Callable[[GraphModule], PassResult]


def preparing() -> tuple[Step, ...]:
    """What makes the layers of a captured graph what transformations take; before its FLOPs are counted by layer."""
    return (AdoptLayers(),)


def rewriting(
    rules: Rules, dense: FlopCount, inputs: Inputs, device: torch.device, fresh: Mapping[str, Tensor] | None = None
) -> tuple[Step, ...]:
    """Dense to iso-FLOP sparse, masks and values included.

    Args:
        rules: transformations by pattern of module paths; at least one, and all with the same seed and initialisation.
        dense: FLOPs of the dense graph, prepared.
        inputs: the example that was counted.
        device: where new parameters go.
        fresh: tensors of the same model as they are before training, by name, if they are known and it is trained.
    """
    any_one = next(each for each in rules.values() if each is not None)
    return (
        ReadSchemes(fresh),
        *planning(rules, dense, inputs),
        AttachMasks(any_one.seed, device),
        Initialise(any_one.init, any_one.seed, device),
        ReturnLayers(),
        Clean(),
    )


def planning(rules: Rules, dense: FlopCount, inputs: Inputs) -> tuple[Step, ...]:
    """Up to the number of weights every layer keeps: geometry and counts, no masks and no values."""
    chosen = {rule: each for rule, each in rules.items() if each is not None}
    widening = next((each.widening for each in chosen.values() if isinstance(each, (SparseWide, LowRank))), None)
    return (
        SelectLayers(tuple(pattern for each in chosen.values() for pattern in each.dense), _depthwise(chosen.values())),
        AssignRules(rules),
        *(step for rule, each in chosen.items() for step in _widening(rule, each)),
        *(step for rule, each in chosen.items() for step in _replacing(rule, each, dense, inputs)),
        *(step for rule, each in chosen.items() for step in _distributing(rule, each)),
        BalanceFlops(dense, inputs, widening),
    )


def _widening(rule: str, options: Transformation) -> tuple[Step, ...]:
    if not isinstance(options, (SparseWide, LowRank)):
        return ()
    return (
        InferWidths(options.pin, rule, _choices(options)),
        WidenLayers(options.widening, options.round_to, options.seed, rule),
    )


def _choices(options: SparseWide | LowRank) -> WidthChoices:
    if isinstance(options, LowRank):
        return WidthChoices()
    return WidthChoices(attention=options.attention, groups=options.groups)


def _depthwise(chosen: Iterable[Transformation]) -> bool:
    """Only Sparse Wide has a formula for depthwise convolutions; in a mix they stay as they are."""
    return all(isinstance(each, SparseWide) and each.depthwise == "sparse" for each in chosen)


def _replacing(rule: str, options: Transformation, dense: FlopCount, inputs: Inputs) -> tuple[Step, ...]:
    match options:
        case SparseParallel():
            return (AddBranches(options, rule),)
        case SparseFactorized():
            return (FactorizeLayers(options, rule, dense),)
        case SparseDoped():
            return (DopeLayers(options, rule),)
        case LowRank():
            return (LowerRanks(options, rule, dense, inputs),)
    return ()


def _distributing(rule: str, options: Transformation) -> tuple[Step, ...]:
    if not isinstance(options, (SparseWide, SparseParallel, SparseFactorized, SparseDoped)):
        return ()
    return (DistributeSparsity(options.sparsity, options.distribution, rule),)


def run(graph_module: GraphModule, steps: Sequence[Step], observers: Sequence[Observer] = ()) -> Outcome:
    """Run steps under ``observers`` and those that the environment asks for (see observe/settings.py)."""
    settings = from_environment()
    configure_logging(settings)
    asked: list[Observer] = [Timer()]
    if settings.dump is not None:
        asked.append(Dump(settings.dump))
    return run_passes(graph_module, steps, [*observers, *asked])
