"""Two processes on halves of a batch must move masks as one process on the whole batch does; see also distributed/."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sift_compiler.nn import SparseLinear
from sift_compiler.options import RigL
from sift_compiler.schedule import schedule

METHOD = RigL(delta_t=1, end_step=4, drop_fraction=0.5)


def network():
    torch.manual_seed(0)
    layers = [SparseLinear(12, 16, sparsity=0.7, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*layers, SparseLinear(16, 3, sparsity=0.5, dtype=torch.float64))


def train(model, rank, world):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    masks = schedule(model, optimizer, METHOD)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64).chunk(world)[rank]
        y = torch.randint(0, 3, (8,), generator=generator).chunk(world)[rank]
        if step == 2 and rank == world - 1:
            x = x * float("nan")  # one rank's trouble keeps every rank's masks where they are
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if step == 2:
            optimizer.zero_grad()
        optimizer.step()
    return masks


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    model = network()
    masks = train(DistributedDataParallel(model), rank, world)
    plain = [update.to_plain() | {"milliseconds": 0} for update in masks.updates]
    torch.save((model.state_dict(), plain, masks.skipped), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_agree_with_each_other_and_with_one_process(tmp_path, start_ranks):
    start_ranks(work, 2, 2, str(tmp_path))
    (first, updates, skipped), (second, updates_2, skipped_2) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert updates == updates_2
    assert [update["step"] for update in updates] == [0, 1, 3]
    assert skipped == skipped_2 == {"missing": 0, "not finite": 1}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name

    model = network()
    masks = train(model, rank=0, world=1)
    assert len(masks.updates) == 3
    for name in ("0", "2"):
        alone = model.get_submodule(name)
        weight = torch.zeros(alone.pattern.numel, dtype=torch.float64)
        weight[first[f"{name}.index"].long()] = first[f"{name}.values"]
        torch.testing.assert_close(weight.view(alone.weight_shape), alone.dense_weight().detach(), rtol=0, atol=1e-12)
