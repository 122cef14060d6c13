"""Measured tiles: time a few candidates on the real mask, remember the fastest on disk, and take it from there ever after.

Given the store the choice is deterministic: an entry is taken as it is and nothing is measured again. Without an entry, and without
leave to measure, the rules of lowering.choose decide. A tile changes the order of sums, hence last digits of results.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sift_compiler.lowering.candidates import candidates
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN
from sift_compiler.lowering.plan import Choice, Timing
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile
from sift_compiler.lowering.tuning_key import tuning_key
from sift_compiler.options import TUNING, Tune
from sift_compiler.runtimes.cache import Form, KernelCache, default_folder
from sift_compiler.runtimes.fingerprint import Fingerprint
from sift_compiler.runtimes.tvm.build import fingerprint
from sift_compiler.runtimes.tvm.lane_kernel import lane_tile
from sift_compiler.runtimes.tvm.lane_part import LanePart
from sift_compiler.runtimes.tvm.pair_kernel import pair_tile
from sift_compiler.runtimes.tvm.pair_part import PairPart
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.prepare import prepare_live
from sift_compiler.runtimes.tvm.row_part import RowPart
from sift_compiler.runtimes.tvm.sparse_kernel import sparse_tile
from sift_compiler.runtimes.tvm.winograd_kernel import winograd_lanes
from sift_compiler.runtimes.tvm.winograd_part import WinogradPart
from sift_compiler.runtimes.tvm.winograd_space import winograd_space

_log = logging.getLogger(__name__)
_FLOPS_OF_A_TRIAL = 2e8
"""Per worker; a few milliseconds."""
_ROUNDS = {"quick": 5, "full": 9}
_GIVE_UP = (2.0, 1.3, 1.15, 1.06)
"""After each round candidates this much slower than the fastest are out; the last number holds on."""
_MEASURED = ("batch", "space", "pairs", "winograd")
_WORTH = 0.98
"""The rules' tile is left only for one that takes at most this share of its time: less is noise."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was measured for one part of a layer, per image or token. The first timing is that of the rules' tile."""

    level: Tune
    tile: Tile
    timings: tuple[Timing, ...]

    def microseconds(self, count: int) -> float:
        """What the chosen tile takes for ``count`` images or tokens."""
        return count * next(timing.microseconds for timing in self.timings if timing.tile == self.tile)

    def timings_of(self, count: int) -> tuple[Timing, ...]:
        """All timings, for ``count`` images or tokens."""
        return tuple(Timing(tile=each.tile, microseconds=count * each.microseconds) for each in self.timings)

    def reason(self, count: int) -> str:
        """Why this tile, in words, with times for ``count`` images or tokens."""
        times = {timing.tile: count * timing.microseconds for timing in self.timings}
        rules = self.timings[0]
        if self.tile == rules.tile:
            return f"measured {times[rules.tile]:.0f} µs: none of {len(times) - 1} others is {1 - _WORTH:.0%} faster than the rules' tile"
        return f"measured {times[self.tile]:.0f} µs, fastest of {len(times)}; the rules' tile ({rules.tile}) took {times[rules.tile]:.0f} µs"

    def to_plain(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Tuned:
        """What :meth:`to_plain` gave; raises whatever damaged data makes it raise."""
        timings = tuple(
            Timing(tile=Tile(**each["tile"]), microseconds=float(each["microseconds"])) for each in plain["timings"]
        )
        made = cls(level=plain["level"], tile=Tile(**plain["tile"]), timings=timings)
        if made.level not in TUNING or made.tile not in [timing.tile for timing in timings]:
            raise ValueError("its tile was not measured")
        return made


def _write(tuned: Tuned, path: Path) -> None:
    path.write_text(json.dumps(tuned.to_plain(), indent=1), encoding="utf-8")


def _read(path: Path) -> Tuned:
    return Tuned.from_plain(json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Tuner:
    """Chooses tiles by what was measured.

    Attributes:
        level: ``"off"`` looks into the store and never measures; ``"quick"`` and ``"full"`` measure what is not there.
    """

    level: Tune = "off"

    def choose(
        self, spec: LayerSpec, choice: Choice, size: tuple[int, int], index: npt.NDArray[np.int32], cpu: CpuFacts,
        threads: int, side_by_side: bool = False,
    ) -> Choice:  # fmt: skip
        """``choice`` with the tile that measured fastest, or as it is.

        Args:
            spec: the layer.
            choice: what the rules chose for one part of a batch.
            size: height and width of the input; (1, 1) for a linear layer.
            index: int32 [slots], the mask.
            cpu: the processor.
            threads: workers of the kernel.
            side_by_side: images lie side by side in vectors before and after the layer, see LanePart.
        """
        tuned = self.look_up(spec, choice, size, index, cpu, threads, side_by_side)
        if tuned is None:
            return choice
        return dataclasses.replace(
            choice, tile=_narrow(tuned.tile, spec, choice), reason=tuned.reason(choice.count), microseconds=tuned.microseconds(choice.count),
            timings=tuned.timings_of(choice.count),
        )  # fmt: skip

    def look_up(
        self, spec: LayerSpec, choice: Choice, size: tuple[int, int], index: npt.NDArray[np.int32], cpu: CpuFacts,
        threads: int, side_by_side: bool = False,
    ) -> Tuned | None:  # fmt: skip
        """What is known, or now measured, about a part; None if nothing is. Arguments as those of :meth:`choose`."""
        if choice.tile.lanes not in _MEASURED or not (index >= 0).any():
            return None
        constants = tuning_key(spec, choice, size, index, cpu, threads)
        store = KernelCache(
            default_folder() / "tiles", {"tile": Form(_write, _read)}, what="measured tile",
            otherwise="Every process measures its tiles anew", again="It is measured anew",
        )  # fmt: skip
        generator = _generator(choice.tile, side_by_side)
        keys = {level: _key(level, generator, constants, cpu) for level in ("full", "quick")}
        # A thorough measurement serves who would do with a quick one, never the other way round.
        for level in ("full", "quick") if self.level != "full" else ("full",):
            key = keys[level]
            found = None if key is None else store.try_load(key)
            if found is not None:
                return found
        if self.level == "off":
            return None
        key = keys[self.level]

        def measured() -> Tuned:
            return measure(spec, choice, size, index, cpu, threads, self.level, side_by_side)

        return measured() if key is None else store.get(key, measured)


def _generator(tile: Tile, side_by_side: bool) -> Callable[..., Any]:
    """What the code of the rules' tile comes from."""
    if tile.lanes == "winograd":
        return winograd_lanes if side_by_side else winograd_space
    return lane_tile if side_by_side else pair_tile if tile.lanes == "pairs" else sparse_tile


def _narrow(tile: Tile, spec: LayerSpec, choice: Choice) -> Tile:
    """A tile of tokens no wider than there are tokens: it may have been measured with more of them."""
    if spec.kind != "linear":
        return tile
    return dataclasses.replace(tile, width=min(tile.width, choice.count // tile.vector))


def _key(level: str, generator: Callable[..., Any], constants: dict[str, Any], cpu: CpuFacts) -> Fingerprint | None:
    key = fingerprint(generator, cpu.name, {**constants, "level": level})
    return None if key is None else dataclasses.replace(key, generator=f"tile of {key.generator}")


@torch.no_grad()
def measure(
    spec: LayerSpec, choice: Choice, size: tuple[int, int], index: npt.NDArray[np.int32], cpu: CpuFacts, threads: int,
    level: Tune, side_by_side: bool = False,
) -> Tuned:  # fmt: skip
    """Time the candidates of ``level`` turn by turn; arguments as those of :meth:`Tuner.choose`.

    With one worker times are processor time, which leaves out what other programs took of the core.
    """
    begin = time.perf_counter()
    whole = (
        spec.kind == "linear" or choice.tile.lanes == "space" or (choice.tile.lanes == "winograd" and not side_by_side)
    )
    count = min(choice.count, 1024) if whole else choice.tile.vector
    part_of = dataclasses.replace(choice, first=0, count=count)
    tiles = candidates(spec, part_of, size, cpu, level)
    made = [dataclasses.replace(part_of, tile=tile) for tile in tiles]
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        parts = list(pool.map(lambda each: _part(spec, each, size, cpu, threads, side_by_side), made))
    x, y = _tensors(spec, count, size, choice.tile.vector if side_by_side else 0)
    values, bias = torch.randn(spec.nnz), torch.zeros(spec.out_channels)
    share = min(1.0, _FLOPS_OF_A_TRIAL * threads / max(1, spec.flops(y.numel() // spec.out_channels)))
    trials: list[Callable[[], None]] = []
    factors: list[float] = []
    for part in parts:
        part.repack(index)
        trial, factor = part.trial(x, values, bias, y, share)
        trials.append(trial)
        factors.append(factor)
    best = _race(trials, factors, _ROUNDS[level], one_thread=threads == 1)
    timings = tuple(Timing(tile=tile, microseconds=1e6 * each / count) for tile, each in zip(tiles, best, strict=True))
    winner = min(timings, key=lambda timing: timing.microseconds)
    if winner.microseconds > _WORTH * timings[0].microseconds:
        winner = timings[0]
    tuned = Tuned(level=level, tile=winner.tile, timings=timings)
    _log.info(
        "measured %d tiles of %s in %.0f ms: %s", len(tiles), spec.weight_shape, 1e3 * (time.perf_counter() - begin),
        tuned.reason(choice.count),
    )  # fmt: skip
    return tuned


def _part(
    spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, threads: int, side_by_side: bool
) -> Part | PairPart | LanePart | WinogradPart:
    """What runs whole vectors of images, positions or tokens."""
    part = prepare_live(spec, choice, size, cpu, threads, PLAIN, False, side_by_side)
    assert not isinstance(part, RowPart), "row programs have no other tiles"
    return part


def _tensors(spec: LayerSpec, count: int, size: tuple[int, int], vector: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of ``count`` images or tokens, with ``vector`` > 0 as many images side by side."""
    if spec.kind == "linear":
        return torch.randn(count, spec.in_channels), torch.empty(count, spec.out_channels)
    x, y = (spec.in_channels, *size), (spec.out_channels, *spec.output_size(*size))
    if not vector:
        return torch.randn(count, *x), torch.empty(count, *y)
    return torch.randn(count // vector, *x, vector), torch.empty(count // vector, *y, vector)


def _race(trials: list[Callable[[], None]], factors: list[float], rounds: int, one_thread: bool) -> list[float]:
    """Seconds of each whole call: the best of interleaved trials; whoever falls behind drops out early."""
    clock = time.thread_time if one_thread else time.perf_counter
    best = [float("inf")] * len(trials)
    alive = list(range(len(trials)))
    for turn in range(rounds):
        for which in alive:
            if not turn:
                trials[which]()  # caches and pages
            begin = clock()
            trials[which]()
            best[which] = min(best[which], factors[which] * (clock() - begin))
        limit = _GIVE_UP[min(turn, len(_GIVE_UP) - 1)] * min(best)
        alive = [which for which in alive if best[which] <= limit]
        if len(alive) == 1:
            break
    return best
