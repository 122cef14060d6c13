"""Masks that move beside what else acts on an optimizer: gradient clipping, schedules of learning rates, gradient scalers."""

import copy

import pytest
import torch
from torch import nn

import sift_compiler as sift
from sift_compiler.nn import SparseLinear

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        SparseLinear(9, 12, sparsity=0.6, dtype=torch.float64), nn.Tanh(), SparseLinear(12, 5, sparsity=0.5, dtype=torch.float64)
    )  # fmt: skip


def groups_of(model):
    return [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters()}]


def loss_of(model, step, factor=1.0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    return nn.functional.cross_entropy(model(x), torch.randint(5, (7,), generator=generator)) * factor


def everything(model, optimizer):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{number}.{name}": tensor for name, tensor in entry.items()})
    return copy.deepcopy({name: tensor for name, tensor in state.items() if tensor is not None})


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_acts_on_the_kept_weights_and_growth_sees_the_whole_gradient(name):
    model = network()
    optimizer = OPTIMIZERS[name](groups_of(model))
    masks = sift.schedule(model, optimizer, sift.RigL(delta_t=1, end_step=9, drop_fraction=0.3))
    twin = network()
    own = OPTIMIZERS[name](groups_of(twin))
    dense = [layer.dense_weight().detach().requires_grad_() for layer in (model[0], model[2])]
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = torch.tanh(nn.functional.linear(x, dense[0], model[0].bias.detach()))
    generator = torch.Generator().manual_seed(0)
    torch.randn(7, 9, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (7,), generator=generator)
    nn.functional.cross_entropy(nn.functional.linear(hidden, dense[1], model[2].bias.detach()), target).backward()

    norms = []
    for network_, opt in ((model, optimizer), (twin, own)):
        loss_of(network_, 0).backward()
        norms.append(nn.utils.clip_grad_norm_(network_.parameters(), 1e-3))
        opt.step()
    assert norms[0] == norms[1] > 1e-3
    assert len(masks.updates) == 1
    for layer, other, weight, record in zip(
        (model[0], model[2]), (twin[0], twin[2]), dense, masks.updates[0].layers, strict=True
    ):
        # Dropped: the smallest after the clipped step. Grown: the largest unclipped gradients outside what is left.
        survivors = other.values.abs().argsort()[record.dropped :]
        kept = torch.zeros(layer.pattern.numel, dtype=torch.bool)
        kept[other.index[survivors].long()] = True
        scores = weight.grad.reshape(-1).abs().masked_fill(kept, -1)
        kept[scores.topk(record.grown).indices] = True
        assert record.dropped > 0
        assert torch.equal(layer.pattern.mask().reshape(-1), kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedules_of_learning_rates_come_before_or_after(name):
    def run(order):
        model = network()
        optimizer = OPTIMIZERS[name](groups_of(model))
        method = sift.RigL(delta_t=2, end_step=9)
        if order == "before":
            rates = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
        masks = sift.schedule(model, optimizer, method)
        if order == "after":
            rates = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
        bases = [group["lr"] for group in optimizer.param_groups]
        for step in range(7):
            if order == "by hand":
                for group, base in zip(optimizer.param_groups, bases, strict=True):
                    group["lr"] = base * 0.3 ** (step // 2)
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            if order != "by hand":
                rates.step()
        assert [update.step for update in masks.updates] == [0, 2, 4, 6]
        return everything(model, optimizer), [update.layers for update in masks.updates]

    before, after, by_hand = run("before"), run("after"), run("by hand")
    same(before[0], after[0])
    assert before[1] == after[1] == by_hand[1]
    for key, tensor in before[0].items():
        torch.testing.assert_close(tensor, by_hand[0][key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_leaves_all_as_it_was_and_the_update_comes_with_the_next(name, fused):
    model = network()
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[name](groups_of(model), lr=1e-2, fused=fused)
    masks = sift.schedule(model, optimizer, sift.RigL(delta_t=2, end_step=9), recorder=sift.Recorder(exploration=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def step(number, factor=1.0):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number, factor)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()

    step(0)
    step(1)
    before, told = everything(model, optimizer), masks.state_dict()
    for number in (2, 3):
        step(number, float("inf"))
        same(before, everything(model, optimizer))
        after = masks.state_dict()
        memory = told.pop("memory"), after.pop("memory")
        assert told == after
        assert all(
            torch.equal(kept, memory[1][layer][key]) for layer, each in memory[0].items() for key, kept in each.items()
        )
        told = masks.state_dict()
    step(4)
    assert [update.step for update in masks.updates] == [0, 2]
    assert masks.skipped == {"missing": 0, "not finite": 0}
    assert not torch.equal(before["model.0.index"], model[0].index)
