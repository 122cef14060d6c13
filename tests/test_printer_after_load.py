"""A loaded graph is printed with the nesting that it had when it was saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sift_compiler as sift
from sift_compiler.ir.printer import printed


class Mixed(nn.Module):
    """Convolutions with and without bias, a residual, and a linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.up, self.twice, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = (x + self.b(self.a(x).relu())).mean((2, 3))
        x = self.up(x)
        for _ in range(2):
            x = x + self.twice(x)
        return self.last(x)


def nesting(text: str) -> list[tuple[bool, str]]:
    """Of every line but those of bare parameters, which a file moves to the front: is it indented, and what does it compute."""
    lines = [line for line in text.splitlines() if " = self." not in line]
    return [(line.startswith("    "), line.partition(" = ")[2].partition("(")[0] or line) for line in lines]


MEMBERS = [
    sift.SparseParallel(sparsity=0.5),
    sift.SparseParallel(sparsity=0.75, sigma="identity"),
    sift.SparseFactorized(sparsity=0.5),
    sift.SparseDoped(sparsity=0.5),
]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: f"{type(member).__name__}-{member.sigma}")
def test_parts_of_a_layer_stay_under_it(member, tmp_path):
    sparse = sift.rewrite(Mixed(), torch.randn(2, 2, 6, 6), member)
    sift.save(sparse, tmp_path / "sparse.pt2")
    before, after = nesting(printed(sparse)), nesting(printed(sift.load(tmp_path / "sparse.pt2")))
    assert after == before
    indented = [what for nested, what in after if nested]
    calls = sum(not nested and what.startswith("twice:") for nested, what in after)
    assert calls == 2, "every call of a layer is headed by its path"
    assert len(indented) > 2 * 5
    assert "aten.mean.dim" not in indented


def test_a_graph_without_replaced_layers_is_flat(tmp_path, models):
    sparse = sift.rewrite(models.mlp(), torch.randn(2, 64), sift.SparseWide(sparsity=0.5))
    sift.save(sparse, tmp_path / "sparse.pt2")
    assert not any(nested for nested, _ in nesting(printed(sift.load(tmp_path / "sparse.pt2"))))
