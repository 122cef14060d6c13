"""Memory of outputs is used again only when nobody holds it."""

from __future__ import annotations

import threading

import pytest
import torch

from sift_compiler.runtimes.tvm import output
from sift_compiler.runtimes.tvm.output import fresh_output

LARGE = (2, 1024, 1024)  # 8 MB


@pytest.fixture(autouse=True)
def _nothing_kept():
    output._local.__dict__.pop("kept", None)
    yield
    output._local.__dict__.pop("kept", None)


def test_what_was_released_is_used_again():
    first = fresh_output(LARGE)
    place = first.data_ptr()
    del first
    again = fresh_output((1024, 2048))
    assert again.data_ptr() == place
    assert again.shape == (1024, 2048)
    assert again.is_contiguous()


@pytest.mark.parametrize("hold", [lambda y: y, lambda y: y[1, 5:], lambda y: y.numpy(), lambda y: y.untyped_storage()])
def test_what_somebody_holds_is_left_alone(hold):
    y = fresh_output(LARGE).fill_(1)
    place, held = y.data_ptr(), hold(y)
    del y
    other = fresh_output(LARGE).fill_(2)
    assert other.data_ptr() != place
    assert float(torch.as_tensor(held if not isinstance(held, torch.UntypedStorage) else 1.0).max()) == 1


def test_little_is_kept_and_small_outputs_take_no_large_memory():
    many = [fresh_output(LARGE) for _ in range(20)]
    assert len(output._local.kept) == output._MOST_KEPT
    del many
    place = {block.storage.data_ptr() for block in output._local.kept}
    assert fresh_output((1024,)).data_ptr() not in place
    assert fresh_output((64, 1024, 1024)).data_ptr() not in place


def test_each_thread_has_its_own():
    y = fresh_output(LARGE)
    place, seen = y.data_ptr(), []
    del y
    thread = threading.Thread(target=lambda: seen.append(fresh_output(LARGE)))
    thread.start()
    thread.join()
    assert seen[0].data_ptr() != place
