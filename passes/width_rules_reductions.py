"""Width rules of pooling, padding and reductions; see width_registry.py for what a rule is."""

from __future__ import annotations

from torch.fx import Node

from sift_compiler.ir.width import fixed
from sift_compiler.passes.operators import arguments, lengthened, place
from sift_compiler.passes.width_context import Rule, WidthContext, Widths
from sift_compiler.passes.width_registry import register


def _spatial(rank: int) -> Rule:
    def rule(context: WidthContext, node: Node) -> Widths:
        """Batch and channels stay free, the last ``rank`` sizes do not."""
        widths = context.of(node.args[0])
        context.pin(widths[-rank:], f"{place(node)} changes it")
        return (*widths[:-rank], *context.result(node)[-rank:])

    return rule


for _rank in (1, 2, 3):
    register(
        _spatial(_rank), f"max_pool{_rank}d.default", f"avg_pool{_rank}d.default", f"adaptive_avg_pool{_rank}d.default",
        f"upsample_nearest{_rank}d",
    )  # fmt: skip
register(_spatial(2), "upsample_bilinear2d", "upsample_bicubic2d")


def _pad(context: WidthContext, node: Node) -> Widths:
    """``pad`` lists two amounts per dimension, the last dimension first."""
    amounts, result = arguments(node)["pad"], list(context.of(node.args[0]))
    for position in range(len(amounts) // 2):
        if tuple(amounts[2 * position : 2 * position + 2]) != (0, 0):
            context.pin(result[-1 - position], f"{place(node)} pads it")
            result[-1 - position] = context.result(node)[-1 - position]
    return tuple(result)


register(_pad, "pad.default", "constant_pad_nd.default")


def _reduction(context: WidthContext, node: Node) -> Widths:
    call, widths = arguments(node), context.of(node.args[0])
    chosen = call.get("dim")
    dimensions = range(len(widths)) if chosen is None or chosen == [] else lengthened(chosen, 1)
    reduced = {dimension % len(widths) for dimension in dimensions} if widths else set()
    if call.get("keepdim"):
        return tuple(fixed(1) if position in reduced else width for position, width in enumerate(widths))
    return tuple(width for position, width in enumerate(widths) if position not in reduced)


register(
    _reduction, "mean.default", "mean.dim", "sum.default", "sum.dim_IntList", "amax.default", "amin.default", "std.dim",
    "var.dim", "any.dim", "all.dim", "argmin.default", "linalg_vector_norm.default", "std.correction", "var.correction", "argmax.default", "logsumexp.default", "prod.dim_int", "norm.ScalarOpt_dim",
)  # fmt: skip


def _reduction_with_positions(context: WidthContext, node: Node) -> tuple[Widths, Widths]:
    """max and min along a dimension give values and where they were."""
    widths = _reduction(context, node)
    return widths, widths


register(_reduction_with_positions, "max.dim", "min.dim", "median.dim")
