"""Methods against what their papers say, computed another way in float64."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.ir.mask_structure import NM, ConstantFanIn, Unstructured
from sift_compiler.ir.pattern import Pattern, entry_of
from sift_compiler.masking.bame import BAME, swaps
from sift_compiler.masking.bidst import BiDST
from sift_compiler.masking.gradual import GMP, GraNet, shares_of_largest
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.mest import MEST
from sift_compiler.masking.rule import DynamicMethod, Target
from sift_compiler.masking.snfs import SNFS
from sift_compiler.masking.snip import snip
from sift_compiler.masking.srigl import SRigL
from sift_compiler.masking.straight_through import SRSTE, TopKAST
from sift_compiler.nn import SparseLinear
from sift_compiler.nn.storage import compact, dense_storage
from sift_compiler.options import SET, RigL
from sift_compiler.schedule import schedule


def view(index, values, *, structure=None, gradient=None, shape=None, **more):
    index = torch.tensor(index, dtype=torch.int32)
    return LayerView(
        name="layer", shape=shape or (1, 8), structure=structure or Unstructured(), index=index,
        slot_values=torch.tensor(values, dtype=torch.float64),
        fetch=None if gradient is None else lambda: torch.tensor(gradient, dtype=torch.float64), **more,
    )  # fmt: skip


def two_layers(structure=None, seed=0):
    torch.manual_seed(seed)
    more = {"dtype": torch.float64, "structure": structure or Unstructured()}
    return nn.Sequential(
        SparseLinear(8, 16, sparsity=0.5, **more), nn.Tanh(), SparseLinear(16, 4, sparsity=0.5, **more)
    )


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(6, 8, generator=generator, dtype=torch.float64), torch.randint(0, 4, (6,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_snfs_grows_where_the_momentum_of_all_gradients_is_largest():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule(model, optimizer, SNFS(delta_t=3, begin_step=2, end_step=5, drop_fraction=0.3, momentum=0.5))
    layer, momentum = model[0], 0
    for number in range(3):
        twin = layer.dense_weight().detach().requires_grad_()
        generator = torch.Generator().manual_seed(number)
        x, y = (
            torch.randn(6, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (6,), generator=generator),
        )
        hidden = torch.tanh(nn.functional.linear(x, twin, layer.bias))
        nn.functional.cross_entropy(model[2](hidden), y).backward()
        momentum = 0.5 * momentum + twin.grad
        before = layer.pattern.mask()
        step(model, optimizer, number)
    new = layer.pattern.mask() & ~before
    possible = momentum.abs().masked_fill(before, 0)
    assert new.any()
    assert float(momentum.abs()[new].min()) == pytest.approx(
        float(possible.flatten().topk(int(new.sum())).values.min())
    )


def test_mest_drops_the_smallest_of_magnitude_and_gradient():
    rule = MEST(end_step=9, gradient_weight=2.0)
    layer = view([0, 3, 5, 7], [1.0, -0.1, 0.2, 3.0], slot_gradient=torch.tensor([0.0, 1.0, -0.1, 0.0]).double())
    assert rule.drop_scores(layer).tolist() == pytest.approx([1.0, 2.1, 0.4, 3.0])
    choice = rule.choose(layer, Target(3, 3))
    assert choice.kept.tolist() == [True, True, False, True]
    for wrong in ((3, 1), ((5, 0.1, 0.2),), ((0, 0.5, 0.2),), ((0, 0.1, 2.0),), ((0, 0, 1), (0, 0, 1))):
        with pytest.raises(UserError, match="MEST"):
            MEST(end_step=9, stages=wrong)


def test_granet_prunes_over_all_layers():
    assert shares_of_largest([torch.tensor([5.0, 1, 1]), torch.tensor([4.0, 1, 3])], 4) == [2, 2]
    assert shares_of_largest([torch.tensor([1.0, 1]), torch.tensor([2.0])], 9) == [2, 1]
    rule = GraNet(end_step=1, final_sparsity=0.75, drop_fraction=0.5, decay="constant")
    layers = [view([0, 1, 2, 3], [9, 8, 7, 6], step=0), view([0, 1, 2, 3], [1, 2, 3, 4])]
    for layer in layers:
        rule.begin(layer)
    assert rule.targets(layers, 0) == [Target(2, 4), Target(0, 0)]


def test_gmp_refuses_to_add_weights():
    model = two_layers()
    with pytest.raises(UserError, match=r"add weights to layer '0', whose sparsity is 0\.5000"):
        schedule(model, torch.optim.SGD(model.parameters(), lr=0.1), GMP(end_step=3, final_sparsity=0.4))


def test_srigl_ablates_the_output_with_little_salience_and_shares_its_weights_out():
    # Three outputs of four inputs, fan-in 2; the last has small weights and small gradients.
    index, values = [0, 1, 4, 5, 8, 9], [5.0, 4, 3, 2, 0.2, 0.1]
    gradient = [0, 0, 1.0, 2, 0, 0, 9, 8, 0, 0, 0, 0]
    layer = view(index, values, gradient=gradient, structure=ConstantFanIn(), shape=(3, 4))
    choice = SRigL(end_step=9, ablation=0.3).choose(layer, Target(4, 6))
    mask = layer.mask() & False
    mask[layer.positions[choice.kept]] = True
    mask[choice.grown] = True
    assert mask.view(3, 4).int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    spared = SRigL(end_step=9, ablation=0.0).choose(layer, Target(4, 6))
    assert spared.grown.numel() + int(spared.kept.sum()) == 6


def test_srste_is_the_dense_network_with_straight_through_gradients():
    model = dense_storage(two_layers(NM(2, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule(model, optimizer, SRSTE(penalty=0.05))
    layers = [model[0], model[2]]
    weights, masks, buffers, biases = [], [], [], []
    for layer in layers:
        dense = torch.zeros(layer.pattern.numel, dtype=torch.float64)
        dense[entry_of(layer.index)] = layer.values.detach()
        weights.append(dense.view(layer.weight_shape))
        masks.append(layer.pattern.mask())
        buffers.append([torch.zeros_like(weights[-1]), torch.zeros_like(layer.bias)])
        biases.append(layer.bias.detach().clone())
    for number in range(5):
        masked = [(w * m).requires_grad_() for w, m in zip(weights, masks, strict=True)]
        bias = [b.clone().requires_grad_() for b in biases]
        generator = torch.Generator().manual_seed(number)
        x, y = (
            torch.randn(6, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (6,), generator=generator),
        )
        hidden = torch.tanh(nn.functional.linear(x, masked[0], bias[0]))
        nn.functional.cross_entropy(nn.functional.linear(hidden, masked[1], bias[1]), y).backward()
        for place in range(2):
            gradient = masked[place].grad + 0.05 * (~masks[place] * weights[place])
            buffers[place][0] = 0.9 * buffers[place][0] + gradient
            buffers[place][1] = 0.9 * buffers[place][1] + bias[place].grad
            weights[place] = weights[place] - 0.2 * buffers[place][0]
            biases[place] = biases[place] - 0.2 * buffers[place][1]
            masks[place] = NM(2, 4).project(weights[place].abs(), int(masks[place].sum()))
        step(model, optimizer, number)
        for layer, weight, mask in zip(layers, weights, masks, strict=True):
            assert torch.equal(layer.pattern.mask(), mask)
            torch.testing.assert_close(layer.dense_weight().detach(), weight * mask, rtol=0, atol=1e-12)


def test_topkast_rests_outside_of_b_and_regularises_the_rest():
    model = dense_storage(two_layers())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    masks = schedule(model, optimizer, TopKAST(delta_t=2, penalty=0.3, backward_sparsity=0.25))
    layer = model[0]
    for number in range(6):
        in_backward = masks.state_dict()["memory"]["0"]["backward"]
        before, forward = layer.values.detach().clone(), layer.index >= 0
        assert int(in_backward.sum()) == 96
        assert not (forward & ~in_backward).any()
        step(model, optimizer, number)
        assert torch.equal(layer.values[~in_backward], before[~in_backward])
        assert (layer.values[in_backward] != before[in_backward]).all()
        assert layer.pattern.nnz == 64
        if number % 2 == 0:
            assert (layer.index[layer.values.detach().abs().argsort(descending=True)[:64]] >= 0).all()

    rule = TopKAST(penalty=0.5)
    gradient = torch.ones(4, dtype=torch.float64)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    view_ = LayerView(
        name="layer", shape=(1, 4), structure=Unstructured(), index=torch.tensor([0, -3, -4, -5], dtype=torch.int32),
        slot_values=values, slot_gradient=gradient, memory={"backward": torch.tensor([True, True, False, False])},
    )  # fmt: skip
    rule.before_step(view_, scale=2.0)  # gradients twice as large: those of a gradient scaler
    assert gradient.tolist() == pytest.approx([1 + 2 * 0.5 * 1, 1 + 2 * 0.5 * 2 / 0.25, 0, 0])


def test_bame_swaps_what_is_expected_to_lower_the_loss_and_freezes_what_oscillates():
    # Mean magnitude 2: reviving entry 1 is worth 2·3 = 6, dropping entry 0 costs 1; in the second block nothing pays.
    layer = view([0, 4], [1.0, 3.0], gradient=[1.0, 3, 0, 0, 2, 1, 0, 0], structure=NM(1, 4))
    layout = layer.structure.layout(layer.shape)[..., 0]
    gain, swapped = swaps(layer, layout, layer.mask()[layout])
    assert gain.tolist() == [5.0, 0.0]
    assert swapped.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    rule = BAME(end_step=99, commit=1.0, freeze_after=2)
    memory, index, seen = {}, [0, 4], []
    for check in range(6):
        # The gradient calls for whatever the first block does not keep.
        gradient = [0.0] * 8
        gradient[1 - index[0]] = 5.0
        now = view(index, [1.0, 3.0], gradient=gradient, structure=NM(1, 4), memory=memory, step=check)
        choice = rule.choose(now, Target(2, 2))
        if choice.grown.numel():
            index = [int(choice.grown[0]), 4]
        seen.append(index[0])
    assert seen == [1, 0, 1, 0, 0, 0]
    assert memory["oscillations"].tolist() == [2, 0]


@pytest.mark.parametrize(("decay", "expected"), [("cosine", (8, 4, 1)), ("linear", (8, 4, 1)), ("constant", (8, 8, 8))])
def test_bame_changes_fewer_blocks_as_training_goes_on(decay, expected):
    # Sixteen blocks of four keep their first entry; in each of them entry 1 is worth more than entry 0 costs.
    gradient = [0.1, 5.0, 0.0, 0.0] * 16
    rule = BAME(end_step=100, commit=0.5, decay=decay)
    for step, changed in zip((0, 50, 99), expected, strict=True):
        layer = view(list(range(0, 64, 4)), [1.0] * 16, gradient=gradient, shape=(8, 8), structure=NM(1, 4), step=step)
        assert rule.choose(layer, Target(16, 16)).grown.numel() == changed


def test_bidst_scores_follow_the_implicit_gradient_and_the_mask_waits_for_enough_change():
    gradient = [0.1, -0.2, 0.3, 0, 0, 0, 0, -0.4]
    layer = view([0, 1], [1.0, -0.5], gradient=gradient)
    rule = BiDST(end_step=9, candidates=1.0, rate=0.5, gamma=2.0, change=0.0)
    members, scores = rule._learnt(layer)
    assert members.tolist() == [0, 1, 2, 7]
    weight = [1.0, -0.5, 0, 0]
    start = [1.0, 0.5, 0, 0]
    expected = [start[n] - 0.5 * (weight[n] - gradient[p] / 2) * gradient[p] for n, p in enumerate(members.tolist())]
    assert scores.tolist() == pytest.approx(expected)
    eager = BiDST(end_step=9, candidates=1.0, rate=4.0, gamma=2.0, change=0.4)
    choice = eager.choose(layer, Target(2, 2))
    assert choice.grown.tolist() == [7]
    waiting = view([0, 1], [1.0, -0.5], gradient=gradient)
    assert BiDST(end_step=9, candidates=1.0, rate=4.0, gamma=2.0, change=0.9).choose(waiting, Target(2, 2)).kept.all()
    assert waiting.memory["members"].tolist() == [0, 1, 2, 7]
    with pytest.raises(UserError, match="gamma must be above 0"):
        BiDST(end_step=1, gamma=0.0)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_snip_keeps_the_most_sensitive_connections_of_the_dense_network(scope):
    model = dense_storage(two_layers())
    layers = [model[0], model[2]]
    counts = [layer.pattern.nnz for layer in layers]
    weights = []
    for layer in layers:
        dense = torch.zeros(layer.pattern.numel, dtype=torch.float64)
        dense[entry_of(layer.index)] = layer.values.detach()
        weights.append(dense.view(layer.weight_shape).requires_grad_())
    batches = [torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith("index")}
    state = torch.get_rng_state()
    snip(model, batches, lambda module, x: module(x).square().sum(), scope=scope)
    assert torch.equal(state, torch.get_rng_state())
    for x in batches:
        hidden = torch.tanh(nn.functional.linear(x, weights[0], model[0].bias))
        nn.functional.linear(hidden, weights[1], model[2].bias).square().sum().backward()
    scores = [(weight.grad * weight).detach().abs() for weight in weights]
    if scope == "global":
        threshold = torch.cat([each.flatten() for each in scores]).topk(sum(counts)).values.min()
        expected = [each >= threshold for each in scores]
    else:
        expected = [each >= each.flatten().topk(count).values.min() for each, count in zip(scores, counts, strict=True)]
    for layer, mask in zip(layers, expected, strict=True):
        assert torch.equal(layer.pattern.mask(), mask)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    kept = [layer.pattern.nnz for layer in layers]
    y = model(batches[0])
    compact(model)
    assert [layer.values.numel() for layer in layers] == kept
    torch.testing.assert_close(model(batches[0]), y, rtol=0, atol=1e-12)


def test_snip_refuses_what_it_cannot_do():
    def loss(module, x):
        return module(x).sum()

    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(UserError, match=r"needs the dense weights of layer '0'.*sift\.dense_storage"):
        snip(two_layers(), [x], loss)
    with pytest.raises(UserError, match="found no sparse layer"):
        snip(nn.Linear(2, 2), [x], loss)
    with pytest.raises(UserError, match="got no batch"):
        snip(dense_storage(two_layers()), [], loss)
    with pytest.raises(UserError, match="is not finite"):
        snip(dense_storage(two_layers()), [x * float("nan")], loss)
    with pytest.raises(UserError, match=r'scope="global".*NM\(n=2, m=4\)'):
        snip(dense_storage(two_layers(NM(2, 4))), [x], loss, scope="global")
    with pytest.raises(UserError, match="Unknown scope 'all'"):
        snip(two_layers(), [x], loss, scope="all")


def test_storage_changes_neither_masks_nor_what_is_computed():
    model = two_layers(NM(2, 4))
    x = torch.randn(3, 8, dtype=torch.float64)
    y, masks = model(x), [model[0].pattern.mask(), model[2].pattern.mask()]
    dense_storage(model, seed=3)
    assert model[0].values.numel() == 128
    assert (model[0].values != 0).all()
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    compact(model)
    assert model[0].values.numel() == 64
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    for layer, mask in zip((model[0], model[2]), masks, strict=True):
        assert torch.equal(layer.pattern.mask(), mask)
    for convert in (dense_storage, compact):
        with pytest.raises(UserError, match="holds no sparse layer"):
            convert(nn.Linear(2, 2))


def test_storage_that_does_not_fit_the_method_is_refused():
    model = two_layers(NM(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"SRSTE needs dense storage.*holds 64 of 128.*sift\.dense_storage"):
        schedule(model, optimizer, SRSTE())
    dense_storage(model)
    with pytest.raises(UserError, match=r"RigL moves compact weights.*sift\.compact"):
        schedule(model, torch.optim.SGD(model.parameters(), lr=0.1), RigL(end_step=2))
    small = two_layers(NM(2, 4))
    with pytest.raises(UserError, match="exclude_just_dropped=True is not possible with NM"):
        schedule(small, torch.optim.SGD(small.parameters(), lr=0.1), RigL(end_step=2, exclude_just_dropped=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule(model, optimizer, SRSTE())
    with pytest.raises(UnsupportedError, match=r"SRSTE acts between the backward pass and the optimizer step"):
        optimizer.step(lambda: model(torch.randn(1, 8, dtype=torch.float64)).sum())


@pytest.mark.parametrize(
    "method",
    [
        GMP(delta_t=1, end_step=5, final_sparsity=0.9),
        MEST(delta_t=1, end_step=5, stages=((0, 0.2, 0.8),)),
        SNFS(delta_t=2, end_step=5),
        SRSTE(penalty=0.01),
    ],
    ids=lambda method: method.name,
)
def test_masks_of_any_method_move_without_compiling_again(method):
    def run(compiled):
        model = two_layers(NM(2, 4))
        if isinstance(method, SRSTE):
            dense_storage(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        masks = schedule(model, optimizer, method)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for number in range(6):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()
        assert masks.updates
        return model

    plain = run(compiled=False)
    torch._dynamo.reset()
    counters.clear()
    twin = run(compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_method_of_ones_own_is_set_until_it_changes_something():
    def run(method):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule(model, optimizer, method)
        for number in range(4):
            step(model, optimizer, number)
        return [layer.pattern.mask() for layer in (model[0], model[2])]

    options = {"delta_t": 1, "end_step": 3}
    for own, known in zip(run(DynamicMethod(**options)), run(SET(**options)), strict=True):
        assert torch.equal(own, known)


def test_a_pattern_counts_only_what_is_in_the_mask():
    pattern = Pattern((2, 4), torch.tensor([3, -1, -2, 0], dtype=torch.int32))
    assert (pattern.slots, pattern.nnz, pattern.sparsity) == (4, 2, 0.75)
    assert pattern.positions.tolist() == [3, 0]
