"""A report as one HTML page: what was done to the model, in the order a reader asks.

No script, no network, no other file; every name of the model is escaped.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sift_compiler.reporting.bars import bar, count, number, size, stacked, text, times
from sift_compiler.reporting.drawings import drawing
from sift_compiler.reporting.layer_table import MEMBERS, layer_table
from sift_compiler.reporting.style import STYLE

if TYPE_CHECKING:
    from sift_compiler.reporting.model import Report, TrainingStates

_EXPLAINED = {
    "SparseWide": "The layer and its neighbours got wider by one factor. The mask keeps as many weights as cost what the layer cost before.",
    "SparseParallel": "Several sparse layers of the old size stand side by side; their outputs are added.",
    "SparseFactorized": "Two sparse layers stand one after the other, with a wide space between them.",
    "SparseDoped": "A sparse layer of the old size stands beside a product of two small dense ones.",
    "LowRank": "A dense baseline: a product of two smaller dense layers, in a widened model.",
}
_PARTS = {
    "values": "values", "gradients": "gradients", "optimizer": "optimizer state", "indices": "positions of kept weights",
    "buffers": "buffers",
}  # fmt: skip


def as_page(report: Report) -> str:
    """The whole page."""
    title = f"{report.name}: what sift made of it" if report.compared else f"{report.name}: layer by layer"
    sections = (_head(report, title), _totals(report), _members(report), _layers(report), _left_dense(report),
                _memory(report), _check(report), _terms())  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>"
    )


# --- what it is about -----------------------------------------------------------------------------------------------


def _head(report: Report, title: str) -> str:
    inputs = "; ".join(f"<code>{text(each)}</code>" for each in report.example)
    return (
        f"<header><h1>{text(title)}</h1><p class=soft>Example inputs, batch first: {inputs or 'not recorded'}. "
        f"FLOPs and activation memory are those of one forward pass of them.</p><p>{_summary(report)}</p></header>"
        f'<div class="cards">{_cards(report)}</div>'
    )


def _summary(report: Report) -> str:
    sparse, layers = len(report.sparse_layers), len(report.layers)
    rewritten = sum(not layer.origin for layer in report.sparse_layers) + len(report.replacements)
    if not sparse:
        return f"The model has {layers} convolutions and linear layers, all of them dense."
    masks = f"Masks keep {report.search_space - _removed(report):,} of {report.search_space:,} weights of {sparse} sparse layers."
    if not report.compared:
        return masks
    were = "1 layer was" if rewritten == 1 else f"{rewritten} layers were"
    return (
        f"{were} rewritten. Each got more room for weights than it had, and a mask keeps only as many as "
        f"make the whole model cost what it cost before. {masks}"
    )


def _removed(report: Report) -> int:
    return sum(layer.search_space - layer.kept for layer in report.sparse_layers)


def _cards(report: Report) -> str:
    sparse = bool(report.sparse_layers)
    cards = []
    if report.compared:
        more = f"sparse over dense; {abs(report.ratio - 1):.4%} from equal"
        cards.append(_card("FLOPs ratio", number(report.ratio, f"{report.ratio:.6f}", "ratio"), more))
    else:
        cards.append(
            _card("FLOPs", number(report.sparse_flops, count(report.sparse_flops), "flops"), "kept weights only")
        )
    if sparse:
        shown = number(report.sparsity, f"{100 * report.sparsity:.2f} %", "sparsity")
        cards.append(_card("Sparsity", shown, "of all sparse layers together"))
        space = number(report.search_space, count(report.search_space), "search_space")
        cards.append(_card("Search space", space, "weights that masks choose from"))
    activations = report.activations
    if activations.dense is not None and activations.sparse is not None:
        more = (
            f"{times(activations.sparse.bytes, activations.dense.bytes)} the dense model's"
            if report.compared
            else "saved for backward"
        )
        shown = number(activations.sparse.bytes, size(activations.sparse.bytes), "activations")
        cards.append(_card("Activation memory", shown, more))
    for name, states in report.training.items():
        more = (
            f"{times(states.sparse.total, states.dense.total)} the dense model's"
            if report.compared
            else "kept between steps"
        )
        shown = number(states.sparse.total, size(states.sparse.total), f"training {name}")
        cards.append(_card(f"Training state, {name}", shown, more))
    return "".join(cards)


def _card(name: str, value: str, more: str) -> str:
    return f'<div class="card"><div class="name">{text(name)}</div><div class="value">{value}</div><div class="more">{text(more)}</div></div>'


# --- totals ---------------------------------------------------------------------------------------------------------


def _totals(report: Report) -> str:
    if not report.compared:
        return ""
    rows = [
        _total("FLOPs of a forward pass", "flops", report.dense_flops, report.sparse_flops, count),
        _total("Parameters", "parameters", report.dense_parameters, report.sparse_parameters, count),
        _total("Parameters and buffers, in memory", "bytes", report.dense_bytes, report.sparse_bytes, size),
    ]
    activations = report.activations
    if activations.dense is not None and activations.sparse is not None:
        rows.append(_total("Activation memory", "activations", activations.dense.bytes, activations.sparse.bytes, size))
    for name, states in report.training.items():
        rows.append(
            _total(f"Training state, {name}", f"training {name}", states.dense.total, states.sparse.total, size)
        )
    head = "<th></th><th>Dense</th><th>Sparse</th><th>Sparse over dense</th><th></th>"
    return (
        '<h2>The whole model</h2><div class="key"><span style="--c:var(--dense)">dense model</span>'
        '<span style="--c:var(--sparse)">sparse model</span></div>'
        f'<div class="sheet"><table id="totals"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _total(name: str, field: str, dense: int, sparse: int, shown: object) -> str:
    assert callable(shown)
    largest = max(dense, sparse)
    ratio = f"{sparse / dense:.4f}" if dense else "–"
    return (
        f'<tr data-total="{text(field)}"><th scope="row">{text(name)}</th>'
        f"<td>{number(dense, shown(dense), 'dense')}</td><td>{number(sparse, shown(sparse), 'sparse')}</td><td>{ratio}</td>"
        f'<td class="bars">{bar(dense, largest, "dense", f"dense: {dense:,}")}{bar(sparse, largest, "sparse", f"sparse: {sparse:,}")}</td></tr>\n'
    )


# --- layers ---------------------------------------------------------------------------------------------------------


def _members(report: Report) -> str:
    wholes = Counter(whole.member for whole in report.replacements)
    alone = Counter(layer.member for layer in report.layers if layer.member and not layer.origin)
    found = wholes + alone
    if not found:
        return ""
    items = "".join(
        f'<div class="card member">{drawing(member)}<div><span class="badge {text(member)}">{text(MEMBERS.get(member, member))}</span> '
        f"{number} {'layer' if number == 1 else 'layers'}<p>{text(_EXPLAINED.get(member, ''))}</p></div></div>"
        for member, number in found.items()
    )
    return (
        "<h2>How layers were rewritten</h2><p class=soft>On the left the old dense weight, on the right what stands in its place. The "
        "coloured cells of a sparse weight are kept, the rest is neither stored nor computed; every picture has as many cells after as "
        f'before.</p><div class="cards members">{items}</div>'
    )


def _layers(report: Report) -> str:
    colours = (
        '<div class="key"><span style="--c:var(--dense)">before</span><span style="--c:var(--sparse)">after, kept weights only</span></div>'
        if report.compared else ""
    )  # fmt: skip
    return (
        "<h2>Layer by layer</h2><p class=soft>All bars of a column share one scale; a number shows its exact value when pointed at. "
        f"<i>Chosen from</i> is the size of the weight that the mask keeps a part of, and how many times the old weight that is."
        f"</p>{colours}{layer_table(report)}"
    )


def _left_dense(report: Report) -> str:
    """Why layers are dense, by reason; parts of a layer that became several are dense by its mathematics."""
    reasons: dict[str, list[str]] = {}
    for layer in report.layers:
        if not layer.sparse and not layer.origin:
            reasons.setdefault(layer.reason or "the model does not tell why", []).append(layer.path)
    if not reasons or not report.sparse_layers:
        return ""
    items = "".join(
        f"<li>{text(reason)}: {', '.join(f'<code>{text(path)}</code>' for path in paths)}</li>"
        for reason, paths in reasons.items()
    )
    return f'<h2>Left dense, and why</h2><ul id="dense">{items}</ul>'


# --- memory and the check -------------------------------------------------------------------------------------------


def _memory(report: Report) -> str:
    activations = report.activations
    parts = [
        "<h2>Memory in training</h2><p><b>Activation memory</b> is what a forward pass keeps for the backward pass: every tensor "
        "that autograd saves in eager mode, each storage once, parameters and buffers left out. "
    ]
    if activations.dense is None or activations.sparse is None:
        parts.append(f'<span class="open">It is not known: {text(activations.reason)}</span></p>')
    elif report.compared:
        parts.append(
            f"The dense model keeps {number(activations.dense.bytes, size(activations.dense.bytes))} in {activations.dense.tensors} "
            f"tensors, the sparse one {number(activations.sparse.bytes, size(activations.sparse.bytes))} in {activations.sparse.tensors}.</p>"
        )
    else:
        parts.append(
            f"The model keeps {number(activations.sparse.bytes, size(activations.sparse.bytes))} in {activations.sparse.tensors} tensors.</p>"
        )
    parts.append(
        "<p><b>Training state</b> is what is kept from one step to the next. A sparse layer has a value, a gradient and optimizer state "
        "for each kept weight, not for the whole weight, and the position of each besides. (In dense storage it has them for every entry.)"
        "</p>"
    )
    return "".join(parts) + _training(report)


def _training(report: Report) -> str:
    largest = max((max(each.dense.total, each.sparse.total) for each in report.training.values()), default=0)
    rows = "".join(_training_rows(report, name, states, largest) for name, states in report.training.items())
    key = "".join(f'<span style="--c:var(--{name})">{text(shown)}</span>' for name, shown in _PARTS.items())
    head = "<th>Optimizer</th><th>Model</th>" + "".join(
        f"<th class=right>{text(shown.capitalize())}</th>" for shown in _PARTS.values()
    )
    return (
        f'<div class="key">{key}</div><div class="sheet"><table id="training"><thead><tr>{head}<th class=right>Total</th><th></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _training_rows(report: Report, name: str, states: TrainingStates, largest: int) -> str:
    sides = (("dense", states.dense), ("sparse", states.sparse)) if report.compared else (("sparse", states.sparse),)
    rows = []
    for side, state in sides:
        values = {part: getattr(state, part) for part in _PARTS}
        cells = "".join(
            f'<td class="right nowrap">{number(value, size(value), part)}</td>' for part, value in values.items()
        )
        label = ", ".join(f"{_PARTS[part]} {value:,} bytes" for part, value in values.items())
        shown = side if report.compared else ""
        rows.append(
            f'<tr data-optimizer="{text(name)}" data-side="{side}"><th scope="row">{text(name)}</th><td>{shown}</td>{cells}'
            f'<td class="right nowrap">{number(state.total, size(state.total), "total")}</td>'
            f'<td class="bars">{stacked(values, largest, label)}</td></tr>\n'
        )
    return "".join(rows)


def _check(report: Report) -> str:
    check = report.check
    if check is None:
        if not report.sparse_layers:
            return ""
        return (
            '<h2>Are the FLOPs right?</h2><p><span class="open">Not checked:</span> the sparse model was not run.</p>'
        )
    share = check.on_padding / check.multiply_adds if check.multiply_adds else 0.0
    return (
        '<h2>Are the FLOPs right?</h2><div class="sheet"><table id="check"><tbody>'
        f'<tr><th scope="row">FLOPs of all sparse layers, by formula</th><td class="right">{number(check.formula_flops, f"{check.formula_flops:,}", "formula_flops")}</td></tr>'
        f'<tr><th scope="row">Multiply-adds that they executed on the example, times 2</th><td class="right">{number(2 * check.multiply_adds, f"{2 * check.multiply_adds:,}", "executed_flops")}</td></tr>'
        f'<tr><th scope="row">Difference</th><td class="right"><span class="{"open" if check.difference else "ok"}">{number(check.difference, f"{check.difference:,}", "difference")}</span></td></tr>'
        "</tbody></table></div>"
        "<p class=soft>The first number comes from <code>torch.utils.flop_counter</code>. The second was counted while the model ran, "
        "from the masks and the outputs of every call of a sparse operator. A kept weight counts once for each position of the output; "
        f"for {number(check.on_padding, f'{check.on_padding:,}', 'on_padding')} of them ({share:.1%}), near the border of an image, the "
        "other factor is a zero of the padding. Both counts include them.</p>"
    )


def _terms() -> str:
    terms = {
        "FLOPs": "2 per multiply-add of convolutions, linear layers and matrix products, attention included, for one forward pass of "
        "the example. Of a sparse layer only kept weights count. Norms, activations and additions do not.",
        "Iso-FLOP": "A ratio of 1: the sparse model computes as much as the dense one, with weights chosen from a larger space "
        "(Thangarasa et al., Sparse-IFT, ICML 2024).",
        "Sparsity": "The removed share of a weight. The mask may move in training; how much it keeps stays the same unless the method "
        "says otherwise.",
        "Chosen from, search space": "Weights that a mask may choose from: the cardinality of Sparse-IFT's search space, summed over the "
        "sparse layers.",
        "Weights kept": "Biases and norms are not in this column; they are in the parameters of the whole model.",
        "Dense, grown": "A layer that stays dense but got wider because its neighbours did. Its extra FLOPs are paid for by a higher "
        "sparsity elsewhere.",
    }
    items = "".join(f"<dt>{text(term)}</dt><dd>{text(meaning)}</dd>" for term, meaning in terms.items())
    return f"<details><summary>What the words mean</summary><dl>{items}</dl></details>"
