import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sift_compiler.errors import UserError
from sift_compiler.ir.mask_structure import (
    NM,
    Block,
    Channel,
    ConstantFanIn,
    TransposableNM,
    Unstructured,
    best_units,
    structure_from_plain,
)
from sift_compiler.ir.pattern import EMPTY, Pattern, asleep, entry_of
from sift_compiler.ir.transposable import greedy, transposable
from sift_compiler.nn import SparseConv2d, SparseLinear

STRUCTURES = [
    Unstructured(), NM(2, 4), NM(1, 8), TransposableNM(1, 4), TransposableNM(3, 4, exact=False), Block(2, 4), ConstantFanIn(), Channel(),
]  # fmt: skip
SHAPES = [(8, 8), (4, 16), (8, 8, 3, 3), (4, 8, 1, 2)]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_drawn_and_projected_patterns_have_the_structure_and_the_exact_count(structure, data):
    shape = data.draw(st.sampled_from(SHAPES))
    sparsity = data.draw(st.floats(0, 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    kept = structure.kept(shape, sparsity)
    numel = torch.Size(shape).numel()
    assert kept <= (1 - sparsity) * numel + 1
    drawn = structure.random(shape, kept, generator)
    structure.check(drawn)
    assert drawn.nnz == kept
    scores = torch.randint(-3, 4, shape, generator=generator).float()
    mask = structure.project(scores, kept, torch.randperm(numel, generator=generator))
    structure.check(Pattern.from_mask(mask))
    assert int(mask.sum()) == kept
    # No drawn pattern of the same count has a larger sum, where the structure's choice is optimal.
    if structure != TransposableNM(3, 4, exact=False) and not (isinstance(structure, TransposableNM) and kept % 8):
        assert scores[mask].sum() >= scores[drawn.mask()].sum() - 1e-4
    assert structure_from_plain(structure.to_plain()) == structure


def best_sum(square, n):
    lines = [line for line in itertools.product((0.0, 1.0), repeat=square.shape[0]) if sum(line) == n]
    masks = torch.tensor(list(itertools.product(lines, repeat=square.shape[0])))
    masks = masks[(masks.sum(1) == n).all(1)]
    return float((masks * square).sum((1, 2)).max())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_exact_solver_is_exact_and_the_greedy_one_reaches_half(n):
    generator = torch.Generator().manual_seed(n)
    # Magnitudes many decades apart, ties and zeros: what rounding would trip over.
    squares = torch.cat(
        [
            torch.rand(12, 4, 4, generator=generator) ** 8,
            torch.randint(0, 3, (12, 4, 4), generator=generator).float(),
            torch.rand(4, 4, 4, generator=generator) * 1e-30 + torch.eye(4),
        ]
    )
    exact, completed = transposable(squares, n, exact=True), transposable(squares, n, exact=False)
    for mask in (exact, completed):
        assert bool((mask.sum(1) == n).all())
        assert bool((mask.sum(2) == n).all())
    for square, one, other in zip(squares, exact, greedy(squares, n), strict=True):
        best = best_sum(square, n)
        assert float((square * one).sum()) == pytest.approx(best, rel=1e-5)
        assert float((square * other).sum()) >= best / 2 * (1 - 1e-5)


def pattern_of(mask):
    return Pattern.from_mask(torch.tensor(mask))


@pytest.mark.parametrize(
    ("structure", "mask", "message"),
    [
        (NM(1, 2), [[1, 1, 0, 0]], r"not NM\(n=1, m=2\): group 0 keeps 2, expected at most 1"),
        (TransposableNM(1, 2), [[1, 0], [1, 0]], "column 0 of square 0 keeps 2, expected at most 1"),
        (Block(2, 2), [[1, 1], [1, 0]], "3 of 4 entries are kept; expected all or none"),
        (Channel(), [[1, 1], [0, 1]], "of unit 1 of group 0 .* 1 of 2 entries are kept"),
        (ConstantFanIn(), [[1, 1, 0], [0, 1, 0], [0, 0, 0]], "outputs keep from 1 to 2 entries"),
        (NM(2, 4), [[1, 0, 0]], "has 3 inputs, which must be a multiple of 4.*round_to=4"),
        (TransposableNM(2, 4), [[1, 0, 0, 0]] * 3, "has 3 outputs, which must be a multiple of 4"),
    ],
)
def test_a_violation_is_named(structure, mask, message):
    with pytest.raises(UserError, match=message):
        structure.check(pattern_of(mask))


def test_counts_and_sizes_that_are_not_possible_are_refused():
    with pytest.raises(UserError, match=r"cannot keep 5 of the 8 entries.*at most 4.*Keep 4"):
        NM(1, 2).random((2, 4), 5)
    with pytest.raises(UserError, match=r"multiples of 2\. Keep 2"):
        ConstantFanIn().random((2, 4), 3)
    for wrong in (lambda: NM(3, 2), lambda: NM(0, 2), lambda: NM(1.5, 2), lambda: Block(0, 1), lambda: Block(1, True)):
        with pytest.raises(UserError, match="is not possible"):
            wrong()
    with pytest.raises(UserError, match="Unknown structure 'NN'"):
        structure_from_plain({"name": "NN"})


def test_an_ablated_output_leaves_the_fan_in_of_the_others_constant():
    ConstantFanIn().check(pattern_of([[1, 1, 0], [0, 0, 0], [0, 1, 1]]))


def test_layers_carry_their_structure_and_refuse_other_patterns():
    layer = SparseLinear(8, 4, sparsity=0.5, structure=NM(2, 4))
    layer.structure.check(layer.pattern)
    assert "structure=NM(n=2, m=4)" in repr(layer)
    assert "structure" not in repr(SparseConv2d(4, 4, 3))
    with pytest.raises(UserError, match="not Block"):
        SparseLinear(8, 4, pattern=layer.pattern, structure=Block(2, 2))


def slotted(layer):
    """Slot 0 empty, slot 1 asleep."""
    layer.index[1] = asleep(layer.index[1])
    layer.index[0] = EMPTY
    return layer


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: SparseLinear(6, 5, sparsity=0.5), (3, 6)), (lambda: SparseConv2d(3, 4, 3), (2, 3, 5, 5))],
)
def test_slots_out_of_the_mask_take_no_part_and_sleeping_ones_get_their_gradient(make, shape):
    torch.manual_seed(0)
    layer = make().double()
    entry = int(layer.index[1])
    slotted(layer)
    pattern = layer.pattern
    pattern.check()
    assert pattern.nnz == pattern.slots - 2
    assert entry_of(layer.index)[:2].tolist() == [EMPTY, entry]
    assert f"slots={pattern.slots}" in repr(layer)
    x = torch.randn(shape, dtype=torch.float64)
    weight = layer.dense_weight().detach().requires_grad_()
    assert int((weight != 0).sum()) == pattern.nnz
    call = torch.nn.functional.linear if isinstance(layer, SparseLinear) else torch.nn.functional.conv2d
    expected, y = call(x, weight, layer.bias), layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    y.square().sum().backward()
    gradient = layer.values.grad
    assert gradient[0] == 0
    torch.testing.assert_close(gradient[1:], weight.grad.view(-1)[entry_of(layer.index)[1:]], rtol=0, atol=1e-10)


def test_an_unsound_index_is_refused():
    shape = (2, 3)
    for index, message in (([0, 0], "twice"), ([0, -2], "twice"), ([6], "must lie in"), ([-8], "must lie in")):
        with pytest.raises(UserError, match=message):
            Pattern(shape, torch.tensor(index, dtype=torch.int32)).check()
    Pattern(shape, torch.tensor([0, -1, -1, -3], dtype=torch.int32)).check()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31))
def test_the_best_units_are_those_a_greedy_loop_takes(seed):
    generator = torch.Generator().manual_seed(seed)
    groups, units = (int(size) for size in torch.randint(1, 6, (2,), generator=generator))
    scores = torch.randint(-2, 3, (groups, units), generator=generator).double()
    allowed = torch.rand(groups, units, generator=generator) > 0.3
    rooms = torch.randint(0, units + 2, (groups,), generator=generator)
    ties = torch.randperm(groups * units, generator=generator).view(groups, units)
    count = int(torch.randint(0, groups * units + 1, (1,), generator=generator))
    expected, used = torch.zeros_like(allowed), [0] * groups
    for group, unit in sorted(allowed.nonzero().tolist(), key=lambda at: (-float(scores[*at]), -int(ties[*at]))):
        if int(expected.sum()) < count and used[group] < int(rooms[group]):
            expected[group, unit] = True
            used[group] += 1
    assert torch.equal(best_units(scores, allowed, rooms, count, ties), expected)
