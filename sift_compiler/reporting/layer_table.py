"""The table of layers on a page: what became of each, bars of FLOPs and weights, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sift_compiler.reporting.bars import bar, count, number, text, times
from sift_compiler.reporting.layers import LayerReport, ReplacementReport
from sift_compiler.reporting.text import shape

if TYPE_CHECKING:
    from sift_compiler.reporting.model import Report

MEMBERS = {
    "SparseWide": "Sparse Wide",
    "SparseParallel": "Sparse Parallel",
    "SparseFactorized": "Sparse Factorized",
    "SparseDoped": "Sparse Doped",
    "LowRank": "Low rank",
}
"""Transformations as people write them."""
_MANY_PARTS = 40


def layer_table(report: Report) -> str:
    """A row for every layer, its parts below a layer that became several, and one for what is in no layer."""
    scale = _Scale(report)
    wholes = {each.path: each for each in report.replacements}
    rows = []
    for layer in report.layers:
        whole = wholes.pop(layer.origin, None)
        rows += [scale.whole(whole)] if whole is not None else []
        rows.append(scale.layer(layer))
    rows.append(scale.elsewhere())
    before = "<th>Weight before → after</th>" if report.compared else "<th>Weight</th>"
    head = (
        f"<th>Layer</th><th>What it is now</th>{before}<th class=right>Sparsity</th><th class=right>Chosen from</th>"
        "<th>FLOPs</th><th>Weights kept</th><th>Why</th>"
    )
    return f'{_parts_switch(report)}<div class="sheet"><table id="layers"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _parts_switch(report: Report) -> str:
    """A box that hides the parts of layers which became several; off from the start where there are very many."""
    parts = sum(bool(layer.origin) for layer in report.layers)
    if not parts:
        return ""
    checked = " checked" if parts <= _MANY_PARTS else ""
    return f'<input type="checkbox" id="parts"{checked}><label for="parts"> show the {parts} parts of layers that became several</label>'


class _Scale:
    """Writes rows whose bars share one scale."""

    def __init__(self, report: Report) -> None:
        self._report, self._compared = report, report.compared
        parts: list[LayerReport | ReplacementReport] = [*report.layers, *report.replacements]
        elsewhere = [report.dense_flops_elsewhere, report.sparse_flops_elsewhere]
        flops = [each.flops_before for each in parts if self._compared] + [each.flops_after for each in parts]
        self._flops = max(flops + elsewhere, default=0)
        weights = [each.weights_before for each in parts if self._compared] + [each.kept for each in parts]
        self._weights = max(weights, default=0)

    def whole(self, whole: ReplacementReport) -> str:
        """The row of a layer that became several."""
        return self._row(
            "whole", whole.path, whole.path, _badge(whole.member), text(shape(whole.shape_before)) if self._compared else "", _sparsity(whole),
            _chosen(whole), self._pair("flops", whole.flops_before, whole.flops_after, self._flops),
            self._pair("weights", whole.weights_before, whole.kept, self._weights), whole.detail,
        )  # fmt: skip

    def layer(self, layer: LayerReport) -> str:
        """The row of a layer, or of a part of one."""
        why = f"{layer.reason}; mask {layer.structure}" if layer.structure else layer.reason
        compared = self._compared and not layer.origin
        return self._row(
            "part" if layer.origin else "layer", layer.path, layer.path.removeprefix(layer.origin), _now(layer),
            _weight(layer, compared), _sparsity(layer), _chosen(layer),
            self._pair("flops", layer.flops_before if compared else None, layer.flops_after, self._flops),
            self._pair("weights", layer.weights_before if compared else None, layer.kept, self._weights), why,
        )  # fmt: skip

    def elsewhere(self) -> str:
        """The row of FLOPs in no layer."""
        before, after = self._report.dense_flops_elsewhere, self._report.sparse_flops_elsewhere
        if not before and not after:
            return ""
        return self._row(
            "rest", "", "elsewhere", "", "", "", "",
            self._pair("flops", before if self._compared else None, after, self._flops), "",
            "matrix products outside of these layers, such as those of attention",
        )  # fmt: skip

    def _row(self, kind: str, path: str, shown: str, *cells: str) -> str:
        now, weight, sparsity, chosen, flops, weights, why = cells
        return (
            f'<tr class="{kind}" data-path="{text(path)}"><th scope="row"><code>{_breakable(shown)}</code></th><td class="nowrap">{now}</td>'
            f"<td><code>{weight}</code></td>"
            f'<td class="right nowrap">{sparsity}</td><td class="right nowrap">{chosen}</td><td class="bars">{flops}</td>'
            f'<td class="bars">{weights}</td><td class="small">{text(why)}</td></tr>\n'
        )

    def _pair(self, what: str, before: int | None, after: int, largest: int) -> str:
        """Bars before and after, or one alone where there is nothing to compare with."""
        lines = []
        if self._compared and before is not None:
            lines.append(
                f"{bar(before, largest, 'dense', f'dense: {before:,}')}{number(before, count(before), f'{what}_before')}"
            )
        lines.append(
            f"{bar(after, largest, 'sparse', f'sparse: {after:,}')}{number(after, count(after), f'{what}_after')}"
        )
        return f'<div class="pair">{"".join(lines)}</div>'


def _badge(member: str) -> str:
    return f'<span class="badge {text(member)}">{text(MEMBERS.get(member, member))}</span>'


def _now(layer: LayerReport) -> str:
    kind = f'<div class="soft small">{text(layer.kind)}</div>'
    if layer.origin:
        return kind
    if layer.member:
        return f"{_badge(layer.member)}{kind}"
    grown = layer.shape_before is not None and layer.shape_before != layer.shape_after
    state = "sparse" if layer.sparse else "dense, grown" if grown else "dense"
    return f'<span class="badge">{state}</span>{kind}'


def _weight(layer: LayerReport, compared: bool) -> str:
    after = text(shape(layer.shape_after))
    if not compared or layer.shape_before == layer.shape_after:
        return after
    return f'<span class="nowrap">{text(shape(layer.shape_before))} →</span> <span class="nowrap">{after}</span>'


def _breakable(path: str) -> str:
    """A module path that may be broken after a dot."""
    return text(path).replace(".", ".<wbr>")


def _sparsity(layer: LayerReport | ReplacementReport) -> str:
    return number(layer.sparsity, f"{100 * layer.sparsity:.2f} %", "sparsity") if layer.search_space else "dense"


def _chosen(layer: LayerReport | ReplacementReport) -> str:
    """The weights a mask may choose from, and how many times the dense layer's these are."""
    if not layer.search_space:
        return ""
    shown = number(layer.search_space, count(layer.search_space), "search_space")
    return (
        f'{shown}<div class="soft small">{times(layer.search_space, layer.weights_before)}</div>'
        if layer.weights_before
        else shown
    )
