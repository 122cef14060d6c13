import pytest
import torch

from sift_compiler.errors import UnsupportedError
from sift_compiler.masking import transition


def change() -> transition.Transition:
    index = torch.tensor([7, 2, 5, 0], dtype=torch.int32)
    return transition.plan(index, torch.tensor([False, True, False, False]), torch.tensor([9, 5, 1]))


def test_freed_slots_take_new_positions_and_a_regrown_connection_keeps_its_slot():
    planned = change()
    assert planned.slots.tolist() == [0, 3]
    assert planned.entries.tolist() == [1, 9]
    assert (planned.active, planned.dropped, planned.grown, planned.regrown) == (4, 3, 3, 1)


def test_value_gradient_and_states_are_wiped_in_place_and_the_version_rises():
    index = torch.tensor([7, 2, 5, 0], dtype=torch.int32)
    values = torch.nn.Parameter(torch.ones(4))
    values.grad = torch.ones(4)
    state = {"momentum": torch.ones(4), "step": torch.tensor(3.0), "count": 3, "nothing": None}
    pointer, version = index.data_ptr(), index._version
    transition.apply(change(), index, values, state)
    assert index.tolist() == [1, 2, 5, 9]
    for tensor in (values, values.grad, state["momentum"]):
        assert tensor.tolist() == [0, 1, 1, 0]
    assert state["step"] == 3
    assert index.data_ptr() == pointer
    assert index._version > version


@pytest.mark.parametrize("entry", [torch.ones(3), torch.ones(1), [torch.ones(4)], {"a": torch.ones(4)}])
def test_an_unknown_state_is_refused_and_nothing_changes(entry):
    index = torch.tensor([7, 2, 5, 0], dtype=torch.int32)
    values = torch.ones(4)
    with pytest.raises(UnsupportedError, match="state 'odd' of a sparse weight"):
        transition.apply(change(), index, values, {"odd": entry})
    assert index.tolist() == [7, 2, 5, 0]
    assert values.tolist() == [1, 1, 1, 1]


def test_nothing_to_do_leaves_the_version():
    index = torch.tensor([7, 2], dtype=torch.int32)
    same = transition.plan(index, torch.tensor([False, False]), torch.tensor([2, 7]))
    version = index._version
    transition.apply(same, index, torch.ones(2), {})
    assert index._version == version


def test_fewer_that_come_leave_slots_empty_and_more_fill_them():
    index, values = torch.tensor([7, -1, 5, 0], dtype=torch.int32), torch.ones(4)
    fewer = transition.plan(index, torch.tensor([True, False, False]), torch.tensor([6]))
    assert (fewer.active, fewer.dropped, fewer.grown) == (2, 2, 1)
    transition.apply(fewer, index, values, {})
    assert index.tolist() == [7, -1, 6, -1]
    assert values.tolist() == [1, 1, 0, 0]
    more = transition.plan(index, torch.tensor([True, False]), torch.tensor([1, 2, 3]))
    transition.apply(more, index, values, {})
    assert index.tolist() == [7, 2, 1, 3]
    assert more.active == 4


def test_entries_of_dense_storage_fall_asleep_and_wake_with_their_values():
    index, values = torch.tensor([-3, 0, 2, -5], dtype=torch.int32), torch.arange(4.0)  # 1 and 3 are asleep
    state = {"momentum": torch.ones(4)}
    change = transition.switch(index, torch.tensor([False, True, True, False]))
    transition.apply(change, index, values, state)
    assert index.tolist() == [1, -2, 2, -5]
    assert values.tolist() == [0, 1, 2, 3]
    assert state["momentum"].tolist() == [1, 1, 1, 1]
    assert (change.active, change.dropped, change.grown) == (2, 1, 1)
