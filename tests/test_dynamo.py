"""torch.compile(backend="sift"): numbers, reasons, options, and masks that move without a recompile."""

import logging

import pytest
import torch
import torch._dynamo.utils
from torch import nn

from sift_compiler import dynamo
from sift_compiler import nn as sift_nn

RUNTIMES = ["eager", "tvm"]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        sift_nn.SparseConv2d(8, 20, 3, 2, 1, sparsity=0.6),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        sift_nn.SparseLinear(20, 6, sparsity=0.5),
    )


def compilations_since(before: set[dynamo.Compilation]) -> list[dynamo.Compilation]:
    """What this test compiled; functions of other tests may still be alive."""
    return [made for made in dynamo.compilations() if made not in before]


def move(layer: sift_nn.SparseLayer) -> None:
    """Put the mask somewhere else, in place, as a mask update does."""
    fresh = torch.randperm(torch.Size(layer.weight_shape).numel())[: layer.index.numel()]
    layer.index.copy_(fresh.int())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_trains_while_its_mask_moves_without_a_recompile_and_equals_eager(runtime):
    model = network()
    before = set(dynamo.compilations())
    compiled = torch.compile(model, backend="sift", options={"runtime": runtime})
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(6):
        x = torch.randn(16, 1, 9, 9)
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
        if step % 2:
            move(model[1])
            move(model[6])
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        model.train()
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 2, "one graph to train, one to evaluate"
    assert not torch._dynamo.utils.counters["recompile_limit"]
    kernels = [kernel for made in compilations_since(before) for kernel in made.kernels]
    assert sorted(kernel.name for kernel in kernels) == ["1", "1", "6", "6"]
    if runtime == "tvm":
        assert all(kernel.specialisations.repacks >= 2 for kernel in kernels)


def test_only_the_layer_that_moved_is_packed_anew(caplog):
    model, before = network().eval(), set(dynamo.compilations())
    compiled = torch.compile(model, backend="sift", options={"rest": "eager"})
    x = torch.randn(16, 1, 9, 9)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        compiled(x)
        move(model[6])
        caplog.clear()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    (made,) = compilations_since(before)
    repacks = {kernel.name: kernel.specialisations.repacks for kernel in made.kernels}
    assert repacks == {"1": 0, "6": 1}
    assert any("6" in record.getMessage() and "ms" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_gradients_equal_those_of_the_eager_model(runtime):
    model = network()
    compiled = torch.compile(model, backend="sift", options={"runtime": runtime})
    x = torch.randn(5, 1, 9, 9)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled(x).square().sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.load_state_dict(state)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_layer_that_is_not_taken_is_reported_with_its_reason(caplog):
    model, before = network().double().eval(), set(dynamo.compilations())
    x = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        compiled = torch.compile(model, backend="sift", options={"rest": "eager"})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    assert any("float64" in record.getMessage() for record in caplog.records)
    (made,) = compilations_since(before)
    assert len(made.refused) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtim": "tvm"}, "Did you mean 'runtime'"),
        ({"runtime": "tmv"}, "Unknown runtime 'tmv'"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"rest": "fast"}, "Unknown rest"),
        ({"winograd": 3}, "winograd must be 0, 2 or 4"),
        ({"winograd": True}, "winograd must be 0, 2 or 4"),
        ({"winograd": False}, "winograd must be 0, 2 or 4"),
        ({"winograd": "4"}, "winograd must be 0, 2 or 4"),
        ({"winograd": 4.0}, "winograd must be 0, 2 or 4"),
    ],
)
def test_wrong_options_are_refused_with_the_known_ones(options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(network(), backend="sift", options=options)(torch.randn(2, 1, 9, 9))


def test_without_a_compiler_the_rest_runs_in_eager_mode_said_once(monkeypatch, caplog):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    dynamo._no_inductor.cache_clear()
    dynamo._say_once.cache_clear()
    model = network().eval()
    x = torch.randn(2, 1, 9, 9)
    try:
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            for _ in range(2):
                torch._dynamo.reset()
                torch.testing.assert_close(torch.compile(model, backend="sift")(x), model(x), rtol=1e-5, atol=1e-5)
    finally:
        dynamo._no_inductor.cache_clear()
    said = [record for record in caplog.records if "C++ compiler" in record.getMessage()]
    assert len(said) == 1


def test_a_mask_that_is_given_other_memory_is_noticed():
    model = network().eval()
    compiled = torch.compile(model, backend="sift", options={"rest": "eager"})
    x = torch.randn(16, 1, 9, 9)
    with torch.no_grad():
        compiled(x)
        model[1].index.data = torch.randperm(torch.Size(model[1].weight_shape).numel())[: model[1].index.numel()].int()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_batches_of_other_sizes_share_a_graph():
    layer = sift_nn.SparseConv2d(3, 5, 3, padding=1, sparsity=0.5).eval()
    compiled = torch.compile(layer, backend="sift", dynamic=True, options={"runtime": "eager", "rest": "eager"})
    with torch.no_grad():
        for size in (16, 33, 3, 64, 15, 1):
            x = torch.randn(size, 3, 7, 9)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, (
        "one of a single image, one of all other batches"
    )
