"""A scale that grows, falls and skips steps moves the same masks as none: scales are powers of two, so numbers are equal to the last bit."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import sift_compiler as sift
from sift_compiler.errors import UserError
from sift_compiler.ir.mask_structure import NM, ConstantFanIn, Unstructured
from sift_compiler.loss_scale import LossScale
from sift_compiler.masking import gradients, methods
from sift_compiler.nn import SparseLinear

WHEN = {"delta_t": 2, "end_step": 20}
MOVES = {**WHEN, "drop_fraction": 0.4}
NM_2_4 = NM(2, 4)


@dataclass(frozen=True, kw_only=True)
class Threshold(sift.DynamicMethod):
    """One of a user's own: weights whose gradient is above a fixed size come first."""

    needs_dense_gradient: ClassVar[bool] = True

    def grow_scores(self, layer, candidates):
        return (layer.dense_gradient[candidates].abs() > 0.01).double()


@dataclass(frozen=True, kw_only=True)
class Heedless(sift.SNFS):
    """What would become of SNFS if nobody cared."""

    uses_gradient_size: ClassVar[bool] = False


METHODS = {
    "set": (sift.SET(**MOVES), Unstructured()),
    "rigl": (sift.RigL(**MOVES), Unstructured()),
    "rigl replaces": (sift.RigL(**MOVES, skip_step="replace"), Unstructured()),
    "snfs": (sift.SNFS(**MOVES), Unstructured()),
    "gmp": (sift.GMP(**WHEN, final_sparsity=0.8), Unstructured()),
    "granet": (sift.GraNet(**MOVES, final_sparsity=0.8), Unstructured()),
    "mest": (sift.MEST(**MOVES, gradient_weight=5.0), Unstructured()),
    "srigl": (sift.SRigL(**MOVES), ConstantFanIn()),
    "srste": (sift.SRSTE(penalty=0.1), NM_2_4),
    "topkast": (sift.TopKAST(delta_t=2, penalty=0.1), Unstructured()),
    "bame": (sift.BAME(**MOVES, adapt_from=3, commit=1.0), NM_2_4),
    "bidst": (sift.BiDST(**WHEN, change=0.0, rate=2.0, gamma=0.5), Unstructured()),
    "own": (Threshold(**MOVES), Unstructured()),
}
SIZED = ["snfs", "bidst", "own"]


def network(method, structure, dtype):
    torch.manual_seed(0)
    more = {"sparsity": 0.5, "structure": structure, "dtype": dtype}
    model = nn.Sequential(SparseLinear(12, 16, **more), nn.ReLU(), SparseLinear(16, 4, **more))
    return sift.dense_storage(model) if methods.rule_of(method).storage == "dense" else model


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    dtype = model[0].values.dtype
    x = torch.randn(6, 12, generator=generator, dtype=dtype)
    return nn.functional.cross_entropy(model(x), torch.randint(4, (6,), generator=generator))


def optimizer_of(model, kind, fused):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    return kind(model.parameters(), lr=0.05, fused=fused, **options)


def everything(model, optimizer, masks):
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        found.update({f"optimizer.{number}.{name}": each for name, each in entry.items() if each is not None})
    for layer, kept in masks.state_dict()["memory"].items():
        found.update({f"memory.{layer}.{name}": tensor for name, tensor in kept.items()})
    return copy.deepcopy(found)


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))]


def trained(name, *, scaled, kind=torch.optim.SGD, fused=False, dtype=torch.float64, parts=1, clip=None, steps=11):
    """``steps`` steps; if ``scaled`` two overflow and are skipped besides, and the scale doubles after every two that do not."""
    method, structure = (Heedless(**MOVES), Unstructured()) if name == "heedless" else METHODS[name]
    model = network(method, structure, dtype)
    optimizer = optimizer_of(model, kind, fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2, enabled=scaled)
    masks = sift.schedule(model, optimizer, method, scaler=None if name == "heedless" else scaler)
    order = [(step, 1.0) for step in range(steps)]
    if scaled:
        # Fused optimizers make their state on a first step that is skipped, too, and SGD does not fill its momentum then.
        first = int(fused)
        order = [*order[:first], (99, float("inf")), *order[first:5], (98, float("nan")), *order[5:]]
    scales = []
    for step, factor in order:
        optimizer.zero_grad()
        before = everything(model, optimizer, masks)
        scales.append(scaler.get_scale())
        for part in range(parts):
            scaler.scale(loss_of(model, 10 * step + part) * factor / parts).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if factor != 1:
            assert differing(before, everything(model, optimizer, masks)) == []
            assert masks.step_count == sum(each == 1 for _, each in order[: len(scales) - 1])
    assert len(set(scales)) > 3 if scaled else set(scales) == {1.0}
    assert masks.step_count == steps
    assert len(masks.updates) == (1 if name in ("srste", "topkast") else 6)
    assert masks.skipped == {"missing": 0, "not finite": 0}
    return everything(model, optimizer, masks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_masks_weights_and_memories_are_those_of_the_run_without_a_scaler(name, dtype):
    fresh = network(*METHODS[name], dtype).state_dict()
    plain = trained(name, scaled=False, dtype=dtype)
    assert not torch.equal(plain["model.0.index"], fresh["0.index"])
    assert differing(plain, trained(name, scaled=True, dtype=dtype)) == []


@pytest.mark.parametrize("name", [*SIZED, "mest", "srste", "topkast", "rigl"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers_too(name, kind):
    plain, scaled = (trained(name, scaled=scaled, kind=kind, fused=True) for scaled in (False, True))
    assert differing(plain, scaled) == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [*SIZED, "mest"])
def test_clipping_and_accumulation_too(name, fused):
    plain, scaled = (
        trained(name, scaled=scaled, fused=fused, kind=torch.optim.AdamW, parts=2, clip=0.05)
        for scaled in (False, True)
    )
    assert differing(plain, scaled) == []


def test_these_runs_tell_a_scale_that_is_not_divided_by():
    plain, heedless = trained("snfs", scaled=False), trained("heedless", scaled=True)
    assert "model.0.index" in differing(plain, heedless)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", SIZED)
def test_a_scaler_that_is_not_passed_is_noticed_before_anything_changes(name, unscaled, fused):
    method, structure = METHODS[name]
    model = network(method, structure, torch.float64)
    optimizer = optimizer_of(model, torch.optim.AdamW, fused)
    masks = sift.schedule(model, optimizer, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = everything(model, optimizer, masks)
    scaler.scale(loss_of(model, 0)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(UserError, match=r"scaler=scaler"):
        scaler.step(optimizer)
    assert differing(before, everything(model, optimizer, masks)) == []


@pytest.mark.parametrize("name", SIZED)
def test_a_disabled_scaler_need_not_be_passed(name):
    method, structure = METHODS[name]
    model = network(method, structure, torch.float64)
    optimizer = optimizer_of(model, torch.optim.SGD, False)
    masks = sift.schedule(model, optimizer, method)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert len(masks.updates) == 1


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SIZED])
def test_other_methods_rank_and_need_no_scaler(name):
    method, structure = METHODS[name]
    model = network(method, structure, torch.float64)
    optimizer = optimizer_of(model, torch.optim.SGD, False)
    masks = sift.schedule(model, optimizer, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert masks.step_count == 1


def test_every_method_is_tried_and_its_kind_is_known():
    assert {type(method) for method, _ in METHODS.values()} == {*methods.METHODS.values(), Threshold} - {sift.Static}
    rules = {name: methods.rule_of(method) for name, (method, _) in METHODS.items()}
    assert [name for name, rule in rules.items() if rule.needs_dense_gradient and rule.uses_gradient_size] == SIZED


def test_what_half_precision_holds_only_scaled_is_not_lost():
    small = torch.full((3,), 2.0**-20, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(gradients.unscaled((small * 2**16).to(dtype), 2.0**16).double(), small)
    wide = torch.randn(5, dtype=torch.float64)
    assert gradients.unscaled(wide, 1.0) is wide
    assert torch.equal(gradients.unscaled(wide, 2.0), wide / 2)


@pytest.mark.parametrize("scaler", [1024.0, "dynamic", torch.amp.GradScaler, object()])
def test_what_is_no_scaler_is_refused(scaler):
    method, structure = METHODS["snfs"]
    model = network(method, structure, torch.float64)
    with pytest.raises(UserError, match="scaler must be"):
        sift.schedule(model, optimizer_of(model, torch.optim.SGD, False), method, scaler=scaler)


def test_gradients_of_a_fused_optimizer_are_scaled_until_its_step():
    parameter = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for fused, scale in ((True, 8.0), (False, 1.0)):
        known = LossScale(torch.optim.SGD([parameter], lr=0.1, fused=fused), scaler)
        assert (known.of_gradients(before_step=True), known.of_gradients(), known.of_dense_gradients()) == (scale, 1, 8)
