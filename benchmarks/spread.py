"""Medians with quartiles, of samples and of ratios of paired samples.

A ratio is taken within each round, where both ran one after the other under the same load, and the median is taken of
those ratios: drift of the machine between rounds cancels, which it does not in a ratio of two medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median and quartiles of the samples of `rounds` rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int


def spread(samples: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation between order statistics (Hyndman and Fan's type 7, NumPy's default)."""
    if not samples:
        raise ValueError("spread: no samples")
    ordered = sorted(samples)
    return Spread(_quantile(ordered, 0.5), _quantile(ordered, 0.25), _quantile(ordered, 0.75), len(ordered))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of numerator / denominator, round by round."""
    if len(numerator) != len(denominator):
        raise ValueError(f"paired_ratio: {len(numerator)} and {len(denominator)} samples are no pairs")
    return spread([a / max(b, 1e-12) for a, b in zip(numerator, denominator, strict=True)])


def _quantile(ordered: Sequence[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
