"""Epilogues as TIR expressions on finished sums: scale and shift per channel, residual, activation."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm.script import tirx as T

from sift_compiler.errors import UnsupportedError
from sift_compiler.lowering.epilogue import Epilogue


def finished(
    epilogue: Epilogue, value: Any, lanes: int, scale: Any, shift: Any, residual: Any, dtype: str = "float32"
) -> Any:
    """The expression that is stored for the sums ``value``.

    Args:
        epilogue: what there is to do.
        value: expression of ``lanes`` lanes.
        lanes: 1 for a scalar.
        scale, shift, residual: expressions of as many lanes.
        dtype: of all of them. Activations that need e^x are written for float32.
    """
    if epilogue.scaled:
        value = value * scale + shift
    if epilogue.residual:
        value = value + residual
    return _ACTIVATIONS[epilogue.activation](value, lanes, dtype)


def at_run_time(epilogue: Epilogue) -> tuple[Epilogue, int, float]:
    """What of an epilogue is compiled if the rest is said at every call; and the rest: whether a residual is added, and the lowest result.

    ReLU is a lowest result of 0. A network has most layers with and without either, and code for each would be compiled three times.
    Other activations are compiled with all that comes before them.
    """
    if epilogue.activation not in ("none", "relu"):
        return epilogue, 0, -math.inf
    return Epilogue(scaled=epilogue.scaled), int(epilogue.residual), 0.0 if epilogue.activation == "relu" else -math.inf


def finished_at_run_time(
    epilogue: Epilogue,
    value: Any,
    lanes: int,
    scale: Any,
    shift: Any,
    residual: Any,
    added: Any,
    lowest: Any,
    dtype: str = "float32",
) -> Any:
    """As :func:`finished`, for the first part of :func:`at_run_time` and the other two as scalars; the residual is read only if it is added."""
    value = finished(epilogue, value, lanes, scale, shift, residual, dtype)
    if epilogue.activation != "none":
        return value
    value = T.if_then_else(added > 0, value + residual, value)
    lowest = T.cast(lowest, dtype)
    lowest = T.broadcast(lowest, lanes) if lanes > 1 else lowest
    # Not T.max: a NaN must stay one.
    return T.Select(value < lowest, lowest, value)


def _wide(value: float, lanes: int, dtype: str = "float32") -> Any:
    """``value`` in every lane."""
    one = tvm.tirx.const(value, dtype)
    return T.broadcast(one, lanes) if lanes > 1 else one


def _float32(dtype: str) -> None:
    if dtype != "float32":
        raise UnsupportedError(f"e^x is written for float32, not for {dtype}. Leave this activation to torch.")


def _relu(x: Any, lanes: int, dtype: str) -> Any:
    zero = _wide(0.0, lanes, dtype)
    # Not T.max: a NaN must stay one.
    return T.Select(x < zero, zero, x)


def _relu6(x: Any, lanes: int, dtype: str) -> Any:
    six = _wide(6.0, lanes, dtype)
    return _relu(T.Select(x > six, six, x), lanes, dtype)


def _hard_swish(x: Any, lanes: int, dtype: str) -> Any:
    return x * _relu6(x + _wide(3.0, lanes, dtype), lanes, dtype) * _wide(1 / 6, lanes, dtype)


def _silu(x: Any, lanes: int, dtype: str) -> Any:
    _float32(dtype)
    one = _wide(1.0, lanes)
    return x / (one + exponential(_wide(0.0, lanes) - x, lanes))


def _gelu(x: Any, lanes: int, dtype: str) -> Any:
    """x · (1 + erf(x / √2)) / 2, erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7."""
    _float32(dtype)
    one = _wide(1.0, lanes)
    z = x * _wide(math.sqrt(0.5), lanes)
    size = T.Select(z < _wide(0.0, lanes), _wide(0.0, lanes) - z, z)
    t = one / (one + _wide(0.3275911, lanes) * size)
    tail = _wide(1.061405429, lanes)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = tail * t + _wide(coefficient, lanes)
    tail = tail * t * exponential(_wide(0.0, lanes) - z * z, lanes)
    half = _wide(0.5, lanes)
    return x * T.Select(z < _wide(0.0, lanes), half * tail, one - half * tail)


def _gelu_tanh(x: Any, lanes: int, dtype: str) -> Any:
    """x · (1 + tanh u) / 2 = x · logistic(2u) with u = √(2/π) (x + 0.044715 x³)."""
    _float32(dtype)
    double = _wide(2 * math.sqrt(2 / math.pi), lanes) * (x + _wide(0.044715, lanes) * x * x * x)
    return x / (_wide(1.0, lanes) + exponential(_wide(0.0, lanes) - double, lanes))


def exponential(x: Any, lanes: int) -> Any:
    """e^x, relative error about 1e-7; x is held within ±87, so results are never denormal or infinite.

    x = n · ln 2 + r with |r| ≤ ln 2 / 2, as in Cephes' expf: a polynomial in r times 2^n. Adding 1.5 · 2^23 brings n
    to the lowest bits, whatever n is (a conversion of NaN to an integer has no meaning). LLVM would call expf for every lane.
    """
    low, high = _wide(-87.0, lanes), _wide(87.0, lanes)
    x = T.Select(x < low, low, T.Select(x > high, high, x))
    n = T.nearbyint(x * _wide(math.log2(math.e), lanes))
    shifted = n + _wide(12582912.0, lanes)
    r = x - n * _wide(0.693359375, lanes) - n * _wide(-2.12194440e-4, lanes)
    polynomial = _wide(1.9875691500e-4, lanes)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        polynomial = polynomial * r + _wide(c, lanes)
    polynomial = polynomial * r * r + r + _wide(1.0, lanes)
    integers = "int32" if lanes == 1 else f"int32x{lanes}"
    floats = "float32" if lanes == 1 else f"float32x{lanes}"
    bits = T.reinterpret(integers, polynomial) + T.shift_left(T.reinterpret(integers, shifted), _whole(23, lanes))
    return T.reinterpret(floats, bits)


def _whole(value: int, lanes: int) -> Any:
    return T.broadcast(T.int32(value), lanes) if lanes > 1 else T.int32(value)


_ACTIVATIONS = {
    "none": lambda x, lanes, dtype: x, "relu": _relu, "relu6": _relu6, "hard_swish": _hard_swish, "silu": _silu, "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}  # fmt: skip
