"""Schemes of initialisation read from weights, and drawn again for other sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sift_compiler.ir.scheme import Scheme, fan_of, read_scheme

LAWS = {
    # name: (initialiser, fan, variance times fan, uniform)
    "torch": (lambda w: nn.init.kaiming_uniform_(w, math.sqrt(5)), "in", 1 / 3, True),
    "xavier_uniform": (nn.init.xavier_uniform_, "both", 2.0, True),
    "xavier_normal": (nn.init.xavier_normal_, "both", 2.0, False),
    "kaiming_uniform": (lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"), "in", 2.0, True),
    "kaiming_normal": (lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"), "in", 2.0, False),
    "fan_out": (lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"), "out", 2.0, False),
    "lecun": (lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"), "in", 1.0, False),
}


@pytest.mark.parametrize("name", list(LAWS))
@pytest.mark.parametrize("shape", [(96, 32), (40, 24, 3, 3), (2304, 768)])
def test_laws_of_fans_are_read_and_followed(name, shape):
    torch.manual_seed(0)
    initialiser, fan, variance, uniform = LAWS[name]
    weight = torch.empty(shape)
    initialiser(weight)
    scheme = read_scheme(weight)
    assert scheme == Scheme(deviation=math.sqrt(variance), uniform=uniform, fan=fan)
    wide = torch.empty(2 * shape[0], 2 * shape[1], *shape[2:])
    scheme.fill(wide, scheme.deviation_of(tuple(wide.shape)))
    expected = torch.empty_like(wide)
    initialiser(expected)
    assert float(wide.std()) == pytest.approx(float(expected.std()), rel=0.05)
    assert float(wide.std()) == pytest.approx(math.sqrt(variance / fan_of(tuple(wide.shape), fan)), rel=0.05)
    assert (float(wide.abs().max()) <= math.sqrt(3) * float(expected.std()) * 1.05) == uniform


@pytest.mark.parametrize("shape", [(768, 768), (2304, 768), (768, 3072), (32, 96), (50257, 64)])
@pytest.mark.parametrize("deviation", [0.02, 0.02 / math.sqrt(24)])
def test_one_deviation_for_all_sizes_stays(shape, deviation):
    """Also at 768 inputs, where torch's default has .0208."""
    scheme = read_scheme(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * deviation)
    assert scheme.fan is None
    assert not scheme.uniform
    assert scheme.mean == 0
    assert scheme.deviation_of((5, 7)) == pytest.approx(deviation, rel=0.05)


def test_constants_means_and_vectors():
    assert read_scheme(torch.zeros(3, 4)) == Scheme(deviation=0.0)
    assert read_scheme(torch.full((4,), 1e-6)).mean == pytest.approx(1e-6)
    vector = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 5
    scheme = read_scheme(vector)
    assert scheme.mean == pytest.approx(5, rel=0.05)
    assert scheme.deviation == pytest.approx(3, rel=0.1)
    embedding = torch.randn(2500, 2500, generator=torch.Generator().manual_seed(0)) * 0.02
    assert read_scheme(embedding).fan == "both", "by chance 2500 inputs are those of .02"
    assert read_scheme(embedding, fans=False).fan is None
