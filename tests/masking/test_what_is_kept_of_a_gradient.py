"""What a backward pass keeps of a dense gradient is all that a choice can depend on, and little more."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sift_compiler.ir.entries import Entries, is_finite
from sift_compiler.ir.mask_structure import Unstructured
from sift_compiler.ir.pattern import Pattern
from sift_compiler.masking import methods, needed, order_statistics, transition
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import Target
from sift_compiler.options import RigL

SAMPLED = 61


def layer_view(shape, nnz, seed=0, slots=None, **more):
    generator = torch.Generator().manual_seed(seed)
    index = torch.full((slots or nnz,), -1, dtype=torch.int32)
    index[torch.randperm(len(index), generator=generator)[:nnz]] = torch.randperm(
        torch.Size(shape).numel(), generator=generator
    )[:nnz].int()
    values = torch.randint(-4, 5, (len(index),), generator=generator).float()
    return LayerView(
        name="layer", shape=shape, structure=Unstructured(), index=index, slot_values=values, seed=seed, **more
    )


def moved(view, gradient, entries, target, exclude=False):
    """The layer's index after the choice from the whole gradient, or from ``entries`` of it."""
    rule = methods.GradientGrowth(RigL(end_step=1, exclude_just_dropped=exclude))
    fetch = (lambda: gradient) if entries is None else entries.dense
    seen = LayerView(
        name="layer", shape=view.shape, structure=view.structure, index=view.index.clone(), slot_values=view.slot_values.clone(),
        fetch=fetch, entries=entries, seed=view.seed,
    )  # fmt: skip
    choice = rule.choose(seen, target)
    change = transition.plan(seen.index, choice.kept, choice.grown)
    transition.apply(change, seen.index, seen.slot_values, {})
    return seen.index, change.regrown


GRADIENTS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "zeros": lambda n, g: torch.zeros(n),
    "few values": lambda n, g: torch.randint(-2, 3, (n,), generator=g).float(),
    "mostly zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.02),
    "large where the sample looks": lambda n, g: torch.rand(n, generator=g) + (torch.arange(n) % SAMPLED == 0),
    "small where the sample looks": lambda n, g: torch.rand(n, generator=g) + (torch.arange(n) % SAMPLED != 0),
    "rows": lambda n, g: torch.randn(n, generator=g) * (torch.arange(n) // 500 % 5 == 0),
}


@pytest.mark.parametrize(("exclude", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_choice_from_what_is_kept_is_that_from_the_whole(kind, exclude, dtype):
    for shape, nnz, count in [((70, 31, 3, 3), 2000, 700), ((400, 400), 9000, 3000), ((3, 5), 4, 2), ((9, 9), 80, 1)]:
        view = layer_view(shape, nnz, slots=nnz + 3)
        gradient = GRADIENTS[kind](view.numel, torch.Generator().manual_seed(1)).to(dtype)
        entries = needed.by_magnitude(view, gradient, count)
        assert entries.finite
        assert torch.equal(entries.numbers, gradient[entries.places.long()])
        assert entries.places.numel() <= nnz + 2 * count
        for grown in {count, count // 2, 1}:
            whole, regrown = moved(view, gradient, None, Target(nnz - grown, nnz), exclude)
            kept, again = moved(view, gradient, entries, Target(nnz - grown, nnz), exclude)
            assert torch.equal(whole, kept)
            assert regrown == again


def test_a_sample_that_fits_keeps_few_more_than_can_grow():
    view = layer_view((1000, 1000), 100_000)
    gradient = torch.randn(view.numel)
    entries = needed.by_magnitude(view, gradient, 30_000)
    free = ~view.mask()[entries.places.long()]
    assert 30_000 <= int(free.sum()) <= 1.3 * 30_000
    assert torch.equal(entries.places, entries.places.sort().values)
    assert float(gradient[~torch.zeros(view.numel, dtype=torch.bool).index_fill(0, entries.places.long(), True)].abs().max()) < float(
        entries.numbers.abs().min()
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 50, 10_000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_of_a_gradient_that_is_not_finite_nothing_is_kept(bad, count):
    view = layer_view((300, 100), 3000)
    for place in (0, 1, 29_999):
        gradient = torch.randn(view.numel)
        gradient[place] = bad
        entries = needed.by_magnitude(view, gradient, count)
        assert (entries.finite, entries.places.numel(), entries.numbers.numel()) == (False, 0, 0)
        assert entries.numbers.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("count", [5, 700, 10_000])
def test_as_many_as_are_free_or_more_may_grow(count):
    view = layer_view((10, 70), 695)
    gradient = torch.randn(view.numel)
    entries = needed.by_magnitude(view, gradient, count)
    free = set(range(700)) - set(view.positions.tolist())
    assert free <= set(entries.places.tolist())
    empty = layer_view((10, 70), 0)
    assert needed.by_magnitude(empty, gradient, 0).places.numel() == 0
    full = layer_view((10, 70), 700)
    assert needed.by_magnitude(full, gradient, count).places.numel() == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_entries_that_reach_a_threshold(data):
    size = data.draw(st.sampled_from([0, 1, 100, (1 << 17) - 1, 1 << 17, (1 << 17) + 3]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dense = torch.randint(-9, 10, (size,), generator=generator).to(dtype)
    least = data.draw(st.sampled_from([0.0, 3.0, 9.0, 10.0]))
    made = order_statistics.reaching(dense, least)
    places = (dense.abs() >= least).nonzero().squeeze(1)
    assert made.finite
    assert made.places.dtype == torch.int32
    assert made.places.tolist() == places.tolist()
    assert made.numbers.dtype == dtype
    assert torch.equal(made.numbers, dense[places])
    assert made.numel == size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=50), st.data())
def test_the_nth_largest_and_where_flags_are_set(numbers, data):
    n = data.draw(st.integers(1, len(numbers)))
    scores = torch.tensor(numbers)
    assert float(order_statistics.nth_largest(scores, n)) == float(np.sort(scores.numpy())[-n])
    flags = scores > 0
    assert order_statistics.where(flags).tolist() == [place for place, flag in enumerate(flags.tolist()) if flag]
    assert order_statistics.where(flags).dtype == torch.int64


def test_finite_or_not():
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([[1.0, -2.0]]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not is_finite(torch.tensor([[1.0, bad]], dtype=torch.bfloat16))


def plainly_planned(index, kept, grown):
    """Slot by slot: what the index becomes, and how many come again at once."""
    index, grown, free = index.tolist(), sorted(grown.tolist()), []
    flags = iter(kept.tolist())
    regrown = 0
    for slot, entry in enumerate(index):
        if entry >= 0 and not next(flags):
            if entry in grown:
                grown.remove(entry)
                regrown += 1
            else:
                free.append(slot)
    empty = [slot for slot, entry in enumerate(index) if entry == -1]
    for slot in free:
        index[slot] = -1
    for slot, entry in zip(free + empty, grown, strict=False):
        index[slot] = entry
    return index, regrown


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slots_are_paired_with_positions_as_one_by_one(data):
    numel = data.draw(st.integers(1, 40))
    nnz = data.draw(st.integers(0, numel))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    view = layer_view((numel,), nnz, seed=data.draw(st.integers(0, 99)), slots=nnz + data.draw(st.integers(0, 3)))
    kept = torch.rand(nnz, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    rest = sorted(set(range(numel)) - set(view.positions[kept].tolist()))
    most = min(len(rest), view.slots - int(kept.sum()))
    rest = torch.tensor(rest, dtype=torch.int64)[torch.randperm(len(rest), generator=generator)]
    grown = rest[: data.draw(st.integers(0, most))]
    grown = grown.sort().values if data.draw(st.booleans()) else grown
    change = transition.plan(view.index, kept, grown)
    expected, regrown = plainly_planned(view.index, kept, grown)
    transition.apply(change, view.index, view.slot_values, {})
    assert view.index.tolist() == expected
    assert change.regrown == regrown
    assert (change.active, change.dropped, change.grown) == (
        int((view.index >= 0).sum()),
        int((~kept).sum()),
        len(grown),
    )
    Pattern((numel,), view.index).check()


def test_entries_ask_for_no_dense_tensor_where_they_are_asked_for_themselves():
    entries = Entries(places=torch.tensor([5, 2], dtype=torch.int32), numbers=torch.tensor([1.0, -3.0]), numel=9)
    view = layer_view((3, 3), 2, entries=entries, fetch=entries.dense)
    assert view.growable.tolist() == [5, 2]
    assert view.gradient_at(view.growable) is entries.numbers
    assert view.gradient_at(torch.tensor([2, 3, 5])).tolist() == [-3.0, 0.0, 1.0]
