"""Results as Markdown: a table per data set and recipe, a row per method and sparsity."""

from __future__ import annotations

import json
import statistics
from typing import Any

from .results import Record
from .settings import METHODS

NAMES = {
    "dense": "dense",
    "static": "Sparse Wide, static",
    "set": "Sparse Wide, SET",
    "rigl": "Sparse Wide, RigL",
    "bidst": "Sparse Wide, BiDST-style",
    "static-nm": "Sparse Wide, static, {structure}",
    "bame": "Sparse Wide, BAME-style, {structure}",
    "dense-wide": "dense of the wide width (not equal FLOPs)",
}
HEAD = (
    "method", "sparsity", "n", "accuracy, %", "mean of the last {last}, %", "over dense, points", "FLOPs", "parameters", "replaced",
    "explored",
)  # fmt: skip


def table(records: list[Record]) -> str:
    """Mean ± sample standard deviation over seeds (n - 1 in the denominator); a single seed has no spread."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        cell = record["cell"]
        key = json.dumps([cell["dataset"], cell["run"], cell["recipe"]], sort_keys=True)
        groups.setdefault(key, []).append(record)
    return "\n\n".join(_group(group) for group in groups.values())


def _group(records: list[Record]) -> str:
    cell, result = records[0]["cell"], records[0]["result"]
    recipe = cell["recipe"]
    tested = "held-out training images" if recipe["held_out"] else "test images"
    title = (
        f"**{cell['dataset']}**, {result['train_images']:,} training images, {_counted(recipe['epochs'], 'epoch')} of {result['steps'] // recipe['epochs']} "
        f"steps, learning rate {recipe['learning_rate']}, widths {recipe['widths']}, {result['test_images']:,} {tested}, {cell['run']}"
    )
    rows: dict[tuple[float, int], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        rows.setdefault((cell["sparsity"], METHODS.index(cell["method"])), []).append(record)
    dense = [each for (_, method), row in rows.items() if METHODS[method] == "dense" for each in row]
    head = " | ".join(HEAD).format(last=recipe["last"])
    lines = [title, "", f"| {head} |", "|---" * len(HEAD) + "|"]
    lines += [f"| {' | '.join(_row(rows[key], dense))} |" for key in sorted(rows)]
    return "\n".join(lines)


def _row(records: list[Record], dense: list[Record]) -> list[str]:
    cell, result = records[0]["cell"], records[0]["result"]
    masks: dict[str, Any] | None = result["masks"]
    accuracies = [100 * record["result"]["accuracy"] for record in records]
    diverged = sum(record["result"]["diverged"] for record in records)
    return [
        NAMES[cell["method"]].format(structure=_structure(masks)) + (f" ({diverged} diverged)" if diverged else ""),
        f"{masks['sparsity']:.3f}" if masks else "0",
        str(len(records)),
        _spread(accuracies),
        _spread([100 * record["result"]["last_mean"] for record in records]),
        _over(records, dense),
        f"{result['flop_ratio']:.4f}×",
        f"{result['parameters']:,}",
        _mean(records, "replaced", "×") if masks else "",
        _mean(records, "explored", "") if masks else "",
    ]


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _structure(masks: dict[str, Any] | None) -> str:
    return ", ".join(masks["structures"]).replace("n=", "").replace("m=", "") if masks else ""


def _over(records: list[Record], dense: list[Record]) -> str:
    """Difference to the dense network, seed by seed, over the seeds that both have."""
    base = {record["cell"]["seed"]: record["result"]["accuracy"] for record in dense}
    shared = [record for record in records if record["cell"]["seed"] in base]
    if not shared or records[0]["cell"]["method"] == "dense":
        return ""
    return _spread(
        [100 * (record["result"]["accuracy"] - base[record["cell"]["seed"]]) for record in shared], signed=True
    )


def _spread(values: list[float], signed: bool = False) -> str:
    mean = format(statistics.mean(values), "+.2f" if signed else ".2f")
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _mean(records: list[Record], key: str, unit: str) -> str:
    return f"{statistics.mean(record['result']['masks'][key] for record in records):.2f}{unit}"
