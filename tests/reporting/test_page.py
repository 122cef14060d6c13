"""The page: well formed, alone in the world, safe from names, and with the numbers of the JSON report."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import sift_compiler as sift
from sift_compiler.reporting.bars import bar, count, size, text
from sift_compiler.reporting.drawings import drawing
from sift_compiler.reporting.layer_table import MEMBERS
from sift_compiler.reporting.model import Activations

_VOID = {"meta", "br", "wbr", "rect", "img", "link", "input"}


class Page(HTMLParser):
    """Reads a page: are elements closed in order, which rows has it and what numbers are in them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[dict[str, str | None], dict[str, float], list[str]]] = []
        self.text: list[str] = []
        self.numbers: dict[str, float] = {}
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((given, {}, []))
        if tag == "data" and "data-field" in given:
            value = float(given["value"])
            (self.rows[-1][1] if "tr" in self.open else self.numbers)[given["data-field"]] = value

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if "tr" in self.open:
            self.rows[-1][2].append(data)

    def by(self, attribute: str) -> dict[str, tuple[dict[str, float], str]]:
        return {row[attribute]: (numbers, " ".join(texts)) for row, numbers, texts in self.rows if attribute in row}


MIXED = {
    "block1.conv1": sift.SparseParallel(sparsity=0.5),
    "block1.conv2": sift.SparseFactorized(sparsity=0.5),
    "block2.conv1": sift.SparseDoped(sparsity=0.5),
    "*": sift.SparseWide(sparsity=0.75),
}


@pytest.fixture(scope="module")
def mixed(models):
    """A model with all four members in it, and its report."""
    model, x = models.small_cnn(), torch.randn(3, 1, 8, 8)
    sparse = sift.rewrite(model, x, MIXED)
    return model, sparse, x, sift.report(model, sparse, x)


def test_the_page_needs_nothing_but_itself(mixed):
    html = mixed[-1].to_html()
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, given in page.tags:
        assert not {"src", "href", "xlink:href", "action"} & set(given)
        assert not any(name.startswith("on") for name in given)
    assert not re.search(r"url\(|@import|https?:", html)
    assert "prefers-color-scheme:dark" in html
    assert html == mixed[-1].to_html(), "the same report makes the same page"


def test_every_layer_has_a_row_with_the_numbers_of_json(mixed):
    report = mixed[-1]
    rows, plain = Page(report.to_html()).by("data-path"), json.loads(report.to_json())
    assert list(rows) == [
        "conv1", "block1.conv1", "block1.conv1.branch0", "block1.conv1.branch1", "block1.conv2", "block1.conv2.u",
        "block1.conv2.v", "block2.conv1", "block2.conv1.u", "block2.conv1.v", "block2.conv1.w", "block2.conv2",
        "block2.downsample.0", "fc",
    ]  # fmt: skip
    for layer in [*plain["layers"], *plain["replacements"]]:
        numbers, words = rows[layer["path"]]
        assert numbers["flops_after"] == layer["flops_after"]
        assert numbers["weights_after"] == layer["kept"]
        assert numbers.get("search_space", 0) == layer["search_space"]
        if not layer.get("origin"):
            assert numbers["flops_before"] == layer["flops_before"]
            assert numbers["weights_before"] == torch.Size(layer["shape_before"]).numel()
        if "sparsity" in layer and layer["search_space"]:
            assert numbers["sparsity"] == layer["sparsity"]
        assert layer.get("reason", "") in words
    assert "32x32x3x3" in rows["block1.conv1"][1]
    assert "Sparse Parallel" in rows["block1.conv1"][1]
    assert "64x64x3x3 → 128x64x3x3" in re.sub(r"\s+", " ", rows["block2.conv2"][1])
    assert "Sparse Wide" in rows["block2.conv2"][1]
    assert "dense, grown" in rows["fc"][1]
    assert "classifier" in rows["fc"][1]


def test_totals_memory_and_check_are_those_of_json(mixed):
    report = mixed[-1]
    page, plain = Page(report.to_html()), json.loads(report.to_json())
    totals = page.by("data-total")
    for name in ("flops", "parameters", "bytes"):
        assert totals[name][0] == {"dense": plain[f"dense_{name}"], "sparse": plain[f"sparse_{name}"]}
    assert totals["activations"][0] == {side: plain["activations"][side]["bytes"] for side in ("dense", "sparse")}
    assert set(plain["training"]) == {"SGD momentum", "AdamW"}
    for name, states in plain["training"].items():
        assert totals[f"training {name}"][0] == {side: states[side]["total"] for side in ("dense", "sparse")}
        assert states["ratio"] == states["sparse"]["total"] / states["dense"]["total"]
    states = {
        (row["data-optimizer"], row["data-side"]): numbers for row, numbers, _ in page.rows if "data-optimizer" in row
    }
    assert states == {
        (name, side): plain["training"][name][side] for name in plain["training"] for side in ("dense", "sparse")
    }
    assert page.numbers["ratio"] == plain["ratio"]
    assert page.numbers["sparsity"] == plain["sparsity"]
    assert page.numbers["search_space"] == plain["search_space"]
    checked = {name: value for _, numbers, _ in page.rows for name, value in numbers.items()}
    assert checked["formula_flops"] == plain["check"]["formula_flops"] > 0
    assert checked["executed_flops"] == 2 * plain["check"]["multiply_adds"]
    assert checked["difference"] == plain["check"]["difference"] == 0
    assert page.numbers["on_padding"] == plain["check"]["on_padding"] > 0
    assert "float32 [3, 1, 8, 8]" in "".join(page.text)


def test_bars_are_as_long_as_what_they_stand_for(mixed):
    report = mixed[-1]
    largest = max(each.flops_before for each in (*report.layers, *report.replacements))
    row = re.search(r'<tr class="layer" data-path="conv1">.*?</tr>', report.to_html(), re.DOTALL).group()
    shares = [float(width) for width in re.findall(r'class="bar (?:dense|sparse)" style="width:([\d.]+)%', row)]
    conv = report.layers[0]
    assert shares[0] == pytest.approx(100 * conv.flops_before / largest, abs=1e-3)
    assert shares[1] == pytest.approx(100 * conv.flops_after / largest, abs=1e-3)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", report.to_html())]
    assert max(widths) == 100
    assert "width:0.000%" in bar(0, 0, "dense", "nothing")


def test_names_cannot_break_the_page(mixed):
    report = mixed[-1]
    evil = "\"><script>alert(1)</script>&amp;'<b>"
    layers = (
        dataclasses.replace(report.layers[0], path=evil, reason=evil, kind=evil, member=evil, structure=evil),
        *report.layers[1:],
    )
    wholes = (dataclasses.replace(report.replacements[0], path=evil, summary=evil), *report.replacements[1:])
    layers = tuple(
        dataclasses.replace(layer, origin=evil) if layer.origin == "block1.conv1" else layer for layer in layers
    )
    states = {evil: report.training["AdamW"]}
    html = dataclasses.replace(
        report, name=evil, example=(evil,), layers=layers, replacements=wholes, training=states,
        activations=Activations(None, None, evil),
    ).to_html()  # fmt: skip
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.by("data-path")
    assert evil in page.by("data-optimizer")
    assert evil in "".join(page.text)
    assert Page(f"<p title='{text(evil)}'>x</p>").tags == [("p", {"title": evil})]


def test_parts_can_be_hidden_and_are_where_there_are_very_many(mixed, models):
    def switch(report):
        return next((given for tag, given in Page(report.to_html()).tags if tag == "input"), None)

    assert "checked" in switch(mixed[-1])
    model, x = models.mlp(), torch.randn(2, 64)
    assert switch(sift.report(model, sift.rewrite(model, x, sift.SparseWide(sparsity=0.5)), x)) is None
    many = sift.rewrite(model, x, {"3": sift.SparseParallel(sparsity=0.98)})
    assert sum(bool(layer.origin) for layer in sift.report(model, many, x).layers) > 40
    assert "checked" not in switch(sift.report(model, many, x))


def test_a_model_alone_has_one_side(mixed):
    _, sparse, x, _ = mixed
    report = sift.report(sparse, sparse, x, name="sparse.pt2")
    page = Page(report.to_html())
    assert not report.compared
    assert page.by("data-total") == {}
    assert {row["data-side"] for row, _, _ in page.rows if "data-side" in row} == {"sparse"}
    assert not any("flops_before" in numbers for _, numbers, _ in page.rows)
    assert "sparse.pt2: layer by layer" in "".join(page.text)
    assert 'class="bar dense"' not in report.to_html()


def test_a_dense_model_has_a_page_too(models):
    model, x = models.mlp(), torch.randn(1, 64)
    page = Page(sift.report(model, model, x).to_html())
    assert "all of them dense" in "".join(page.text)
    assert "Are the FLOPs right?" not in "".join(page.text)


def test_unknown_activation_memory_says_why(models):
    model, x = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)),
        torch.randn(1, 1, 3, 3),
    )
    report = sift.report(model, model, x)
    assert report.activations.dense is None
    assert "train mode: Expected more than 1 value per channel" in report.activations.reason
    assert report.activations.reason in "".join(Page(report.to_html()).text)
    assert report.activations.reason in str(report)


@pytest.mark.parametrize(
    ("value", "counted", "sized"),
    [
        (0, "0", "0 B"), (7, "7", "7 B"), (999, "999", "999 B"), (1000, "1.00 k", "1000 B"), (1024, "1.02 k", "1.00 KiB"),
        (12_345_678, "12.3 M", "11.8 MiB"), (999_999, "1.00 M", "977 KiB"), (3 * 2**30, "3.22 G", "3.00 GiB"),
    ],
)  # fmt: skip
def test_quantities(value, counted, sized):
    assert (count(value), size(value)) == (counted, sized)


@pytest.mark.parametrize("member", MEMBERS)
def test_pictures_are_iso_flop(member):
    picture = Page(drawing(member))
    blocks = [
        (int(given["width"]), int(given["height"]), given["fill"]) for tag, given in picture.tags if tag == "rect"
    ]
    cell = (
        min(width for width, _, fill in blocks if fill == "var(--sparse)") + 2
        if "Sparse" in member
        else blocks[0][0] // 4
    )
    before, *after = blocks
    assert before[0] * before[1] == 16 * cell**2
    dense = sum(width * height for width, height, fill in after if fill == "var(--dense)") // cell**2
    assert dense + sum(fill == "var(--sparse)" for _, _, fill in after) == 16
    assert drawing("unheard of") == ""
