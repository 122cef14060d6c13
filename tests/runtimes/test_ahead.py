"""Kernels made ready before the first call: what is ready, what is left to the call, and errors."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from sift_compiler import dynamo
from sift_compiler.errors import RuntimeBuildError
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.runtimes.tvm import build
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.target import host_cpu

TOLERANCE = 1e-5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        SparseConv2d(3, 6, 3, padding=1, sparsity=0.5), nn.ReLU(), SparseConv2d(6, 6, 3, padding=1, sparsity=0.5), nn.ReLU(),
        SparseConv2d(6, 6, 3, padding=1, sparsity=0.5), nn.Flatten(), SparseLinear(6 * 64, 5, sparsity=0.5),
    ).eval()  # fmt: skip


@pytest.fixture
def prepared(monkeypatch):
    """(thread, input shape) of every preparation."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    real = TvmKernel._prepare

    def prepare(self, shape, index):  # type: ignore[no-untyped-def]
        seen.append((threading.current_thread().name, shape))
        return real(self, shape, index)

    monkeypatch.setattr(TvmKernel, "_prepare", prepare)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def run(model: nn.Module, x: Tensor, **options: object):  # type: ignore[no-untyped-def]
    compiled = torch.compile(model, backend="sift", options={"rest": "eager", "threads": 2, **options})
    with torch.no_grad():
        y, expected = compiled(x), model(x)
    assert float((y - expected).abs().max() / expected.abs().max()) < TOLERANCE
    return compiled


@pytest.mark.parametrize("batch", [3, host_cpu().lanes])
def test_every_layer_is_prepared_once_and_not_by_the_caller(batch: int, prepared) -> None:  # type: ignore[no-untyped-def]
    before = set(dynamo.compilations())
    model, x = network(), torch.randn(batch, 3, 8, 8)
    compiled = run(model, x)
    (made,) = (made for made in dynamo.compilations() if made not in before)
    assert len(prepared) == len(made.kernels) == 4
    assert threading.current_thread().name not in {thread for thread, _ in prepared}
    assert [kernel.specialisations.repacks for kernel in made.kernels] == [0] * 4
    model[0].index.copy_(torch.randperm(6 * 27)[: model[0].index.numel()].int())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)
    assert [kernel.specialisations.repacks for kernel in made.kernels] == [1, 0, 0, 0]
    assert len(prepared) == 4


def test_sizes_that_are_free_are_prepared_for_the_first_input(prepared) -> None:  # type: ignore[no-untyped-def]
    model = network()
    compiled = torch.compile(model, backend="sift", dynamic=True, options={"rest": "eager", "threads": 2})
    with torch.no_grad():
        for batch in (5, 7):
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)
            names = {thread for thread, _ in prepared}
            assert (threading.current_thread().name in names) == (batch == 7)
    assert len(prepared) == 8


def test_tiles_that_are_measured_are_left_to_the_call(prepared, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path))
    run(nn.Sequential(SparseLinear(16, 8, sparsity=0.5)).eval(), torch.randn(32, 16), tune="quick", threads=1)
    assert {thread for thread, _ in prepared} == {threading.current_thread().name}


def test_what_cannot_be_compiled_is_said_by_the_call(prepared, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def broken(*_: object, **__: object) -> None:
        raise RuntimeBuildError("no kernel today")

    monkeypatch.setattr(build, "compile_anew", broken)
    monkeypatch.setattr(build, "_compiled", {})
    monkeypatch.setattr(build, "fingerprint", lambda *_: None)
    with pytest.raises(RuntimeBuildError, match="no kernel today"):
        run(network(), torch.randn(3, 3, 8, 8))
