"""Every method: two and four processes with shares of a batch move masks as one process with the whole batch does.

Floating-point sums depend on how many processes add them up. The models here are float64: sums differ by some 1e-15 of a score, and
neighbouring scores of some hundred weights by 1e-4 or so, hence ranks are the same whoever adds. That the data is telling is
tested, too: a process that sees its own share of the batch only moves masks otherwise.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sift_compiler as sift

UPDATES = 10
BATCH = 16
WHEN = {"delta_t": 1, "end_step": UPDATES}
NM, FAN_IN = {"structure": sift.NM(2, 4)}, {"structure": sift.ConstantFanIn()}
TRANSPOSABLE = {"structure": sift.TransposableNM(2, 4)}
BLOCK, CHANNEL = {"structure": sift.Block(2, 2)}, {"structure": sift.Channel()}

CASES = {
    "Static": (sift.Static(), {}),
    "SET": (sift.SET(**WHEN), {}),
    "RigL": (sift.RigL(**WHEN), {}),
    "RigL, replacing steps": (sift.RigL(**WHEN | {"delta_t": 2, "end_step": 2 * UPDATES}, skip_step="replace"), {}),
    "RigL, transposable N:M": (sift.RigL(**WHEN), TRANSPOSABLE),
    "RigL, blocks": (sift.RigL(**WHEN), BLOCK),
    "SET, channels": (sift.SET(**WHEN), CHANNEL),
    "SNFS": (sift.SNFS(**WHEN), {}),
    "GMP": (sift.GMP(**WHEN, final_sparsity=0.9), {}),
    "GraNet": (sift.GraNet(**WHEN, final_sparsity=0.8), {}),
    "MEST": (sift.MEST(**WHEN), {}),
    "MEST, elastic": (sift.MEST(**WHEN, stages=((0, 0.5, 1.0),)), {}),
    "TopKAST": (sift.TopKAST(**WHEN, backward_sparsity=0.25), {}),
    "SRigL": (sift.SRigL(**WHEN), FAN_IN),
    "SRSTE": (sift.SRSTE(), NM),
    "SRSTE, transposable N:M": (sift.SRSTE(), TRANSPOSABLE),
    "BAME": (sift.BAME(**WHEN, adapt_from=3), NM),
    "BiDST": (sift.BiDST(**WHEN, rate=50.0, change=0.0, noise=0.1), NM),
}


def train(name, *, member=0, members=1, group=None, batch=BATCH):
    """Masks after every step, and the values at last, of member ``member`` of ``members`` that share a batch."""
    method, more = CASES[name]
    torch.manual_seed(member)  # DistributedDataParallel hands out what member 0 has
    sizes = {"sparsity": 0.5, "dtype": torch.float64, **more}
    model = nn.Sequential(sift.SparseLinear(16, 32, **sizes), nn.Tanh(), sift.SparseLinear(32, 8, **sizes))
    if name.startswith(("SRSTE", "TopKAST")):
        sift.dense_storage(model)
    parallel = model if members == 1 else DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.3, momentum=0.9)
    masks = sift.schedule(parallel, optimizer, method)
    trace = []
    for step in range(getattr(method, "delta_t", 1) * UPDATES):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 16, generator=generator, dtype=torch.float64)[:batch].chunk(members)[member]
        y = torch.randint(0, 8, (BATCH,), generator=generator)[:batch].chunk(members)[member]
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        trace.append([model[place].pattern.mask() for place in (0, 2)])
    assert masks.skipped == {"missing": 0, "not finite": 0}
    return trace, [model[place].dense_weight().detach() for place in (0, 2)]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for name in CASES:
        results[name, 4] = train(name, member=rank, members=4)
        results[name, 2] = train(name, member=rank % 2, members=2, group=pairs[rank // 2])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, start_ranks):
    """What each of four processes found: as four, and as two pairs that know nothing of each other."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, 4, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@functools.cache
def alone(name):
    return train(name)


def same(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_and_four_processes_move_masks_as_one_does(ranks, name):
    masks, weights = alone(name)
    for members in (2, 4):
        for rank in range(4):
            theirs, their_weights = ranks[rank][name, members]
            assert same(theirs, masks), (members, rank)
            for a, b in zip(their_weights, weights, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in CASES if name != "Static"])
def test_a_share_of_the_batch_alone_would_move_them_otherwise(name):
    masks, _ = alone(name)
    assert len({tuple(mask.numpy().tobytes() for mask in step) for step in masks}) >= UPDATES // 2
    assert not same(train(name, batch=BATCH // 2)[0], masks)
