import pytest
import torch

from sift_compiler.errors import UnsupportedError
from sift_compiler.masking import transition


def change() -> transition.Transition:
    index = torch.tensor([7, 2, 5, 0], dtype=torch.int32)
    return transition.plan(index, torch.tensor([True, False, True, True]), torch.tensor([9, 5, 1]))


def test_freed_slots_take_new_positions_and_a_regrown_connection_keeps_its_slot():
    planned = change()
    assert planned.slots.tolist() == [0, 3]
    assert planned.positions.tolist() == [1, 9]
    assert (planned.dropped, planned.regrown) == (3, 1)


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
    same = transition.plan(index, torch.tensor([True, True]), torch.tensor([2, 7]))
    version = index._version
    transition.apply(same, index, torch.ones(2), {})
    assert index._version == version
