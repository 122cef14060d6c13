import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sift_compiler.errors import StaleArtifactError, UnsupportedError, UserError
from sift_compiler.masking import gradients
from sift_compiler.nn import MaskHook, SparseConv2d, SparseLinear
from sift_compiler.options import SET, RigL, Static
from sift_compiler.schedule import schedule


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(
        SparseConv2d(3, 8, 3, padding=1, sparsity=0.7, dtype=dtype),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        SparseLinear(32, 5, sparsity=0.5, dtype=dtype),
    )


def batch(step, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 3, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(0, 5, (size,), generator=generator)


def train(model, optimizer, steps, call=None):
    call = model if call is None else call
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(x), y).backward()
        optimizer.step()


def masks_of(model):
    return [layer.pattern.mask() for layer in model if hasattr(layer, "pattern")]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_weights_start_from_nothing_and_the_others_are_left(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    layer = model[4]
    masks = schedule(model, optimizer, RigL(delta_t=3, begin_step=2, end_step=3, drop_fraction=0.4))
    twin = network()
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    train(model, optimizer, range(3))
    train(twin, twin_optimizer, range(3))

    (update,) = masks.updates
    assert update.step == 2
    moved = layer.index != twin[4].index
    record = update.layers[1]
    assert int(moved.sum()) == record.dropped - record.regrown > 0
    assert record.name == "4"
    assert layer.values[moved].abs().sum() == 0
    assert torch.equal(layer.values[~moved], twin[4].values[~moved])
    tensors = [
        key for key, entry in optimizer.state[layer.values].items() if isinstance(entry, torch.Tensor) and entry.dim()
    ]
    assert len(tensors) == {"sgd": 0, "momentum": 1, "nesterov": 1, "adam": 3, "adamw": 2}[name]
    for key in tensors:
        mine, others = optimizer.state[layer.values][key], twin_optimizer.state[twin[4].values][key]
        assert mine[moved].abs().sum() == 0
        assert torch.equal(mine[~moved], others[~moved])
        assert others[moved].abs().sum() > 0


def test_grows_the_largest_dense_gradients_and_drops_the_smallest_weights():
    model = network(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer, dense = model[4], {}
    schedule(model, optimizer, RigL(delta_t=1, end_step=1, drop_fraction=0.25))
    before, twin = layer.pattern.mask(), copy.deepcopy(model)
    x, y = batch(0, dtype=torch.float64)
    weight = twin[4].dense_weight().detach().requires_grad_()
    nn.functional.cross_entropy(nn.functional.linear(twin[:4](x), weight, twin[4].bias), y).backward()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

    dense = (weight - 0.1 * weight.grad).detach() * before
    dropped = dense[before].abs().sort().values[: int(0.25 * layer.index.numel())]
    keep = before & (dense.abs() > dropped.max())
    score = weight.grad.abs().masked_fill(keep, -1)
    grown = torch.zeros_like(before).view(-1).index_fill_(0, score.view(-1).topk(dropped.numel()).indices, True)
    assert torch.equal(layer.pattern.mask(), keep | grown.view_as(keep))


@pytest.mark.parametrize("method", [RigL(delta_t=2, end_step=9), SET(delta_t=2, end_step=9), Static()])
def test_counts_are_exact_indices_stay_in_place_and_seeds_decide(method):
    def run(seed=0):
        model = network()
        counts = [layer.index.numel() for layer in (model[0], model[4])]
        pointer = model[0].index.data_ptr()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        masks = schedule(model, optimizer, type(method)(**{**vars(method), "seed": seed}))
        torch.manual_seed(torch.seed())
        state = torch.get_rng_state()
        for step in range(12):
            train(model, optimizer, [step])
            for layer, count in zip((model[0], model[4]), counts, strict=True):
                layer.pattern.check()
                assert layer.index.numel() == count
        assert model[0].index.data_ptr() == pointer
        assert torch.equal(state, torch.get_rng_state())
        return model, masks

    (model, masks), (again, _), (other, _) = run(), run(), run(seed=1)
    assert [update.step for update in masks.updates] == ([] if isinstance(method, Static) else [0, 2, 4, 6, 8])
    assert masks.step_count == 12
    same = [torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)]
    assert all(same)
    if isinstance(method, SET):
        assert not torch.equal(model[0].index, other[0].index)
    for update in masks.updates:
        assert update.grown == update.dropped
        assert 0 < update.iou <= 1


def test_iou_is_the_one_of_the_masks():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = schedule(model, optimizer, SET(delta_t=1, end_step=1))
    before = masks_of(model)
    train(model, optimizer, [0])
    for record, a, b in zip(masks.updates[0].layers, before, masks_of(model), strict=True):
        assert record.iou == pytest.approx(int((a & b).sum()) / int((a | b).sum()))


def test_accumulated_gradients_move_masks_as_one_big_batch_does():
    # float64: the two sums differ in rounding only, and no two scores are that close.
    big, small = network(dtype=torch.float64), network(dtype=torch.float64)
    x, y = batch(0, 8, torch.float64)
    for model, parts in ((big, 1), (small, 4)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule(model, optimizer, RigL(delta_t=1, end_step=2))
        for _ in range(2):
            optimizer.zero_grad()
            for chunk, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(chunk), target) / parts).backward()
            optimizer.step()
    for a, b in zip((big[0], big[4]), (small[0], small[4]), strict=True):
        assert torch.equal(a.pattern.mask(), b.pattern.mask())
        torch.testing.assert_close(a.dense_weight(), b.dense_weight(), rtol=0, atol=1e-12)


def test_several_parameter_groups():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[4].parameters(), "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=3))
    train(model, optimizer, range(3))
    assert len(masks.updates) == 3


@pytest.mark.parametrize("method", [RigL(delta_t=1, end_step=3), SET(delta_t=1, end_step=3)])
def test_no_mask_moves_on_numbers_that_are_not_finite(method, caplog):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = schedule(model, optimizer, method)
    before = [mask.clone() for mask in masks_of(model)]
    for _ in range(2):
        optimizer.zero_grad()
        (model(batch(0)[0]).sum() * float("nan")).backward()
        optimizer.step()
    assert masks.updates == []
    assert masks.skipped["not finite"] == 2
    assert masks.step_count == 2
    assert all(torch.equal(a, b) for a, b in zip(before, masks_of(model), strict=True))
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "NaN or infinity" in warnings[0].message


def test_a_layer_that_no_backward_pass_reached_rests(caplog):
    model = nn.ModuleDict({"used": SparseLinear(6, 4, sparsity=0.5), "unused": SparseLinear(6, 4, sparsity=0.5)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=5))
    before = model["unused"].index.clone()
    for _ in range(2):
        model["used"](torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    assert [layer.name for update in masks.updates for layer in update.layers] == ["used", "used"]
    assert masks.skipped["missing"] == 2
    assert torch.equal(before, model["unused"].index)
    assert sum("unused" in record.message and record.levelname == "WARNING" for record in caplog.records) == 1


def test_a_gradient_scaler_that_skips_a_step_skips_the_update_and_scale_does_not_matter():
    plain, scaled = network(dtype=torch.float64), network(dtype=torch.float64)
    for model in (plain, scaled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = schedule(model, optimizer, RigL(delta_t=1, end_step=2))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=model is scaled)
        for step in ("overflow", 0, 1) if model is scaled else (0, 1):
            x, y = batch(0 if step == "overflow" else step, dtype=torch.float64)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y) * (float("inf") if step == "overflow" else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert masks.step_count == 2
        assert len(masks.updates) == 2
    for a, b in zip(masks_of(plain), masks_of(scaled), strict=True):
        assert torch.equal(a, b)


def test_a_fused_step_that_the_scaler_leaves_out_does_not_count():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=5))
    scaler = torch.amp.GradScaler("cpu")
    before = model[0].index.clone()
    for factor, steps in ((float("inf"), 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(model(batch(0)[0]).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (masks.step_count, len(masks.updates)) == (steps, steps)
        assert torch.equal(before, model[0].index) == (steps == 0)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_replace_leaves_out_the_optimizer_step(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    masks = schedule(model, optimizer, RigL(delta_t=2, begin_step=1, end_step=2, skip_step="replace"))
    train(model, optimizer, [0])
    values, bias = model[4].values.clone(), model[4].bias.clone()
    state = copy.deepcopy(optimizer.state[model[4].bias])
    index = model[4].index.clone()
    train(model, optimizer, [1])
    assert len(masks.updates) == 1
    kept = index == model[4].index
    assert torch.equal(values[kept], model[4].values[kept])
    assert model[4].values[~kept].abs().sum() == 0
    assert torch.equal(bias, model[4].bias)
    assert str(state) == str(optimizer.state[model[4].bias])
    assert model[4].bias.grad is not None
    train(model, optimizer, [2])
    assert not torch.equal(bias, model[4].bias)


def test_replace_refuses_a_closure_and_keep_takes_it():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(batch(0)[0]).square().sum()
        loss.backward()
        return loss

    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=2, skip_step="replace"))
    with pytest.raises(UnsupportedError, match="closure"):
        optimizer.step(closure)
    masks.remove()
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=2))
    optimizer.step(closure)
    assert len(masks.updates) == 1


def test_an_optimizer_that_is_not_understood_is_refused_and_nothing_moves():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    masks = schedule(model, optimizer, SET(delta_t=1, end_step=3))
    before = [mask.clone() for mask in masks_of(model)]

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    first = model[0].values
    optimizer.state[first]["history"] = [torch.ones(2)]
    with pytest.raises(UnsupportedError, match="not known for this optimizer"):
        optimizer.step(closure)
    assert masks.updates == []
    assert all(torch.equal(a, b) for a, b in zip(before, masks_of(model), strict=True))


def test_a_mask_update_does_not_compile_again():
    torch._dynamo.reset()
    counters.clear()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=12, drop_fraction=0.5, decay="constant"))
    twin = network()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    schedule(twin, twin_optimizer, masks.method)
    train(model, optimizer, range(12), torch.compile(model, backend="aot_eager"))
    train(twin, twin_optimizer, range(12))
    assert len(masks.updates) == 12
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"]
    for a, b in zip(masks_of(model), masks_of(twin), strict=True):
        assert torch.equal(a, b)


def test_a_deep_copy_listens_for_itself():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=9))
    twin = copy.deepcopy(model)
    twin(batch(0)[0]).sum().backward()
    assert all(hook.probe._gradient is None for hook in model.modules() if isinstance(hook, MaskHook))
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin_masks = schedule(twin, twin_optimizer, masks.method)
    for one, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        train(one, its_optimizer, range(3))
    assert len(masks.updates) == len(twin_masks.updates) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="cannot be copied"):
        copy.deepcopy(masks)


def test_listeners_and_removal():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = schedule(model, optimizer, RigL(delta_t=1, end_step=9))
    heard = []
    stop = masks.on_update(heard.append)
    train(model, optimizer, [0])
    stop()
    train(model, optimizer, [1])
    assert heard == masks.updates[:1]
    with pytest.raises(UserError, match="Another mask scheduler"):
        schedule(model, optimizer, RigL(end_step=9))
    masks.remove()
    before = model[0].index.clone()
    train(model, optimizer, [2])
    assert masks.step_count == 2
    assert torch.equal(before, model[0].index)
    schedule(model, optimizer, SET(end_step=9)).remove()


def test_state_dict_has_the_same_keys_with_and_without_masks():
    model = network()
    keys = list(model.state_dict())
    schedule(model, torch.optim.SGD(model.parameters(), lr=0.1), RigL(end_step=9))
    assert list(model.state_dict()) == keys


def test_wrong_arguments_are_refused_with_what_to_do():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cases = [
        ((nn.Linear(2, 2), optimizer, Static()), UserError, "holds no sparse layer.*sift.rewrite"),
        ((model, torch.optim.SGD(network().parameters(), lr=0.1), SET(end_step=1)), UserError, "not parameters of the optimizer"),
        ((model, optimizer, "rigl"), UserError, "Unknown mask method.*RigL"),
        ((model, optimizer, RigL), UserError, r"method must be an object such as sift.RigL\(end_step"),
        ((model, None, Static()), UserError, "torch.optim.Optimizer, not NoneType"),
        ((None, optimizer, Static()), UserError, "torch.nn.Module, not NoneType"),
    ]  # fmt: skip
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            schedule(*arguments)


def test_shared_values_are_refused_and_frozen_layers_rest():
    model = network()
    tied = nn.ModuleList([SparseLinear(4, 4), SparseLinear(4, 4)])
    tied[1].values = tied[0].values
    with pytest.raises(UnsupportedError, match="'0' and '1' share their values"):
        schedule(tied, torch.optim.SGD(tied.parameters(), lr=0.1), SET(end_step=2))
    model[0].values.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    masks = schedule(model, optimizer, SET(delta_t=1, end_step=2))
    train(model, optimizer, [0])
    assert [layer.name for layer in masks.updates[0].layers] == ["4"]


def test_a_state_that_does_not_fit_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = schedule(model, optimizer, RigL(end_step=9, delta_t=1))
    train(model, optimizer, [0])
    state = masks.state_dict()
    other = nn.Sequential(SparseLinear(8, 8))
    others = schedule(other, torch.optim.SGD(other.parameters(), lr=0.1), RigL(end_step=9, delta_t=1))
    with pytest.raises(StaleArtifactError, match="Differing layers: 0, 4"):
        others.load_state_dict(state)
    twin = network()
    shorter = schedule(twin, torch.optim.SGD(twin.parameters(), lr=0.1), RigL(end_step=8, delta_t=1))
    with pytest.raises(UserError, match=r"moved by RigL\(.*end_step=9.*this scheduler is RigL\(.*end_step=8"):
        shorter.load_state_dict(state)
    for broken in ({}, {**state, "layers": None}, {**state, "updates": [{}]}, {**state, "format": 99}):
        with pytest.raises(StaleArtifactError):
            masks.load_state_dict(broken)
    assert masks.state_dict() == state


def test_conditions_of_layers():
    nan = torch.tensor([1.0, float("nan")])
    assert gradients.condition([torch.ones(2), None]) == "missing"
    assert gradients.condition([torch.ones(2), nan]) == "not finite"
    assert gradients.condition([torch.ones(2)]) == "usable"
    assert gradients.agreed(["usable"], torch.device("cpu")) == ["usable"]
