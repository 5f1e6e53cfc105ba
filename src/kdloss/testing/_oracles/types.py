"""Shared by the NumPy float64 oracles: array types, named tuples, conversion of arguments, arithmetic.

Every oracle loops over the trained tokens and never reads the others, so NaN or inf under a mask has no effect. Scalars
are Python floats, whose arithmetic gives inf and NaN without warnings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

ArrayLike: TypeAlias = npt.ArrayLike
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
AnyArray: TypeAlias = npt.NDArray[Any]
Index: TypeAlias = tuple[int, ...]


class LogprobsAndEntropy(NamedTuple):
    """Log-probs of the labels, (...,) or (..., K), and entropies of the rows, (...,), nats."""

    logp: FloatArray
    entropy: FloatArray


class LinearGradients(NamedTuple):
    """Gradients of a linear head: hidden (T, D), weight (V, D), bias (V,) or None without a bias."""

    hidden: FloatArray
    weight: FloatArray
    bias: FloatArray | None


class Surrogate(NamedTuple):
    """A policy-gradient loss per token: loss and ratio are float64, clipped and dual_clipped are bool, all (T,)."""

    loss: FloatArray
    ratio: FloatArray
    clipped: BoolArray
    dual_clipped: BoolArray


class LossOutput(NamedTuple):
    """A scalar loss with its parts: loss, rl, kd, reverse_kl are 0-dim; ratio, clipped, dual_clipped are (T,)."""

    loss: FloatArray
    rl: FloatArray
    kd: FloatArray
    reverse_kl: FloatArray
    ratio: FloatArray
    clipped: BoolArray
    dual_clipped: BoolArray


def as_float(name: str, x: ArrayLike, *, shape: tuple[int, ...] | None = None) -> FloatArray:
    """`x` as float64; a ValueError if it does not have `shape`."""
    array = np.asarray(x, dtype=np.float64)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def as_int(name: str, x: ArrayLike, *, shape: tuple[int, ...] | None = None) -> IntArray:
    """`x` as int64; a TypeError for floats, a ValueError if it does not have `shape`."""
    array = np.asarray(x)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array.astype(np.int64)


def as_mask(name: str, x: ArrayLike, *, shape: tuple[int, ...]) -> BoolArray:
    """`x` as a mask; a TypeError for any dtype other than bool, a ValueError if it does not have `shape`."""
    array = np.asarray(x)
    if array.dtype != np.bool_:
        raise TypeError(f"{name} must be bool, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def as_wide(x: ArrayLike) -> AnyArray:
    """`x` as float64, int64 or bool, the widest dtype of its kind."""
    array = np.asarray(x)
    if array.dtype == np.bool_:
        return array
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


def trained(mask: BoolArray) -> Iterator[Index]:
    """The indices of the trained tokens, in order."""
    return (index for index in np.ndindex(mask.shape) if mask[index])


def segments(cu_seqlens: ArrayLike, total_tokens: int | None = None) -> list[range]:
    """The positions of each sequence; `cu_seqlens` must start at 0, not decrease, and end at `total_tokens` or None."""
    bounds = [int(c) for c in as_int("cu_seqlens", cu_seqlens)]
    total_tokens = bounds[-1] if total_tokens is None and bounds else total_tokens
    fits = bounds and bounds[0] == 0 and bounds[-1] == total_tokens and all(a <= b for a, b in pairwise(bounds))
    if not fits:
        raise ValueError(f"cu_seqlens must rise from 0 to {total_tokens}, got {bounds}")
    return [range(start, stop) for start, stop in pairwise(bounds)]


def exp(x: float) -> float:
    """e^x, or inf if it overflows float64."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def times(*factors: float) -> float:
    """The product, and exactly 0 if a factor is exactly 0: a ratio of inf times an advantage of 0 is 0, not NaN."""
    return 0.0 if 0.0 in factors else math.prod(factors)


def scalar(x: float) -> FloatArray:
    """A 0-dim float64 array."""
    return np.asarray(x, dtype=np.float64)
