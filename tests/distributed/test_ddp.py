"""Two processes under DistributedDataParallel: what is sent, accumulated and skipped gradients, masks that came apart, compiled kernels.

Weights that are spread over processes, too: masks that rest train and compile, masks that move are refused. What processes cost is their
start, so two do all of it.
"""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sift_compiler as sift
from tests.distributed import sharded

BATCH = 16
METHODS = {
    "RigL": sift.RigL(delta_t=1, end_step=6),
    "MEST": sift.MEST(delta_t=1, end_step=6),
    "SNFS": sift.SNFS(delta_t=1, end_step=6),
}


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    first = sift.SparseLinear(12, 24, sparsity=0.5, dtype=dtype)
    return nn.Sequential(first, nn.Tanh(), sift.SparseLinear(24, 8, sparsity=0.5, dtype=dtype))


def batch(step, rank=0, world=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 12, generator=generator, dtype=dtype).chunk(world)[rank]
    return x, torch.randint(0, 8, (BATCH,), generator=generator).chunk(world)[rank]


def masks_of(model):
    return [model[place].pattern.mask() for place in (0, 2)]


def message_of(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# --- what is sent ---------------------------------------------------------------------------------------------------


def traffic(rank, prepare, compiled=False):
    """(collective, elements, dtype) of every collective of optimizer steps 0 to 4; masks move at steps 0 and 4."""
    torch.manual_seed(rank)
    model = nn.Sequential(
        sift.SparseLinear(12, 16, sparsity=0.5), nn.BatchNorm1d(16), sift.SparseLinear(16, 4, sparsity=0.5)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallel = prepare(model, optimizer)
    run = torch.compile(parallel, backend="sift", options={"rest": "eager"}) if compiled else parallel
    steps = []
    for step in range(5):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
        found = [event for event in profile.events() if event.name.startswith("gloo:")]
        steps.append(
            sorted((each.name[5:], torch.Size(each.input_shapes[0]).numel(), each.input_dtypes[0]) for each in found)
        )
    return steps, [model[place].index for place in (0, 2)]


RIGL = sift.RigL(delta_t=4, end_step=8)


def unscheduled(model, optimizer):
    return DistributedDataParallel(model)


def scheduled_after(model, optimizer, method=RIGL):
    parallel = DistributedDataParallel(model)
    sift.schedule(parallel, optimizer, method)
    return parallel


def scheduled_inside(model, optimizer):
    parallel = DistributedDataParallel(model)
    sift.schedule(model, optimizer, RIGL)
    return parallel


def scheduled_before(model, optimizer):
    sift.schedule(model, optimizer, RIGL)
    return DistributedDataParallel(model)


def scheduled_in_compiled(model, optimizer):
    parallel = DistributedDataParallel(model)
    sift.schedule(torch.compile(parallel, backend="eager"), optimizer, RIGL)
    return parallel


WAYS = {
    "after": scheduled_after, "inside": scheduled_inside, "before": scheduled_before, "in compiled": scheduled_in_compiled,
    "static": functools.partial(scheduled_after, method=sift.Static()),
}  # fmt: skip


def sent(rank):
    found = {name: traffic(rank, prepare) for name, prepare in WAYS.items()}
    found["compiled"] = traffic(rank, scheduled_after, compiled=True)
    return found | {"unscheduled": traffic(rank, unscheduled)}


# --- accumulated and skipped gradients ------------------------------------------------------------------------------


def accumulate(name, rank=0, world=1, parts=2, **wrapping):
    """Masks after six steps; the last of several backward passes alone sums over processes."""
    model = network()
    parallel = DistributedDataParallel(model, **wrapping) if world > 1 else model
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.3, momentum=0.9)
    sift.schedule(parallel, optimizer, METHODS[name])
    for step in range(6):
        optimizer.zero_grad()
        x, y = batch(step, rank, world)
        for part in range(parts):
            last = part == parts - 1 or world == 1
            with contextlib.nullcontext() if last else parallel.no_sync():
                loss = nn.functional.cross_entropy(parallel(x.chunk(parts)[part]), y.chunk(parts)[part])
                (loss / parts).backward()
        optimizer.step()
    return masks_of(model)


def overflow(name, fused, rank=0, world=1, overflows=True):
    """Masks after steps of which one overflows in the first backward pass of the last rank; what the scheduler counted."""
    model = network()
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.3, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    masks = sift.schedule(parallel, optimizer, METHODS[name], scaler=scaler)
    scales = []
    for step in (0, 1, "overflow", 2, 3) if overflows else (0, 1, 2, 3):
        optimizer.zero_grad()
        x, y = batch(9 if step == "overflow" else step, rank, world)
        for part in range(2):
            bad = step == "overflow" and part == 0 and rank == world - 1
            with contextlib.nullcontext() if part or world == 1 else parallel.no_sync():
                loss = nn.functional.cross_entropy(parallel(x.chunk(2)[part]), y.chunk(2)[part]) / 2
                scaler.scale(loss * (float("inf") if bad else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return masks_of(model), masks.step_count, len(masks.updates), scales[-1]


WRAPPINGS = {"views": {"gradient_as_bucket_view": True}, "small": {"bucket_cap_mb": 1e-4}, "static": {"static_graph": True}}  # fmt: skip


OVERFLOWS = list(itertools.product(["RigL", "SNFS"], [False, True]))


def gradients(rank):
    found = {("accumulated", name): accumulate(name, rank, 2) for name in METHODS}
    for how, wrapping in WRAPPINGS.items():
        found["wrapped", how] = accumulate("RigL", rank, 2, parts=1 if how == "static" else 2, **wrapping)
    return found | {("overflow", *case): overflow(*case, rank, 2) for case in OVERFLOWS}


# --- masks that came apart ------------------------------------------------------------------------------------------


def step_once(model, optimizer, rank):
    x, y = batch(0, rank, 2)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def apart(rank):
    """What is said where masks differ from the start, where a seed differs, and where weights differ at an update."""
    found = {}
    other = network(seed=rank)  # nobody hands out rank 0's
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    sift.schedule(other, optimizer, METHODS["RigL"])
    found["seeds"] = message_of(sift.UserError, lambda: step_once(other, optimizer, rank))
    model = network()
    parallel = DistributedDataParallel(model)
    again = torch.optim.SGD(parallel.parameters(), lr=0.1)
    masks = sift.schedule(parallel, again, METHODS["RigL"])
    step_once(parallel, again, rank)
    if rank == 1:
        model[2].values.data.mul_(torch.linspace(-3, 3, model[2].values.numel(), dtype=torch.float64))
    found["weights"] = message_of(sift.UserError, lambda: step_once(parallel, again, rank))
    masks.remove()
    # The wrapper hands out rank 0's weights after the method has chosen its backward set by others.
    late = sift.dense_storage(network(seed=rank))
    fourth = torch.optim.SGD(late.parameters(), lr=0.1)
    sift.schedule(late, fourth, sift.TopKAST(delta_t=4, backward_sparsity=0.25))
    found["memory"] = message_of(sift.UserError, lambda: step_once(DistributedDataParallel(late), fourth, rank))
    # Two slots that trade places leave the mask as it is, but a slot's gradients are summed by place.
    exchanged = network()
    wrapped = DistributedDataParallel(exchanged)
    if rank == 1:
        exchanged[0].index[:2] = exchanged[0].index[:2].flip(0)
    third = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    sift.schedule(wrapped, third, METHODS["RigL"])
    found["order"] = message_of(sift.UserError, lambda: step_once(wrapped, third, rank))
    return found


# --- compiled -------------------------------------------------------------------------------------------------------


def train_compiled(compiled, rank=0, world=1):
    """Losses of six steps, masks after them, and how many kernels there are."""
    from sift_compiler import dynamo

    model = network(torch.float32)
    parallel = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.3, momentum=0.9)
    masks = sift.schedule(parallel, optimizer, sift.RigL(delta_t=2, end_step=6))
    run = torch.compile(parallel, backend="sift", options={"rest": "eager"}) if compiled else parallel
    losses = []
    for step in range(6):
        x, y = batch(step, rank, world, torch.float32)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    kernels = sum(len(each.kernels) for each in dynamo.compilations())
    return losses, masks_of(model), [each.dropped for each in masks.updates], kernels


def compiled(rank):
    return {"eager": train_compiled(False, rank, 2), "compiled": train_compiled(True, rank, 2)}


# --- the tests ------------------------------------------------------------------------------------------------------

PARTS = {"sent": sent, "gradients": gradients, "apart": apart, "compiled": compiled}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {name: part(rank) for name, part in PARTS.items()} | {"sharded": sharded.sharded(rank, folder)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, start_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, 2, str(folder))
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for rank, each in enumerate(found):
        each["sharded"]["saved"] = sift.load(folder / f"{rank}.pt2")
    return found


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Buffers of the batch norm: mean and variance, batches seen. Values, biases, and batch norm's weight and bias have gradients.
NORM = [("broadcast", 1, "long int"), ("broadcast", 32, "float")]
GRADIENT = ("all_reduce", 96 + 16 + 32 + 32 + 4, "float")
INDEX = ("broadcast", 96 + 32, "int")


def without_buckets(found):
    """DistributedDataParallel itself tells, once, in what order the parameters are in its buckets."""
    return [one for one in found if one not in (("broadcast", 1, "int"), ("broadcast", 7, "int"))]


def test_unscheduled_masks_are_broadcast_on_every_forward_pass(ranks):
    steps, _ = ranks[0]["sent"]["unscheduled"]
    assert all(without_buckets(step) == sorted([*NORM, GRADIENT, INDEX]) for step in steps)


@pytest.mark.parametrize("way", [*WAYS, "compiled"])
def test_scheduled_masks_are_not_broadcast_and_nothing_dense_is_sent_between_updates(ranks, way):
    (steps, first), (_, second) = (ranks[rank]["sent"][way] for rank in (0, 1))
    assert same(first, second)
    moves = () if way == "static" else (0, 4)
    for place, found in enumerate(steps):
        found = without_buckets(found)
        for one in (*NORM, GRADIENT):
            found.remove(one)
        if place == 0 and way in ("inside", "before"):
            found.remove(INDEX)  # the first forward pass tells who wraps the module
        assert all(kind != "broadcast" for kind, _, _ in found)
        dense = [one for one in found if one[2] == "float"]
        assert dense == ([("all_reduce", 64, "float"), ("all_reduce", 192, "float")] if place in moves else [])
        # What is agreed on: 8 bytes a layer or two, on an update, before one, and on the first step.
        agreed = [one for one in found if one[2] == "long int"]
        assert sorted(dense + agreed) == sorted(found)
        assert all(count <= 4 for _, count, _ in agreed)
        assert place in (0, 3, 4) or not agreed


@functools.cache
def accumulated_alone(name):
    return accumulate(name)


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_count_as_the_whole_batch(ranks, name):
    expected = accumulated_alone(name)
    for rank in (0, 1):
        assert same(ranks[rank]["gradients"]["accumulated", name], expected)
    assert same(accumulate(name, parts=1), expected)


@pytest.mark.parametrize("how", WRAPPINGS)
def test_buckets_and_views_of_them_do_not_matter(ranks, how):
    for rank in (0, 1):
        assert same(ranks[rank]["gradients"]["wrapped", how], accumulated_alone("RigL"))


@pytest.mark.parametrize(("name", "fused"), OVERFLOWS)
def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(ranks, name, fused):
    masks, *counted = overflow(name, fused, overflows=False)
    assert counted == [4, 4, 2.0**10]
    for rank in (0, 1):
        theirs, *counted = ranks[rank]["gradients"]["overflow", name, fused]
        assert counted == [4, 4, 2.0**9]
        assert same(theirs, masks)
    assert same(overflow(name, fused)[0], masks)


def test_masks_that_differ_are_told_on_every_rank(ranks):
    for rank in (0, 1):
        found = ranks[rank]["apart"]
        assert "At optimizer step 0 the processes hold different masks of 2 sparse layer(s): 0, 2." in found["seeds"]
        assert "same seed or checkpoint" in found["seeds"]
        assert "At optimizer step 1 the processes hold different masks of 1 sparse layer(s): 2." in found["weights"]
        assert "of 1 sparse layer(s): 0." in found["order"]
        assert "At optimizer step 0 the processes hold different masks of 2 sparse layer(s)" in found["memory"]


def test_compiled_kernels_follow_masks_that_move_on_two_ranks(ranks):
    for rank in (0, 1):
        eager, eager_masks, eager_moved, _ = ranks[rank]["compiled"]["eager"]
        losses, masks, moved, kernels = ranks[rank]["compiled"]["compiled"]
        assert kernels >= 2
        assert same(masks, eager_masks)
        assert same(masks, ranks[0]["compiled"]["compiled"][1])
        assert moved == eager_moved
        assert min(moved) > 0
        assert losses == pytest.approx(eager, abs=1e-5)
    _, masks, _, _ = train_compiled(False)
    assert same(masks, ranks[0]["compiled"]["compiled"][1])


# --- weights that are spread over processes -------------------------------------------------------------------------


def test_masks_of_sharded_weights_do_not_move(ranks):
    for found in (each["sharded"] for each in ranks):
        for number, message in enumerate(found["refused"]):
            assert message.startswith("Moving masks is not possible: fully_shard or tensor parallelism (DTensor)")
            assert f"sparse layer {'2' if number else '0'!r}" in message
            assert "DistributedDataParallel" in message
        for message in found["refused flat"]:
            assert "FullyShardedDataParallel spreads the values" in message


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_sharded_weights_train_while_masks_rest(ranks, how):
    alone = sharded.network()
    sharded.train(alone)
    losses = []
    for found in (each["sharded"] for each in ranks):
        mine, weights, _ = found[how]
        losses.append(mine)
        for name, each in sharded.whole(alone).items():
            torch.testing.assert_close(weights[name], each, rtol=0, atol=2e-5)
    assert ranks[0]["sharded"]["compiled"][2] == 2
    assert sum(each["sharded"]["eager"][2] for each in ranks) == sum(each.numel() for each in alone.parameters())
    expected = sharded.train(sharded.network())
    assert [sum(pair) / 2 for pair in zip(*losses, strict=True)] == pytest.approx(expected, abs=1e-5)


def test_sharded_weights_are_saved_when_they_are_together(ranks):
    for found in (each["sharded"] for each in ranks):
        assert found["saving"].startswith("Saving is not possible: fully_shard or tensor parallelism (DTensor) spreads")
        assert "full_state_dict=True" in found["saving"]
        for name, each in found["saved"].named_parameters():
            assert torch.equal(each, found["eager"][1][name])
