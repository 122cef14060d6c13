"""Activation memory is what autograd saves when the model really runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sift_compiler.ir.activation_memory import ActivationMemory, activation_memory
from sift_compiler.ir.inputs import called
from sift_compiler.nn import SparseConv2d, SparseLinear


def really_saved(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> ActivationMemory:
    """The same, with numbers: nothing is fake."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        called(module.train(), inputs)
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in own]
    return ActivationMemory(sum(sizes), len(sizes))


def test_every_saved_storage_counts_once():
    network = nn.Sequential(nn.Linear(7, 5, bias=False), nn.ReLU(), nn.Linear(5, 3), nn.Flatten(0))
    x = torch.randn(11, 7)
    # Saved: x by the first layer, the output of ReLU by ReLU and by the second layer. Weights are parameters.
    assert activation_memory(network, (x,)) == ActivationMemory(4 * (11 * 7 + 11 * 5), 2)


def test_views_count_their_whole_storage_once():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x):
            left, right = self.linear(x).chunk(2, dim=-1)
            return left * right

    assert activation_memory(Halves(), (torch.randn(5, 4),)) == ActivationMemory(4 * (5 * 4 + 5 * 6), 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_sparse_layers_save_their_input_and_nothing_dense(batch):
    layer, x = SparseConv2d(3, 8, 3, stride=2, padding=1, sparsity=0.5), torch.randn(batch, 3, 9, 7)
    assert activation_memory(layer, (x,)) == ActivationMemory(4 * x.numel(), 1)


@pytest.mark.parametrize("name", ["resnet", "mobilevit", "vit", "encoder", "multihead_attention"])
def test_fake_tensors_save_what_real_ones_do(architectures, name):
    model, inputs = architectures.ARCHITECTURES[name]()
    x = tuple(inputs.values())
    assert activation_memory(model, inputs) == really_saved(model, x)


def test_a_sparse_network_is_measured_as_it_runs():
    network = nn.Sequential(
        SparseConv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(),
        SparseLinear(8 * 5 * 3, 5), nn.GELU(),
    )  # fmt: skip
    x = torch.randn(2, 3, 7, 5)
    assert activation_memory(network, (x,)) == really_saved(network, (x,))


def test_nothing_is_kept_where_nothing_trains_and_the_module_stays_as_it_is():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    assert activation_memory(network, (torch.randn(2, 1, 6, 6),)).bytes > 0
    assert activation_memory(network.requires_grad_(False), (torch.randn(2, 1, 6, 6),)) == ActivationMemory(0, 0)
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    torch.set_rng_state(state)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        activation_memory(network, (torch.randn(1, 1, 3, 3),))
