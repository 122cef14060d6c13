"""Weights that are spread over processes: masks that rest train and compile, masks that move are refused."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    sharded, compiled = each_layer_sharded(), each_layer_sharded()
    held = sum(each.to_local().numel() for each in sharded.parameters())
    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    flat_only = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    found = {
        "refused": [refusal(each) for each in (each_layer_sharded(), split(Shard(0)), split(Replicate()))],
        "refused flat": [refusal(each) for each in (flat, flat_only)],
        "eager": (train(sharded, rank, 2), whole(sharded), held),
        "compiled": (
            train(torch.compile(compiled, backend="sift", options={"rest": "eager"}), rank, 2),
            whole(compiled),
            kernels(),
        ),
    }
    found["saving"] = saving(sharded, f"{folder}/{rank}")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def kernels():
    from sift_compiler import dynamo

    return sum(len(each.kernels) for each in dynamo.compilations())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") | {"saved": sift.load(folder / f"{rank}.pt2")} for rank in range(2)]


def test_masks_of_sharded_weights_do_not_move(ranks):
    for found in ranks:
        for number, message in enumerate(found["refused"]):
            assert message.startswith("Moving masks is not possible: fully_shard or tensor parallelism (DTensor)")
            assert f"sparse layer {'2' if number else '0'!r}" in message
            assert "DistributedDataParallel" in message
        for message in found["refused flat"]:
            assert "FullyShardedDataParallel spreads the values" in message


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_sharded_weights_train_while_masks_rest(ranks, how):
    alone = network()
    train(alone)
    losses = []
    for found in ranks:
        mine, weights, _ = found[how]
        losses.append(mine)
        for name, each in whole(alone).items():
            torch.testing.assert_close(weights[name], each, rtol=0, atol=2e-5)
    assert ranks[0]["compiled"][2] == 2
    assert sum(found["eager"][2] for found in ranks) == sum(each.numel() for each in alone.parameters())
    expected = train(network())
    assert [sum(pair) / 2 for pair in zip(*losses, strict=True)] == pytest.approx(expected, abs=1e-5)


def test_sharded_weights_are_saved_when_they_are_together(ranks):
    for found in ranks:
        assert found["saving"].startswith("Saving is not possible: fully_shard or tensor parallelism (DTensor) spreads")
        assert "full_state_dict=True" in found["saving"]
        for name, each in found["saved"].named_parameters():
            assert torch.equal(each, found["eager"][1][name])
