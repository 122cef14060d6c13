"""What one of two processes does with weights that are spread over both: train with masks at rest, ask for what is refused."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sift_compiler as sift

METHOD = sift.SET(delta_t=1, end_step=4)


def network():
    torch.manual_seed(0)
    layers = [sift.SparseLinear(12, 16, sparsity=0.5, dtype=torch.float32), nn.Tanh()]
    return nn.Sequential(*layers, sift.SparseLinear(16, 5, sparsity=0.5))


def batch(step, rank=0, world=1):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 12, generator=generator).chunk(world)[rank]
    return x, torch.randint(0, 5, (8,), generator=generator).chunk(world)[rank]


def train(model, rank=0, world=1):
    """Losses of four steps of this process's share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for step in range(4):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model):
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach()
        for name, each in model.named_parameters()
    }


def refusal(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(sift.UnsupportedError) as caught:
        sift.schedule(model, optimizer, METHOD)
    return str(caught.value)


def saving(model, path):
    """What saving a sharded model is refused with; the file of what it says to save instead."""
    with pytest.raises(sift.UnsupportedError) as caught:
        sift.save(model, f"{path}.refused.pt2", example_inputs=batch(0)[0])
    together = network()
    together.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    sift.save(together, f"{path}.pt2", example_inputs=batch(0)[0])
    return str(caught.value)


def each_layer_sharded():
    model = network()
    for place in (0, 2):
        fully_shard(model[place])
    return fully_shard(model)


def split(kind):
    """A layer whose values are DTensors, as tensor parallelism makes them."""
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    model[2].values = nn.Parameter(distribute_tensor(model[2].values.detach(), mesh, [kind]))
    return model


def sharded(rank, folder):
    """What one process finds; ``{rank}.pt2`` in ``folder`` is what it saved."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    eager, compiled = each_layer_sharded(), each_layer_sharded()
    held = sum(each.to_local().numel() for each in eager.parameters())
    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    flat_only = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    found = {
        "refused": [refusal(each) for each in (each_layer_sharded(), split(Shard(0)), split(Replicate()))],
        "refused flat": [refusal(each) for each in (flat, flat_only)],
        "eager": (train(eager, rank, 2), whole(eager), held),
    }
    before = kernels()
    losses = train(torch.compile(compiled, backend="sift", options={"rest": "eager"}), rank, 2)
    found["compiled"] = (losses, whole(compiled), kernels() - before)
    return found | {"saving": saving(eager, f"{folder}/{rank}")}


def kernels():
    from sift_compiler import dynamo

    return sum(len(each.kernels) for each in dynamo.compilations())
