"""The training state that is told is the one that exists after a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sift_compiler.demo.memory import training_memory
from sift_compiler.ir.training_state import OPTIMIZERS, training_state
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.nn.storage import dense_storage


def network() -> nn.Sequential:
    return nn.Sequential(
        SparseConv2d(3, 8, 3, stride=2, padding=1, bias=False, sparsity=0.75), nn.BatchNorm2d(8), nn.Flatten(),
        SparseLinear(8 * 3 * 3, 5, sparsity=0.5),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "states", "count"), [("SGD momentum", 1, 0), ("AdamW", 2, 4)])
def test_numbers_of_a_small_network(name, states, count):
    kept, rest = 8 * 27 // 4 + 5 * 72 // 2, 8 + 8 + 5
    found = training_state(network(), OPTIMIZERS[name])
    assert found.values == found.gradients == 4 * (kept + rest)
    assert found.optimizer == states * found.values + count * 5, "AdamW counts the steps of each of the five tensors"
    assert found.indices == 4 * kept
    assert found.buffers == 4 * 2 * 8 + 8
    assert found.total == (2 + states) * found.values + count * 5 + found.indices + found.buffers


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("prepare", [lambda model: model, dense_storage, lambda model: model.double()])
def test_told_before_training_and_counted_after_a_step_are_the_same(name, prepare):
    model = prepare(network())
    told = training_state(model, OPTIMIZERS[name])
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    x = torch.randn(4, 3, 5, 5, dtype=next(model.parameters()).dtype)
    model(x).square().sum().backward()
    optimizer.step()
    counted = training_memory(model, optimizer)
    for field in ("values", "gradients", "optimizer", "indices", "buffers", "total"):
        assert getattr(told, field) == getattr(counted, field), field


def test_frozen_and_tied_parameters():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2, bias=False))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    found = training_state(model, OPTIMIZERS["SGD momentum"])
    assert found.values == 4 * (36 + 12)
    assert found.gradients == found.optimizer == 4 * 36
    nothing = training_state(model.requires_grad_(False), OPTIMIZERS["AdamW"])
    assert (nothing.gradients, nothing.optimizer) == (0, 0)


def test_a_model_without_numbers_is_counted_too():
    with torch.device("meta"):
        found = training_state(nn.Linear(5, 3), OPTIMIZERS["AdamW"])
    assert found.values == 4 * 18
    assert found.optimizer == 2 * 4 * 18 + 2 * 4
