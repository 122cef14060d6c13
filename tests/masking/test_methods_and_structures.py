"""Every method with every structure it keeps: exact counts, structure, seeds, optimizer state, resuming; the others are refused."""

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sift_compiler.errors import UserError
from sift_compiler.ir.mask_structure import NM, Block, Channel, ConstantFanIn, TransposableNM, Unstructured
from sift_compiler.ir.pattern import EMPTY
from sift_compiler.masking import methods
from sift_compiler.masking.bame import BAME
from sift_compiler.masking.bidst import BiDST
from sift_compiler.masking.gradual import GMP, GraNet
from sift_compiler.masking.mest import MEST
from sift_compiler.masking.snfs import SNFS
from sift_compiler.masking.srigl import SRigL
from sift_compiler.masking.straight_through import SRSTE, TopKAST
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.nn.storage import dense_storage
from sift_compiler.options import SET, RigL, Static
from sift_compiler.schedule import schedule

STEPS = 6
WHEN = {"delta_t": 2, "end_step": 6}
METHODS = {
    "set": SET(**WHEN, drop_fraction=0.5),
    "rigl": RigL(**WHEN, drop_fraction=0.5, decay="linear"),
    "snfs": SNFS(**WHEN, drop_fraction=0.5),
    "gmp": GMP(**WHEN, final_sparsity=0.9),
    "granet": GraNet(**WHEN, final_sparsity=0.9),
    "mest": MEST(**WHEN, drop_fraction=0.5, gradient_weight=2.0),
    "mest elastic": MEST(**WHEN, stages=((0, 0.5, 0.75), (3, 0.25, 0.5))),
    "srigl": SRigL(**WHEN, drop_fraction=0.5),
    "srste": SRSTE(**WHEN, penalty=0.1),
    "topkast": TopKAST(**WHEN, backward_sparsity=0.3),
    "bame": BAME(**WHEN, adapt_from=2, drop_fraction=0.5, commit=1.0),
    "bidst": BiDST(**WHEN, change=0.0, rate=50.0, noise=0.1),
}
RANDOM = ("set", "mest", "mest elastic", "bidst")
STRUCTURES = {
    str(each): each
    for each in (Unstructured(), NM(2, 4), TransposableNM(2, 4), Block(2, 4), ConstantFanIn(), Channel())
}
TOGETHER = [
    (method, structure)
    for method, structure in itertools.product(METHODS, STRUCTURES)
    if isinstance(STRUCTURES[structure], methods.rule_of(METHODS[method]).structures)
]
APART = [pair for pair in itertools.product(METHODS, STRUCTURES) if pair not in TOGETHER]


def network(structure, seed=0, sparsity=0.6, storage="compact"):
    torch.manual_seed(seed)
    model = nn.Sequential(
        SparseConv2d(4, 8, 3, padding=1, sparsity=sparsity, structure=structure),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        SparseLinear(32, 8, sparsity=sparsity, structure=structure),
    )
    return dense_storage(model) if storage == "dense" else model


def storage_of(method):
    return methods.rule_of(METHODS[method]).storage


def sparse_layers(model):
    return [model[0], model[4]]


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 4, 5, 5, generator=generator), torch.randint(0, 8, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def expected_counts(method, step, start, layer):
    """Active weights after the step, where the method fixes them for every layer by itself."""
    shape = layer.weight_shape
    if isinstance(method, GMP):
        initial = 1 - start / layer.pattern.numel
        passed = min(1, step / 4)  # updates at 0, 2, 4
        return min(start, layer.structure.kept(shape, 0.9 + (initial - 0.9) * (1 - passed) ** 3))
    if isinstance(method, MEST) and method.stages:
        share = 0.75 if step < 3 else 0.5
        granule = layer.structure.granule(shape)
        return int(start * share) // granule * granule
    return start


@pytest.mark.parametrize(("method", "structure"), TOGETHER)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0.5, 0.8))
def test_counts_and_structures_are_exact_after_every_update(method, structure, seed, sparsity):
    chosen = type(METHODS[method])(**{**vars(METHODS[method]), "seed": seed})
    model = network(STRUCTURES[structure], seed, sparsity, storage_of(method))
    start = [layer.pattern.nnz for layer in sparse_layers(model)]
    assert start == [layer.structure.kept(layer.weight_shape, sparsity) for layer in sparse_layers(model)]
    slots = [layer.index.numel() for layer in sparse_layers(model)]
    masks = schedule(model, adam(model), chosen)
    for step in range(STEPS):
        train(model, masks._optimizer, [step])
        for layer, count, length in zip(sparse_layers(model), start, slots, strict=True):
            layer.structure.check(layer.pattern)
            assert layer.index.numel() == layer.values.numel() == length
            empty = layer.index == EMPTY
            assert layer.values[empty].abs().sum() == 0
            if step % 2 == 0 and not isinstance(chosen, GraNet | SRigL):
                assert layer.pattern.nnz == expected_counts(chosen, step, count, layer)
            if isinstance(chosen, SRigL):
                fan_in = layer.pattern.mask().flatten(1).sum(1)
                assert len(set(fan_in[fan_in > 0].tolist())) == 1
        records = masks.updates[-1].layers if step % 2 == 0 else ()
        assert [record.active for record in records] == [layer.pattern.nnz for layer in sparse_layers(model)][
            : len(records)
        ]
    assert [update.step for update in masks.updates] == ([4] if storage_of(method) == "dense" else [0, 2, 4])
    assert all(0 <= update.iou <= 1 for update in masks.updates)
    if isinstance(chosen, GraNet):
        numel = sum(layer.pattern.numel for layer in sparse_layers(model))
        assert sum(layer.pattern.nnz for layer in sparse_layers(model)) == numel - int(0.9 * numel * (1 + 1e-12) + 1e-9)
    few = isinstance(STRUCTURES[structure], Channel) or isinstance(chosen, GMP)
    assert few or sum(update.grown for update in masks.updates) > 0


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("method", "structure"), TOGETHER)
def test_a_resumed_run_is_the_one_that_was_never_stopped_and_seeds_decide(method, structure):
    def run(stops, seed=0):
        chosen = type(METHODS[method])(**{**vars(METHODS[method]), "seed": seed})
        model = network(STRUCTURES[structure], storage=storage_of(method))
        optimizer = adam(model)
        masks = schedule(model, optimizer, chosen)
        for first, last in itertools.pairwise((0, *stops, STEPS)):
            if first:
                states = copy.deepcopy([part.state_dict() for part in (model, optimizer, masks)])
                masks.remove()
                model = network(STRUCTURES[structure], seed=9, storage=storage_of(method))
                optimizer = adam(model)
                model.load_state_dict(states[0])  # as a loaded module: masks are where they were
                masks = schedule(model, optimizer, chosen)
                for part, state in zip((model, optimizer, masks), states, strict=True):
                    part.load_state_dict(state)
            train(model, optimizer, range(first, last))
        return model, optimizer, masks

    whole, again, resumed, other = run(()), run(()), run((2, 3)), run((), seed=1)
    assert same(whole[0], again[0])
    assert [update.layers for update in whole[2].updates] == [update.layers for update in again[2].updates]
    assert same(whole[0], resumed[0])
    for one, two in zip(whole[1].state.values(), resumed[1].state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert [update.layers for update in whole[2].updates] == [update.layers for update in resumed[2].updates]
    assert same(whole[0], other[0]) != (method in RANDOM)


@pytest.mark.parametrize(("method", "structure"), [pair for pair in TOGETHER if storage_of(pair[0]) == "compact"])
def test_grown_weights_start_from_nothing(method, structure):
    model = network(STRUCTURES[structure], storage=storage_of(method))
    optimizer = adam(model)
    masks = schedule(model, optimizer, METHODS[method])
    train(model, optimizer, range(4))
    before = [layer.index.clone() for layer in sparse_layers(model)]
    train(model, optimizer, [4])
    for layer, old in zip(sparse_layers(model), before, strict=True):
        moved = layer.index != old
        for tensor in (layer.values, *(optimizer.state[layer.values][key] for key in ("exp_avg", "exp_avg_sq"))):
            assert tensor[moved].abs().sum() == 0
    assert masks.updates[-1].step == 4


@pytest.mark.parametrize(("method", "structure"), APART)
def test_what_does_not_go_together_is_refused_with_what_works(method, structure):
    model = network(STRUCTURES[structure], storage=storage_of(method))
    with pytest.raises(UserError, match=r"cannot keep the structure .* of layer '0'\. It works with [A-Z]"):
        schedule(model, adam(model), METHODS[method])


def test_every_known_method_is_tried_here():
    tried = {type(method) for method in METHODS.values()} | {Static}
    assert set(methods.METHODS.values()) == tried
