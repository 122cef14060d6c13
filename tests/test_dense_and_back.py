"""to_dense, dense_state_dict, densify and from_masked."""

import copy
import logging

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import prune

import sift_compiler as sift
from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.nn import MaskHook, SparseConv2d, SparseLayer, SparseLinear


class Convnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False)
        self.last = nn.Conv2d(16, 8, 3, stride=2)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.last(torch.relu(self.middle(x)))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def rewritten(seed=0):
    torch.manual_seed(seed)
    return sift.rewrite(Convnet(), torch.randn(2, 3, 9, 9), sift.SparseWide(sparsity=0.75))


def batch(step, size=4):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 9, 9, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def train(model, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def sparse_layers(model):
    return [one for one in model.modules() if isinstance(one, SparseLayer)]


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


# --- to_dense -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_dense_copy_computes_the_same_and_holds_nothing_sparse(training):
    model = rewritten()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    sift.schedule(model, optimizer, sift.RigL(delta_t=1, end_step=3))
    train(model, optimizer, range(3))
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    dense = sift.to_dense(model)

    assert not any(isinstance(one, SparseLayer | MaskHook) for one in dense.modules())
    assert "mask_hooks" not in dict(dense.named_children())
    assert "sift" not in dense.code
    for size in (1, 3) if not training else (3,):
        x = batch(9, size)[0]
        torch.testing.assert_close(dense(x), model(x), rtol=0, atol=1e-6)
    if not training:
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer):
            weight = dense.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            assert torch.equal(weight != 0, layer.pattern.mask() & (weight != 0))
            assert torch.equal(weight, layer.dense_weight())
            assert dense.get_submodule(name).bias is not layer.bias or layer.bias is None


def test_a_dense_copy_loads_into_the_plain_model_and_a_sparse_state_dict_too():
    torch.manual_seed(0)
    plain = Convnet()
    masks = {name: torch.rand(p.shape) < 0.4 for name, p in plain.named_parameters() if p.dim() > 1}
    sparse = sift.from_masked(plain, masks)
    assert len(sparse_layers(sparse)) == 5
    x = batch(0)[0]

    first, second = Convnet(), Convnet()
    first.load_state_dict(sift.to_dense(sparse).state_dict(), strict=True)
    second.load_state_dict(sift.dense_state_dict(sparse.state_dict(), second), strict=True)
    for model in (first, second):
        torch.testing.assert_close(model(x), sparse(x), rtol=0, atol=1e-6)
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name), plain.get_parameter(name) * mask)


def test_a_dense_copy_of_a_layer_of_dense_storage_and_of_empty_slots():
    layer = nn.Sequential(SparseLinear(7, 5, sparsity=0.6))
    sift.dense_storage(layer)
    assert int((layer[0].index < -1).sum()) == 21
    alone = sift.to_dense(layer[0])
    assert type(alone) is nn.Linear
    assert int((alone.weight != 0).sum()) == 14
    x = torch.randn(1, 7)
    torch.testing.assert_close(alone(x), layer(x), rtol=0, atol=1e-6)
    layer[0].index[:3] = -1
    torch.testing.assert_close(sift.to_dense(layer)(x), layer(x), rtol=0, atol=1e-6)
    state = sift.dense_state_dict(layer.state_dict(), nn.Sequential(nn.Linear(7, 5)))
    assert torch.equal(state["0.weight"], layer[0].dense_weight())


def test_what_cannot_be_made_dense_is_refused():
    with pytest.raises(UserError, match="no sparse layer"):
        sift.to_dense(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no sparse layer"):
        sift.dense_state_dict(nn.Linear(2, 2).state_dict(), nn.Linear(2, 2))
    tied = nn.Sequential(SparseLinear(4, 4), SparseLinear(4, 4))
    tied[1].values = tied[0].values
    with pytest.raises(UnsupportedError, match="share their values"):
        sift.to_dense(tied)
    layer = SparseLinear(6, 4, sparsity=0.5)
    with pytest.raises(UserError, match=r"must lie in \[0, 4\)"):
        sift.dense_state_dict(layer.state_dict(), nn.Linear(2, 2))
    with pytest.raises(UserError, match="has no weight"):
        sift.dense_state_dict(layer.state_dict(), nn.ReLU())
    with pytest.raises(UserError, match="12 values but 11"):
        sift.dense_state_dict({"values": layer.values, "index": layer.index[:11]}, nn.Linear(6, 4))


def test_hooks_of_the_user_go_along():
    model = nn.Sequential(SparseLinear(4, 3, sparsity=0.5))
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sift.schedule(model, optimizer, sift.RigL(end_step=10))
    sift.densify(model, optimizer)
    model(torch.randn(2, 4))
    assert seen == [1]
    handle.remove()
    model(torch.randn(2, 4))
    assert seen == [1]


# --- densify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_fine_tuning_keeps_what_was_learnt_and_trains_everything(name):
    model = rewritten()
    first, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizer = OPTIMIZERS[name]([{"params": first, "lr": 0.01}, {"params": rest}])
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    masks = sift.schedule(model, optimizer, sift.RigL(delta_t=1, end_step=100))
    train(model, optimizer, range(3))
    rates.step()
    x = batch(9)[0]
    expected = model.eval()(x)
    model.train()
    old = {path: (one, copy.deepcopy(optimizer.state[one.values])) for path, one in model.named_modules() if isinstance(one, SparseLayer)}  # fmt: skip
    places = [[id(one) for one in group["params"]] for group in optimizer.param_groups]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    assert sift.densify(model, optimizer) is model
    assert not sparse_layers(model)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-6)
    model.train()
    assert [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ] == options
    moved = {id(layer.values): model.get_submodule(path).weight for path, (layer, _) in old.items()}
    for group, place in zip(optimizer.param_groups, places, strict=True):
        for parameter, before in zip(group["params"], place, strict=True):
            assert parameter is moved.get(before, parameter)
            assert (before in moved) == (parameter is not None and id(parameter) != before)
    for path, (layer, state) in old.items():
        weight, mask = model.get_submodule(path).weight, layer.pattern.mask()
        for key, entry in state.items():
            now = optimizer.state[weight][key]
            if entry.dim() == 0:
                assert torch.equal(now, entry)
            else:
                assert now.shape == weight.shape
                assert torch.equal(now.view(-1)[layer.index.long()], entry)
                assert now[~mask].abs().sum() == 0
        assert layer.values not in optimizer.state

    updates = len(masks.updates)
    train(model, optimizer, range(3, 5))
    assert len(masks.updates) == updates == 3
    for path, (layer, _) in old.items():
        weight = model.get_submodule(path).weight
        trained = (weight.grad != 0) & ~layer.pattern.mask()  # a unit that never fires has no gradient
        assert trained.any()
        assert weight[trained].all()


def test_a_step_after_it_is_the_step_of_the_dense_model():
    model = rewritten().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_double = [tuple(t.double() if t.is_floating_point() else t for t in batch(step)) for step in range(3)]

    def step(network, opt, x, y):
        opt.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        opt.step()

    step(model, optimizer, *train_double[0])
    twin = sift.to_dense(model)
    own = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for (name, parameter), sparse in zip(twin.named_parameters(), model.parameters(), strict=True):
        buffer = optimizer.state[sparse]["momentum_buffer"]
        if sparse.shape != parameter.shape:
            layer = model.get_submodule(name.rpartition(".")[0])
            buffer = torch.zeros_like(parameter).view(-1).index_copy(0, layer.index.long(), buffer).view_as(parameter)
        own.state[parameter]["momentum_buffer"] = buffer.detach().clone()
    sift.densify(model, optimizer)
    for x, y in train_double[1:]:
        step(model, optimizer, x, y)
        step(twin, own, x, y)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_densify_without_an_optimizer_refuses_a_running_schedule_and_changes_nothing():
    model = rewritten()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    masks = sift.schedule(model, optimizer, sift.RigL(delta_t=1, end_step=9))
    with pytest.raises(UserError, match="Pass its optimizer"):
        sift.densify(model)
    with pytest.raises(UserError, match="not parameters of the optimizer"):
        sift.densify(model, torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1))
    optimizer.state[sparse_layers(model)[-1].values]["history"] = [1]
    with pytest.raises(UnsupportedError, match="not known for this optimizer"):
        sift.densify(model, optimizer)
    assert sparse_layers(model)
    optimizer.state.clear()
    train(model, optimizer, range(2))
    assert len(masks.updates) == 2
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    with pytest.raises(UnsupportedError, match="wrap the result again"):
        sift.densify(wrapper, optimizer)
    masks.remove()
    sift.densify(model)
    assert not sparse_layers(model)


def test_a_schedule_over_more_than_the_module_is_not_ended_by_half():
    pair = nn.ModuleList([nn.Sequential(SparseLinear(4, 4, sparsity=0.5)) for _ in range(2)])
    optimizer = torch.optim.SGD(pair.parameters(), 0.1)
    masks = sift.schedule(pair, optimizer, sift.SET(delta_t=1, end_step=5))
    with pytest.raises(UserError, match="outside this module"):
        sift.densify(pair[0], optimizer)
    assert len(sparse_layers(pair)) == 2
    masks.remove()
    sift.densify(pair[0], optimizer)
    assert len(sparse_layers(pair)) == 1
    assert optimizer.param_groups[0]["params"][0].shape == (4, 4)


@pytest.mark.parametrize("backend", ["aot_eager", "sift"])
def test_a_compiled_model_becomes_dense_too(backend):
    torch._dynamo.reset()
    options = {"options": {"runtime": "eager", "rest": "eager"}} if backend == "sift" else {}
    model = rewritten()
    compiled = torch.compile(model, backend=backend, **options)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    sift.schedule(model, optimizer, sift.RigL(delta_t=1, end_step=9))
    train(compiled, optimizer, range(2))
    assert sift.densify(compiled, optimizer) is compiled
    twin = copy.deepcopy(model)
    own = OPTIMIZERS["momentum"](twin.parameters())
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(compiled, optimizer, range(2, 4))
    train(twin, own, range(2, 4))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) > 2 * sum(p.numel() for p in rewritten().parameters())


def test_it_is_saved_and_resumed_exactly(tmp_path):
    def begun():
        model = rewritten()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        sift.schedule(model, optimizer, sift.RigL(delta_t=1, end_step=9))
        train(model, optimizer, range(2))
        sift.densify(model, optimizer)
        train(model, optimizer, range(2, 3))
        return model, optimizer

    model, optimizer = begun()
    sift.save(model, tmp_path / "dense.pt2", optimizer=optimizer)
    train(model, optimizer, range(3, 5))
    checkpoint = sift.load_checkpoint(tmp_path / "dense.pt2")
    resumed = checkpoint.module
    assert isinstance(resumed, fx.GraphModule)
    again = OPTIMIZERS["adamw"](resumed.parameters())
    checkpoint.restore(optimizer=again)
    train(resumed, again, range(3, 5))
    expected = model.state_dict()
    assert set(resumed.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    report = sift.report(model, model, torch.randn(2, 3, 9, 9))
    assert all(layer.sparsity == 0 for layer in report.layers)


# --- from_masked ----------------------------------------------------------------------------------------------------


def pruned():
    torch.manual_seed(0)
    model = Convnet()
    for path, amount in (("stem", 0.3), ("middle", 0.6), ("hidden", 0.5)):
        prune.l1_unstructured(model.get_submodule(path), "weight", amount)
    prune.random_unstructured(model.hidden, "weight", 0.2)
    prune.random_unstructured(model.hidden, "bias", 4)
    return model


def test_a_model_pruned_by_torch_becomes_sparse_and_computes_the_same(caplog):
    model = pruned()
    x = batch(0)[0]
    model(x)
    keys = list(model.state_dict())
    with caplog.at_level(logging.WARNING):
        sparse = sift.from_masked(model)
    assert "4 masked bias entries" in caplog.text
    assert list(model.state_dict()) == keys
    assert [type(one) for one in (sparse.stem, sparse.middle, sparse.hidden, sparse.head)] == [
        SparseConv2d, SparseConv2d, SparseLinear, nn.Linear,
    ]  # fmt: skip
    torch.testing.assert_close(sparse(x), model(x), rtol=0, atol=1e-6)
    for path in ("stem", "middle", "hidden"):
        assert torch.equal(sparse.get_submodule(path).pattern.mask(), model.get_submodule(path).weight_mask != 0)
    assert not any(name.endswith(("_orig", "_mask")) for name in sparse.state_dict())
    optimizer = OPTIMIZERS["adamw"](sparse.parameters())
    masks = sift.schedule(sparse, optimizer, sift.RigL(delta_t=1, end_step=4))
    train(sparse, optimizer, range(3))
    assert len(masks.updates) == 3


def test_an_optimizer_goes_on_with_the_kept_weights():
    model = pruned()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, range(2))
    masks = {path: model.get_submodule(path).weight_mask.bool() for path in ("stem", "middle", "hidden")}
    states = {path: copy.deepcopy(optimizer.state[model.get_submodule(path).weight_orig]) for path in masks}
    x = batch(9)[0]
    expected = model.eval()(x)
    model.train()
    assert sift.from_masked(model, optimizer=optimizer) is model
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-6)
    model.train()
    parameters = {id(one) for one in model.parameters()}
    assert {id(one) for group in optimizer.param_groups for one in group["params"]} == parameters
    for path, mask in masks.items():
        state = optimizer.state[model.get_submodule(path).values]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], states[path][key][mask])
    train(model, optimizer, range(2, 4))
    with pytest.raises(UserError, match="not parameters of the optimizer"):
        sift.from_masked(pruned(), optimizer=optimizer)


def test_one_layer_and_one_weight():
    torch.manual_seed(0)
    linear, mask = nn.Linear(7, 5), torch.rand(5, 7) < 0.4
    mask[2] = False
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    layer = sift.from_masked(linear, mask)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(layer, SparseLinear)
    assert not layer.values.requires_grad
    x = torch.randn(1, 7)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, linear.weight * mask, linear.bias), rtol=0, atol=1e-6)
    weight = torch.randn(5, 7, dtype=torch.float64)
    weight[0, :3] = 0
    mask[0, :3] = True
    bare = sift.from_masked(weight, mask.int())
    assert bare.bias is None
    assert torch.equal(bare.pattern.mask(), mask)  # a kept zero is kept
    assert torch.equal(bare.dense_weight(), weight * mask)
    empty = sift.from_masked(linear, torch.zeros(5, 7))
    torch.testing.assert_close(empty(x), linear.bias[None], rtol=0, atol=1e-6)
    pairs = torch.tensor([[1, 1, 0, 0]]).repeat(3, 2)
    layer = sift.from_masked(nn.Conv2d(8, 3, 1), pairs[..., None, None], structure=sift.NM(2, 4))
    assert layer.structure == sift.NM(2, 4)
    with pytest.raises(UserError):
        sift.from_masked(nn.Linear(8, 3), torch.ones(3, 8), structure=sift.NM(2, 4))


def test_masks_that_do_not_fit_are_refused():
    model, full = Convnet(), torch.ones(16, 8)
    half = full.clone()
    half[0, 0] = 0.5
    cases = [
        (UserError, "no masked weight", model, None),
        (UserError, "no masked weight", model, {"hidden.bias": torch.ones(16)}),
        (UserError, "Unknown parameter 'hiden.weight'. Did you mean 'hidden.weight'", model, {"hiden.weight": full}),
        (UserError, "has shape \\(8, 16\\); the parameter has \\(16, 8\\)", model, {"hidden.weight": full.t()}),
        (UserError, "holds 0.5", model, {"hidden.weight": half}),
        (UserError, "holds nan", model, {"hidden.weight": full * float("nan")}),
        (UserError, "must be a tensor, not list", model, {"hidden.weight": [1, 0]}),
        (UserError, "by parameter name", model, full),
        (UserError, "dictionary by parameter name", model, [full]),
        (UserError, "masked twice", pruned(), {"hidden.weight": full}),
        (UnsupportedError, "'norm.weight' belongs to BatchNorm2d", model, {"norm.weight": torch.ones(8), "hidden.weight": full}),
        (UserError, "Pass the nn.Conv2d", torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 1)),
        (UserError, "a layer, a weight or a model", "model", None),
    ]  # fmt: skip
    for error, message, target, masks in cases:
        with pytest.raises(error, match=message):
            sift.from_masked(target, masks)
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(UnsupportedError, match="NonDynamicallyQuantizableLinear"):
        sift.from_masked(attention, {"out_proj.weight": torch.ones(4, 4)})
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(UnsupportedError, match="shared with another"):
        sift.from_masked(tied, {"0.weight": torch.ones(4, 4)})
    nn.utils.parametrizations.weight_norm(tied[1])
    with pytest.raises(UserError, match="Unknown parameter"):
        sift.from_masked(tied, {"1.weight": torch.ones(4, 4)})
    assert not sparse_layers(model)
