import math

import pytest

from sift_compiler.errors import UserError
from sift_compiler.masking import distributions, schedules
from sift_compiler.options import SET, RigL, Static


def test_update_steps_are_begin_to_end_every_delta_t():
    steps = [t for t in range(60) if schedules.is_update_step(t, begin=5, end=40, delta_t=10)]
    assert steps == [5, 15, 25, 35]
    assert not schedules.is_update_step(45, begin=5, end=45, delta_t=10)
    assert [t for t in range(5) if schedules.due(RigL(end_step=4, delta_t=2), t)] == [0, 2]
    assert not any(schedules.due(Static(), t) for t in range(5))


def test_drop_fraction_falls_as_a_cosine_or_stays():
    assert schedules.cosine(0, initial=0.3, end=75) == pytest.approx(0.3)
    assert schedules.cosine(25, initial=0.3, end=75) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert schedules.cosine(75, initial=0.3, end=75) == pytest.approx(0, abs=1e-12)
    assert schedules.drop_fraction(74, initial=0.3, end=75, decay="constant") == 0.3


def test_replaced_weights_are_the_floor():
    assert schedules.replaced_weights(10, 0.3) == 3
    assert schedules.replaced_weights(9, 0.5) == 4
    assert schedules.replaced_weights(7, 1.0) == 7
    assert schedules.replaced_weights(0, 1.0) == 0


def test_counts_of_rigl():
    shapes = [(30, 4), (1, 2, 1, 4)]
    assert distributions.active_weights(shapes[:1], distributions.uniform(shapes[:1], 0.5)) == [60]
    assert distributions.active_weights(shapes[1:], distributions.uniform(shapes[1:], 0.8)) == [2]
    assert distributions.active_weights([(30,)], distributions.uniform([(30,)], 0.1)) == [27]


def test_erk_of_three_small_layers():
    densities = distributions.erdos_renyi_kernel([(2, 4), (3, 6), (2, 4, 6)], 0.5)
    assert [1 - density for density in densities] == pytest.approx([0, 0.31, 0.655], abs=1e-3)


def resnet50():
    """Name, weight shape and output positions at 224 × 224 of every weight of ResNet-50 v1.5."""
    layers = [("conv1", (64, 3, 7, 7), 112 * 112)]
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        size = 56 // 2 ** (stage - 1)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            entering = size * 2 if stage > 1 and block == 0 else size
            layers += [
                (f"{name}.conv1", (width, channels, 1, 1), entering**2),
                (f"{name}.conv2", (width, width, 3, 3), size**2),
                (f"{name}.conv3", (4 * width, width, 1, 1), size**2),
            ]
            if block == 0:
                layers.append((f"{name}.downsample", (4 * width, channels, 1, 1), size**2))
            channels = 4 * width
    return [*layers, ("fc", (1000, 2048), 1)]


def test_erk_of_resnet50_at_80_percent():
    layers = resnet50()
    shapes = [shape for _, shape, _ in layers]
    densities = dict(zip([name for name, _, _ in layers], distributions.erdos_renyi_kernel(shapes, 0.8), strict=True))
    assert {name for name, density in densities.items() if density == 1} == {
        "layer1.0.conv1", "layer1.0.conv3", "layer1.0.downsample", "layer1.1.conv1", "layer1.1.conv3",
        "layer1.2.conv1", "layer1.2.conv3", "layer2.0.conv1",
    }  # fmt: skip
    by_stage = [densities[f"layer{stage}.1.conv2"] for stage in (1, 2, 3, 4)]
    assert by_stage == pytest.approx([0.361905, 0.176901, 0.087438, 0.043466], abs=1e-6)
    assert densities["conv1"] == pytest.approx(0.857195, abs=1e-6)
    assert densities["fc"] == pytest.approx(0.148176, abs=1e-6)
    assert densities["fc"] / (3048 / (1000 * 2048)) == pytest.approx(99.561667, abs=1e-5)  # epsilon
    dense = sum(math.prod(shape) * positions for _, shape, positions in layers)
    sparse = sum(math.prod(shape) * positions * densities[name] for name, shape, positions in layers)
    # Multiply-adds with weights only; counts that add elementwise work to both sides come out slightly higher.
    assert sparse / dense == pytest.approx(0.4138, abs=1e-4)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_impossible_sparsity_is_refused(sparsity):
    with pytest.raises(UserError, match="at least 0 and below 1"):
        distributions.erdos_renyi_kernel([(2, 2)], sparsity)


@pytest.mark.parametrize("method", [RigL, SET])
def test_forgotten_end_step_says_what_to_pass(method):
    with pytest.raises(UserError, match=r"needs end_step.*75 %.*end_step=int"):
        method(delta_t=10)


@pytest.mark.parametrize(
    "wrong",
    [{"delta_t": 0}, {"delta_t": 2.5}, {"drop_fraction": 1.5}, {"drop_fraction": "a"}, {"begin_step": -1}, {"begin_step": 20}, {"decay": "cosin"}, {"seed": 0.5}, {"skip_step": "no"}],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(UserError):
        RigL(**{"end_step": 10, **wrong})
