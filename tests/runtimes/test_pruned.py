"""Models pruned elsewhere, under torch.compile(backend="sift"): what is taken, why not, and weights that change afterwards."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sift_compiler import dynamo
from sift_compiler.runtimes import pruned
from sift_compiler.runtimes.pruned import PrunedReport

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def sparse_is_faster(monkeypatch):
    monkeypatch.setattr(pruned, "_times", lambda *runs: tuple(run() is None or 1.0 + i for i, run in enumerate(runs)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    for layer, amount in ((model[3], 0.8), (model[6], 0.7)):
        prune.random_unstructured(layer, "weight", amount)
        prune.remove(layer, "weight")
    return model.eval()


def compile_and_run(model, x, **options):
    before = set(dynamo.compilations())
    compiled = torch.compile(model, backend="sift", options={"rest": "eager", **options})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
    (made,) = set(dynamo.compilations()) - before
    return compiled, made


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_layers_with_many_zeros_are_taken_and_others_say_why_not(sparse_is_faster, rest):
    x = torch.randn(16, 3, 9, 9)
    _, made = compile_and_run(network(), x, rest=rest)
    reports = {report.name: report for report in made.pruned_layers}
    assert {name: report.taken for name, report in reports.items()} == {"0": False, "3": True, "6": True}
    assert "0% of its weight are zeros" in reports["0"].reason
    assert reports["3"].sparsity == pytest.approx(0.8, abs=0.01)
    assert reports["3"].input_shape == (16, 16, 9, 9)


def test_the_slower_of_both_is_not_run_and_the_break_even_is_told(monkeypatch):
    monkeypatch.setattr(pruned, "_times", lambda *runs: (2.0, 1.0))
    _, made = compile_and_run(network(), torch.randn(4, 3, 9, 9))
    report = next(report for report in made.pruned_layers if report.name == "3")
    assert not report.taken
    assert "dense layer measured faster" in str(report)
    assert report.break_even == pytest.approx(1 - (1 - report.sparsity) / 2)
    assert PrunedReport(name="a", sparsity=0.5, taken=False, reason="-").break_even is None


def test_real_times_choose_one_of_both():
    _, made = compile_and_run(network(), torch.randn(4, 3, 9, 9))
    timed = [report for report in made.pruned_layers if report.sparse_ms is not None]
    assert len(timed) == 2
    assert all(report.taken == (report.sparse_ms < report.dense_ms) for report in timed)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_weights_that_change_are_read_again(sparse_is_faster, rest):
    model, x = network(), torch.randn(16, 3, 9, 9)
    compiled, made = compile_and_run(model, x, rest=rest)
    kernel = next(kernel for kernel in made.pruned if kernel.name == "3")
    weight = model[3].weight

    def agrees():
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
            torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)

    with torch.no_grad():
        weight.mul_(2)  # other values
    agrees()
    with torch.no_grad():
        weight.copy_(weight.flip(0))  # another mask
    agrees()
    with torch.no_grad():
        weight[weight.abs() < 0.05] = 0  # another count
    agrees()
    model.load_state_dict({**model.state_dict(), "3.weight": torch.randn_like(weight)})  # dense again
    agrees()
    assert not kernel.reports[0].taken
    model.load_state_dict(network().state_dict())  # pruned again
    agrees()
    assert kernel.reports[0].taken
    weight.data = weight.data * 3  # other memory
    agrees()
    assert kernel.reads == 7


def test_a_weight_that_never_rests_runs_dense(sparse_is_faster, caplog):
    model, x = network(), torch.randn(2, 3, 9, 9)
    compiled, made = compile_and_run(model, x)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(10):
            model[6].weight.mul_(1.1)
            torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
    kernel = next(kernel for kernel in made.pruned if kernel.name == "6")
    assert not kernel.reports[0].taken
    assert len([record for record in caplog.records if "at every call" in record.getMessage()]) == 1


def test_training_and_none_leave_dense_layers_alone(sparse_is_faster):
    model, x, before = network(), torch.randn(2, 3, 9, 9), set(dynamo.compilations())
    compiled = torch.compile(model, backend="sift", options={"rest": "eager"})
    compiled(x).sum().backward()
    assert model[3].weight.grad.count_nonzero() > 0.5 * model[3].weight.numel(), "zeros have gradients too"
    assert [made.pruned_layers for made in set(dynamo.compilations()) - before] == [()]
    torch._dynamo.reset()
    _, made = compile_and_run(model, x, prune_threshold=None)
    assert made.pruned_layers == ()
    with pytest.raises(Exception, match="prune_threshold must be in"):
        torch.compile(model, backend="sift", options={"prune_threshold": 2.0})(x)


def test_what_kernels_cannot_do_is_left_with_a_reason(sparse_is_faster):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.Flatten(), nn.Linear(8 * 25, 4)).eval()
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.9)
        prune.remove(layer, "weight")
    x = torch.randn(2, 3, 5, 5)
    _, made = compile_and_run(model, x)
    assert {report.name: "padding" in report.reason for report in made.pruned_layers} == {"0": True, "2": False}
    torch._dynamo.reset()
    _, made = compile_and_run(model.double(), x.double())
    assert any("float64" in report.reason for report in made.left_dense)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        before = set(dynamo.compilations())
        with torch.no_grad():
            y = torch.compile(model.float(), backend="sift", options={"rest": "eager"})(x)
        assert y.dtype == torch.bfloat16
        (made,) = set(dynamo.compilations()) - before
    assert not made.pruned
