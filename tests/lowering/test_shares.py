"""How workers share tiles: every group of every tile is computed exactly once, and loads are even."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sift_compiler.lowering.shares import shares


@given(
    tiles=st.integers(1, 40), segments=st.integers(1, 6), groups=st.integers(1, 50), workers=st.integers(1, 8)
)  # fmt: skip
def test_every_group_of_every_tile_once(tiles: int, segments: int, groups: int, workers: int) -> None:
    begins, pieces = shares(tiles, segments, groups, workers)
    assert begins[0] == 0
    assert begins[-1] == len(pieces)
    assert (np.diff(begins) >= 0).all()
    times = np.zeros((tiles, groups), int)
    for tile, segment, first, last in pieces:
        assert first == segment * groups // segments
        times[tile, first:last] += 1
    assert (times == 1).all()


def test_workers_get_equally_much() -> None:
    begins, pieces = shares(tiles=7, segments=2, groups=30, workers=2)
    load = [int((pieces[a:b, 3] - pieces[a:b, 2]).sum()) for a, b in itertools.pairwise(begins)]
    assert load == [105, 105]
    assert len(pieces) == 8, "a worker takes the segments of one tile together"


def test_one_tile_is_shared() -> None:
    begins, pieces = shares(tiles=1, segments=2, groups=5, workers=2)
    assert begins.tolist() == [0, 1, 2]
    assert pieces.tolist() == [[0, 0, 0, 2], [0, 1, 2, 5]]
