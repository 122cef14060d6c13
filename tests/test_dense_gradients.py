"""Dense gradients, one layer at a time: what is held of them, for how long, and that masks are those of the whole gradients."""

import copy
import gc
import itertools

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from sift_compiler.errors import UserError
from sift_compiler.ir.entries import Entries
from sift_compiler.ir.mask_structure import NM, Block, Channel, ConstantFanIn, TransposableNM, Unstructured
from sift_compiler.masking.bame import BAME
from sift_compiler.masking.bidst import BiDST
from sift_compiler.masking.gradual import GraNet
from sift_compiler.masking.snfs import SNFS
from sift_compiler.masking.srigl import SRigL
from sift_compiler.nn import SparseConv2d, SparseLinear, reference
from sift_compiler.options import RigL
from sift_compiler.schedule import MaskScheduler, schedule

WHEN = {"delta_t": 1, "end_step": 9}
METHODS = {
    "rigl": RigL(**WHEN, drop_fraction=0.5),
    "granet": GraNet(**WHEN, final_sparsity=0.95),
    "bame": BAME(**WHEN, adapt_from=3, drop_fraction=0.5, commit=1.0),
    "bidst": BiDST(**WHEN, change=0.0, rate=50.0, noise=0.1),
}
WHOLE = {"snfs": SNFS(**WHEN), "srigl": SRigL(**WHEN)}
STRUCTURES = {str(each): each for each in (Unstructured(), NM(2, 8), Block(2, 4), ConstantFanIn(), Channel())}
TOGETHER = [
    (method, structure)
    for method, structure in itertools.product(METHODS, STRUCTURES)
    if method == "rigl"
    or structure == "NM(n=2, m=8)"
    or (structure == "Unstructured()" and method in ("granet", "bidst"))
]


def network(structure=None, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    more = {"sparsity": 0.85, "structure": structure or Unstructured(), "dtype": dtype}
    return nn.Sequential(
        SparseConv2d(8, 16, 3, padding=1, **more),
        nn.ReLU(),
        SparseConv2d(16, 24, 3, padding=1, **more),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        SparseLinear(96, 8, **more),
    )


def layers_of(model):
    return [each for each in model.modules() if isinstance(each, SparseConv2d | SparseLinear)]


def data(step, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 8, 7, 7, generator=generator, dtype=dtype)
    return x, torch.randint(0, 8, (size,), generator=generator)


def train(model, optimizer, steps, *, call=None, chunks=1, ties=False):
    for step in steps:
        x, y = data(step)
        # With ties most dense gradients are 0, of dropped, active and free entries alike.
        x = x.clamp(max=0) * (x > 1) if ties else x
        optimizer.zero_grad()
        for part, target in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            (nn.functional.cross_entropy((call or model)(part), target) / chunks).backward()
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.fixture
def whole(monkeypatch):
    """Makes schedulers hold whole dense gradients, as if nothing were known of how many passes there are."""

    def hold():
        monkeypatch.setattr(MaskScheduler, "_known_passes", lambda self, accumulates: [0] * len(self._layers))

    return hold


def held_of(masks):
    return [one.hook.probe._gradient for one in masks._layers]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("method", "structure"), TOGETHER)
def test_masks_are_those_of_the_whole_gradients(method, structure, ties, whole):
    def run():
        model = network(STRUCTURES[structure])
        optimizer = adam(model)
        masks = schedule(model, optimizer, METHODS[method])
        train(model, optimizer, range(9), ties=ties)
        return model, masks

    one_by_one, masks = run()
    assert all(each.hook.probe.most == 1 for each in masks._layers)
    whole()
    together, expected = run()
    assert [update.layers for update in masks.updates] == [update.layers for update in expected.updates]
    assert same(one_by_one, together)
    for kept, other in zip(masks._memory.values(), expected._memory.values(), strict=True):
        assert kept.keys() == other.keys()
        assert all(torch.equal(kept[key], other[key]) for key in kept)


@pytest.mark.parametrize(("exclude", "ties"), list(itertools.product([False, True], repeat=2)))
def test_masks_without_just_dropped_weights_are_those_of_the_whole_gradients(exclude, ties):
    def run(accumulates):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = RigL(**WHEN, drop_fraction=0.5, exclude_just_dropped=exclude, accumulates=accumulates)
        masks = schedule(model, optimizer, method)
        train(model, optimizer, range(6), ties=ties)
        assert len(masks.updates) == 6
        return model

    always, never, learnt = run(True), run(False), run(None)
    assert same(always, never)
    assert same(always, learnt)


def living():
    """Tensors of numbers that live, by identity; all are kept alive by the answer, so that no identity is given twice."""
    gc.collect()
    return {id(each): each for each in gc.get_objects() if type(each) is torch.Tensor and each.is_floating_point()}


def dense_sized(shapes, others):
    """Tensors of numbers that live, are of a dense weight's size, and are none of `others`."""
    sizes = {shape.numel() for shape in shapes}
    return [each.shape for key, each in living().items() if each.numel() in sizes and key not in others]


class Watch:
    """Counts the dense gradients that live."""

    def __init__(self, monkeypatch):
        self.alive, self.most = [], 0
        for name in ("conv2d_weight_gradient", "linear_weight_gradient"):
            monkeypatch.setattr(reference, name, self._watched(getattr(reference, name)))

    def _watched(self, make):
        def watched(*arguments):
            self.count()
            made = make(*arguments)
            self.alive.append(StorageWeakRef(made.untyped_storage()))
            self.most = max(self.most, self.count())
            return made

        return watched

    def count(self):
        self.alive = [each for each in self.alive if not each.expired()]
        return len(self.alive)


@pytest.mark.parametrize(
    ("method", "structure", "compiled"),
    [
        ("rigl", "Unstructured()", False),
        ("rigl", "Unstructured()", True),
        ("granet", "Unstructured()", False),
        ("bidst", "Unstructured()", False),
        ("bame", "NM(n=2, m=8)", False),
        ("bame", "NM(n=2, m=8)", True),
    ],
)
def test_never_are_there_dense_gradients_of_two_layers(method, structure, compiled, monkeypatch):
    torch._dynamo.reset()
    others = living()  # of other tests in this process
    model = network(STRUCTURES[structure])
    optimizer = adam(model)
    masks = schedule(model, optimizer, METHODS[method])
    call = torch.compile(model, backend="sift", options={"rest": "eager"}) if compiled else model
    train(model, optimizer, [0], call=call)  # until the first step nobody knows how many backward passes make one
    watch = Watch(monkeypatch)
    shapes = {torch.Size(layer.weight_shape) for layer in layers_of(model)}
    for step in range(1, 5):
        x, y = data(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(x), y).backward()
        assert watch.count() == 0
        held = held_of(masks)
        assert all(isinstance(each, Entries) for each in held)
        assert 2 * sum(each.places.numel() for each in held) < sum(each.numel for each in held)
        assert dense_sized(shapes, others) == []
        optimizer.step()
        assert watch.most == 1
    assert [update.step for update in masks.updates] == list(range(5))


def test_one_pass_that_is_promised_needs_no_first_step(monkeypatch):
    watch = Watch(monkeypatch)
    model = network()
    optimizer = adam(model)
    masks = schedule(model, optimizer, RigL(**WHEN, accumulates=False))
    train(model, optimizer, range(3))
    assert watch.most == 1
    assert len(masks.updates) == 3


@pytest.mark.parametrize("method", WHOLE)
def test_methods_that_rank_all_entries_hold_them_until_the_step(method, monkeypatch):
    model = network(ConstantFanIn())
    optimizer = adam(model)
    schedule(model, optimizer, WHOLE[method])
    watch = Watch(monkeypatch)
    train(model, optimizer, range(3))
    assert watch.most == 3
    assert watch.count() == 0


def test_transposable_masks_rank_all_entries_too():
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(16, 8, sparsity=0.6, structure=TransposableNM(2, 4)))
    optimizer = adam(model)
    masks = schedule(model, optimizer, METHODS["rigl"])
    for _ in range(2):
        model(torch.randn(3, 16)).square().sum().backward()
        held = held_of(masks)
        optimizer.step()
    assert held[0].shape == (8, 16)
    assert len(masks.updates) == 2


def test_accumulated_gradients_are_reduced_in_the_last_pass_known_of(monkeypatch):
    model = network()
    optimizer = adam(model)
    masks = schedule(model, optimizer, METHODS["rigl"])
    train(model, optimizer, [0], chunks=2)
    watch = Watch(monkeypatch)
    x, y = data(1)
    for place, (part, target) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        nn.functional.cross_entropy(model(part), target).backward()
        assert watch.count() == (3 if place == 0 else 0)
    optimizer.step()
    assert len(masks.updates) == 2


@pytest.mark.parametrize("chunks", [(1, 1, 2, 2), (2, 2, 1, 2, 2), (4, 1, 4)])
def test_passes_that_vary_move_masks_as_sums_do(chunks, whole):
    """Fewer passes leave a sum that is taken as it is. With more than ever the mask rests, once."""

    def run():
        model = network()
        optimizer = adam(model)
        masks = schedule(model, optimizer, METHODS["rigl"])
        for step, count in enumerate(chunks):
            train(model, optimizer, [step], chunks=count)
        return model, masks

    model, masks = run()
    more = sum(count > max(chunks[:step]) for step, count in enumerate(chunks) if step)
    assert masks.skipped["missing"] == 3 * more
    assert len(masks.updates) == len(chunks) - more
    if not more:
        whole()
        assert same(model, run()[0])


def test_a_layer_called_twice_counts_its_passes(whole):
    def run():
        torch.manual_seed(0)
        model = nn.ModuleList([SparseLinear(8, 8, sparsity=0.7), SparseLinear(8, 8, sparsity=0.7)])
        optimizer = adam(model)
        masks = schedule(model, optimizer, METHODS["rigl"])
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            model[0](model[1](model[0](x)).tanh()).square().sum().backward()
            optimizer.step()
        assert len(masks.updates) == 4
        return model, masks

    model, masks = run()
    assert [one.passes for one in masks._layers] == [(2, 2), (1, 1)]
    whole()
    assert same(model, run()[0])


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("accumulates", [None, False])
def test_a_step_that_a_gradient_scaler_leaves_out_is_not_added(set_to_none, accumulates):
    def run(overflows):
        model = network(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = schedule(model, optimizer, RigL(**WHEN, accumulates=accumulates))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in (0, 1, "overflow", "overflow", 2, 3) if overflows else range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            # All but the last layer have finite gradients, which must not be added to those of the next step.
            x, y = data(9 if step == "overflow" else step, dtype=torch.float64)
            loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if step == "overflow":
                model[5].bias.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
        assert len(masks.updates) == 4
        assert {one.passes for one in masks._layers} == {(1, 1)}
        return model

    for a, b in zip(layers_of(run(True)), layers_of(run(False)), strict=True):
        assert torch.equal(a.pattern.mask(), b.pattern.mask())


def test_gradients_that_are_not_finite_are_let_go_at_once():
    model = network()
    optimizer = adam(model)
    masks = schedule(model, optimizer, METHODS["rigl"])
    train(model, optimizer, [0])
    (model(data(1)[0]).sum() * float("nan")).backward()
    assert [(each.finite, each.places.numel()) for each in held_of(masks)] == [(False, 0)] * 3
    optimizer.step()
    assert masks.skipped["not finite"] == 1
    assert len(masks.updates) == 1


def test_a_second_backward_pass_is_refused_where_none_was_promised():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule(model, optimizer, RigL(delta_t=1, end_step=2, accumulates=False))
    model(data(0)[0]).sum().backward()
    with pytest.raises(UserError, match=r"second backward pass.*accumulates=False"):
        model(data(1)[0]).sum().backward()
    with pytest.raises(UserError, match="None, False or True"):
        RigL(end_step=2, accumulates="never")


def test_how_gradients_are_held_does_not_keep_a_state_from_loading():
    model = network()
    optimizer = adam(model)
    masks = schedule(model, optimizer, RigL(**WHEN, accumulates=True))
    train(model, optimizer, range(2))
    state = copy.deepcopy(masks.state_dict())
    masks.remove()
    resumed = schedule(model, optimizer, RigL(**WHEN))
    resumed.load_state_dict(state)
    assert resumed.step_count == 2


def test_entries_of_a_dense_tensor():
    dense = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    some = Entries.of(dense, torch.tensor([3, 0]))
    assert some.dense().tolist() == [1.0, 0.0, 0.0, 0.5]
    assert some.places.dtype == torch.int32
    nothing = Entries.of(dense / 0 * 0, torch.tensor([3, 0]))
    assert not nothing.finite
    assert nothing.places.numel() == 0
