"""Winograd's convolution: matrices that are exact, layers that fit, and where it is chosen."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from sift_compiler.lowering.choose import choose, sparse_space
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.winograd import POINTS, Form, form, transforms

AVX512 = CpuFacts(name="avx512", lanes=16, registers=32)
AVX2 = CpuFacts(name="avx2", lanes=8, registers=16)
PROCESSORS = pytest.mark.parametrize("cpu", [AVX512, AVX2], ids=lambda cpu: cpu.name)
TILES = [(taps, reach) for taps in (2, 3, 4, 5) for reach in POINTS if reach > taps]


def correlation(d: npt.NDArray[np.float64], g: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Every output of the kernel ``g`` [r, r] on ``d`` [n, n]."""
    windows = np.lib.stride_tricks.sliding_window_view(d, g.shape)
    return np.einsum("ijab,ab->ij", windows, g)


@pytest.mark.parametrize(("taps", "reach"), TILES)
def test_the_transforms_give_the_correlation(taps: int, reach: int) -> None:
    made, rng = transforms(taps, reach), np.random.default_rng(0)
    b, g, a = (np.array(matrix) for matrix in (made.input, made.weight, made.output))
    assert made.size == reach - taps + 1
    assert (b.shape, g.shape, a.shape) == ((reach, reach), (reach, taps), (made.size, reach))
    for _ in range(20):
        data, kernel = rng.standard_normal((reach, reach)), rng.standard_normal((taps, taps))
        expected = correlation(data, kernel)
        tile = a @ ((g @ kernel @ g.T) * (b @ data @ b.T)) @ a.T
        assert np.abs(tile - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(("taps", "reach"), TILES)
def test_inputs_and_sums_are_transformed_by_exact_numbers(taps: int, reach: int) -> None:
    made = transforms(taps, reach)
    for matrix in (made.input, made.output):
        assert np.array_equal(np.array(matrix), np.array(matrix, dtype=np.float32).astype(np.float64))
    # An output reads what the matrices say that it reads: no row of either is empty.
    assert all(any(row) for matrix in (made.input, made.weight, made.output) for row in matrix)


def conv(kernel: tuple[int, int] = (3, 3), *, width: int = 16, sparsity: float = 0.5, **geometry: object) -> LayerSpec:
    shape = (width, width, *kernel)
    return LayerSpec(kind="conv2d", weight_shape=shape, nnz=round(np.prod(shape) * (1 - sparsity)), **geometry)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (conv((2, 2)), Form(taps=2, stride=1)),
        (conv((3, 3), padding=(0, 2)), Form(taps=3, stride=1)),
        (conv((4, 4)), Form(taps=4, stride=1)),
        (conv((5, 5)), Form(taps=5, stride=1)),
        (conv((3, 3), stride=(2, 2)), Form(taps=2, stride=2)),
        (conv((4, 3), stride=(2, 2)), Form(taps=2, stride=2)),
        (conv((5, 6), stride=(2, 2)), Form(taps=3, stride=2)),
        (conv((7, 7), stride=(2, 2)), Form(taps=4, stride=2)),
        (conv((10, 9), stride=(2, 2)), Form(taps=5, stride=2)),
    ],
    ids=lambda one: str(one.kernel_size) if isinstance(one, LayerSpec) else "",
)
def test_what_fits(spec: LayerSpec, expected: Form) -> None:
    assert form(spec) == expected
    assert expected.phases == spec.stride[0] ** 2


@pytest.mark.parametrize(
    "spec",
    [
        conv((1, 1)),
        conv((6, 6)),
        conv((7, 7)),
        conv((3, 5)),
        conv((1, 3)),
        conv((1, 1), stride=(2, 2)),
        conv((2, 2), stride=(2, 2)),
        conv((4, 5), stride=(2, 2)),
        conv((11, 11), stride=(2, 2)),
        conv(stride=(1, 2)),
        conv(stride=(2, 1)),
        conv(stride=(3, 3)),
        conv((9, 9), stride=(3, 3)),
        conv(dilation=(2, 2)),
        conv(dilation=(1, 2)),
        conv(sparsity=1.0),
        dataclasses.replace(conv(), groups=2),
        LayerSpec(kind="linear", weight_shape=(16, 16), nnz=128),
    ],
    ids=lambda one: f"{one.kind}{one.kernel_size}s{one.stride}d{one.dilation}g{one.groups}nnz{one.nnz}",
)
def test_what_does_not_fit(spec: LayerSpec) -> None:
    assert form(spec) is None
    if spec.kind == "conv2d" and spec.nnz:
        for shape in ((1, spec.in_channels, 28, 28), (1, spec.in_channels, 28, 28, 16)):
            assert "winograd" not in lanes(choose(spec, shape, AVX512, largest=4, frozen=True))


def layer(sparsity: float, width: int = 128, **geometry: object) -> LayerSpec:
    return conv(width=width, sparsity=sparsity, padding=(1, 1), **geometry)


def lanes(choices: tuple[Choice, ...]) -> list[str]:
    return [each.tile.lanes for each in choices]


def shapes(cpu: CpuFacts, images: int, width: int, size: int) -> list[tuple[int, ...]]:
    """The input in the usual order and, if images fill vectors, side by side."""
    several = [(images, width, size, size)]
    return several if images % cpu.lanes else [*several, (images // cpu.lanes, width, size, size, cpu.lanes)]


@PROCESSORS
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(("width", "size"), [(64, 56), (128, 28), (512, 7), (3, 9)])
def test_never_without_leave(cpu: CpuFacts, sparsity: float, width: int, size: int) -> None:
    for images in (1, 3, 16, 64):
        for shape in shapes(cpu, images, width, size):
            for frozen in (False, True):
                assert "winograd" not in lanes(choose(layer(sparsity, width), shape, cpu, frozen=frozen))


@PROCESSORS
@pytest.mark.parametrize("frozen", [False, True])
def test_moderate_sparsity_side_by_side(cpu: CpuFacts, frozen: bool) -> None:
    shape = (16 // cpu.lanes, 128, 28, 28, cpu.lanes)
    for sparsity in (0.0, 0.25, 0.5):
        (choice,) = choose(layer(sparsity), shape, cpu, largest=4, frozen=frozen)
        tile = choice.tile
        assert (tile.lanes, tile.vector, tile.height, tile.channels) == ("winograd", cpu.lanes, 4, 128)
        assert (choice.first, choice.count) == (0, 16)
        assert "Winograd" in choice.reason
        assert tile.rows * tile.width + 2 <= cpu.registers
    for sparsity in (0.9, 0.99):
        assert lanes(choose(layer(sparsity), shape, cpu, largest=4, frozen=frozen)) == ["batch"]


@PROCESSORS
@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize(("width", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_the_denser_the_rather(cpu: CpuFacts, images: int, width: int, size: int) -> None:
    for shape in shapes(cpu, images, width, size):
        taken = [
            lanes(choose(layer(tenth / 10, width), shape, cpu, largest=4, frozen=True)) == ["winograd"]
            for tenth in range(1, 10)
        ]
        assert taken == sorted(taken, reverse=True)


@PROCESSORS
def test_tiles_no_larger_than_allowed(cpu: CpuFacts) -> None:
    shape = (16 // cpu.lanes, 128, 28, 28, cpu.lanes)
    heights = [choose(layer(0.25), shape, cpu, largest=largest, frozen=True)[0].tile.height for largest in (2, 4)]
    assert heights == [2, 4]
    # Kernels of two rows leave more room in a tile that reads as much.
    two, shape = conv((2, 2), width=128, sparsity=0.0), (64 // cpu.lanes, 128, 56, 56, cpu.lanes)
    heights = [choose(two, shape, cpu, largest=largest, frozen=True)[0].tile.height for largest in (2, 4)]
    assert heights == [3, 5]


@PROCESSORS
def test_the_first_layer_of_a_network_side_by_side(cpu: CpuFacts) -> None:
    spec = LayerSpec(kind="conv2d", weight_shape=(64, 3, 7, 7), nnz=64 * 147, stride=(2, 2), padding=(3, 3))
    shape = (16 // cpu.lanes, 3, 224, 224, cpu.lanes)
    (choice,) = choose(spec, shape, cpu, largest=4)
    assert (choice.tile.lanes, choice.tile.height, choice.tile.channels) == ("winograd", 3, 12)
    assert lanes(choose(spec, shape, cpu, largest=2)) == ["batch"]


def test_weights_that_are_made_anew_at_every_call_count() -> None:
    spec, one_image = layer(0.25), (1, 128, 40, 40)
    assert lanes(choose(spec, one_image, AVX512, largest=4, frozen=True)) == ["winograd"]
    assert lanes(choose(spec, one_image, AVX512, largest=4, frozen=False)) == ["space"]


def test_weights_that_would_take_too_much_memory_are_not_made() -> None:
    for width, height in ((512, 4), (768, 2), (1024, 0)):
        (choice,) = choose(layer(0.0, width), (4, width, 14, 14, 16), AVX512, largest=4, frozen=True)
        assert choice.tile.lanes == ("winograd" if height else "batch"), width
        assert not height or choice.tile.height == height


@PROCESSORS
@pytest.mark.parametrize("images", [2, 15, 17, 33])
def test_all_images_are_in_one_part(cpu: CpuFacts, images: int) -> None:
    (choice,) = choose(layer(0.0), (images, 128, 56, 56), cpu, largest=4, frozen=True)
    assert (choice.tile.lanes, choice.first, choice.count) == ("winograd", 0, images)
    alone = sparse_space(layer(0.0), choice, (56, 56), cpu)
    assert (alone.tile.lanes, alone.first, alone.count) == ("space", 0, images)
