"""The table of contents: which passes, in what order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule

from sift_compiler.ir.flops import FlopCount
from sift_compiler.ir.inputs import Inputs
from sift_compiler.observe.instruments import Dump, Observer, Timer
from sift_compiler.observe.log import configure_logging
from sift_compiler.observe.settings import from_environment
from sift_compiler.options import SparseWide
from sift_compiler.passes.attach_masks import AttachMasks
from sift_compiler.passes.balance_flops import BalanceFlops
from sift_compiler.passes.base import PassResult
from sift_compiler.passes.clean import Clean
from sift_compiler.passes.infer_widths import InferWidths
from sift_compiler.passes.initialise import Initialise
from sift_compiler.passes.manager import Outcome, run_passes
from sift_compiler.passes.select_layers import SelectLayers
from sift_compiler.passes.sparse_wide import SparseWide as WidenLayers

Step = Callable[[GraphModule], PassResult]


def sparse_wide(options: SparseWide, dense: FlopCount, inputs: Inputs, device: torch.device) -> tuple[Step, ...]:
    """Dense to iso-FLOP Sparse Wide.

    Args:
        options: what the user chose.
        dense: FLOPs of the dense graph.
        inputs: the example that was counted.
        device: where new parameters go.
    """
    return (
        SelectLayers(options.dense),
        InferWidths(options.pin),
        WidenLayers(options.widening, options.round_to, options.seed),
        BalanceFlops(dense, inputs, options.widening),
        AttachMasks(options.seed, device),
        Initialise(options.init, options.seed, device),
        Clean(),
    )


def run(graph_module: GraphModule, steps: Sequence[Step], observers: Sequence[Observer] = ()) -> Outcome:
    """Run steps under ``observers`` and those that the environment asks for (see observe/settings.py)."""
    settings = from_environment()
    configure_logging(settings)
    asked: list[Observer] = [Timer()]
    if settings.dump is not None:
        asked.append(Dump(settings.dump))
    return run_passes(graph_module, steps, [*observers, *asked])
