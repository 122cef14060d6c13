"""Training memory adds up real tensors; the dense twin computes what the sparse network computes."""

import pytest
import torch
from torch import nn

from sift_compiler import nn as sift_nn
from sift_compiler.demo.latency import interleaved
from sift_compiler.demo.masked import masked_training_memory, masked_twin, refresh
from sift_compiler.demo.memory import training_memory
from sift_compiler.errors import UnsupportedError
from sift_compiler.ir.mask_structure import Unstructured


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        sift_nn.SparseConv2d(3, 8, 3, stride=2, padding=1, bias=False, sparsity=0.75),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        sift_nn.SparseLinear(8 * 3 * 3, 5, sparsity=0.5),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("make", "states", "extra"), [(torch.optim.SGD, 1, 0), (torch.optim.Adam, 2, 4)])
def test_memory_is_the_sum_of_the_tensors(make, states, extra):
    model = network()
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), 1e-3, **options)
    before = training_memory(model, optimizer)
    assert before.gradients == before.optimizer == 0
    step(model, optimizer)
    memory = training_memory(model, optimizer)
    kept = 8 * 27 // 4 + 5 * 72 // 2
    parameters = kept + 8 + 8 + 5
    tensors = len(list(model.parameters()))
    assert memory.values == memory.gradients == 4 * parameters
    assert memory.optimizer == states * 4 * parameters + extra * tensors, "Adam keeps a 4-byte step count per tensor"
    assert memory.indices == 4 * kept
    assert memory.buffers == 4 * 8 * 2 + 8, "running statistics and the count of batches"
    assert memory.update_step == 4 * (8 * 27 + 5 * 72)
    assert memory.total == memory.values * (2 + states) + extra * tensors + memory.indices + memory.buffers


def test_masked_memory_is_that_of_the_wide_dense_network_and_its_masks():
    model = network()
    memory = masked_training_memory(model, torch.randn(2, 3, 5, 5))
    dense = 8 * 27 + 5 * 72
    assert memory.values == memory.gradients == memory.optimizer == 4 * (dense + 8 + 8 + 5)
    assert memory.buffers == dense + 4 * 8 * 2 + 8
    assert memory.indices == memory.update_step == 0
    assert isinstance(model[0], sift_nn.SparseConv2d), "the network given stays sparse"


def test_twin_follows_masks_weights_and_statistics():
    model = network()
    twin = masked_twin(model)
    assert not any(isinstance(module, sift_nn.SparseLayer) for module in twin.modules())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    step(model, optimizer)
    model[0].index.copy_(torch.randperm(8 * 27)[: model[0].index.numel()].int())
    refresh(twin, model)
    model.eval(), twin.eval()
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-6)
    assert int((twin[0].weight != 0).sum()) <= model[0].values.numel()


def test_twin_of_an_unknown_layer_is_refused():
    class Other(sift_nn.SparseLayer):
        pass

    with pytest.raises(UnsupportedError, match="Other"):
        masked_twin(nn.Sequential(Other(sift_nn.SparseLinear(4, 4).pattern, False, None, None, Unstructured())))


def test_networks_are_timed_in_turn():
    calls = []
    forwards = {name: lambda x, name=name: calls.append(name) or x for name in "ab"}
    times = interleaved(forwards, torch.zeros(1), rounds=3, warm_up=1)
    assert "".join(calls) == "ab" * 4
    assert times["a"].runs == 3
    assert times["a"].fastest_ms <= times["a"].median_ms <= times["a"].slowest_ms
