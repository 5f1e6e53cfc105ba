"""Weights over training: pure functions of the step, for `rl_loss_weight` and `distill_loss_weight`.

A weight of 0 from `switch` or `cosine` is exactly 0, so the term that it multiplies is skipped.
"""

from __future__ import annotations

import math

from . import _checks


def constant(step: int, *, value: float) -> float:
    """`value` at every step.

    Raises:
        ValueError: `step` is negative, or `value` is not finite.
    """
    _checks.non_negative(step=step)
    _checks.finite(value=value)
    return value


def linear_floor(step: int, *, start: float = 5e-3, slope: float = 5e-5, floor: float = 1e-3) -> float:
    """max(start - slope * step, floor): from 5e-3 down to 1e-3 in 80 steps, KDRL's schedule.

    Args:
        step: optimizer steps done, >= 0.
        start: the weight at step 0.
        slope: >= 0, what every step takes off.
        floor: the weight is never below.

    Raises:
        ValueError: `step` or `slope` is negative, or a value is not finite.

    Source:
        KDRL (arXiv 2506.02208), section 4.
    """
    _checks.non_negative(step=step, slope=slope)
    _checks.finite(start=start, slope=slope, floor=floor)
    return max(start - slope * step, floor)


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """end + (start - end) * (1 + cos(pi * step / total_steps)) / 2, and `end` from `total_steps` on.

    Raises:
        ValueError: `step` is negative, `total_steps` is not > 0, or a value is not finite.

    Source:
        SGDR (arXiv 1608.03983), eq. 5, one period.
    """
    _checks.non_negative(step=step)
    _checks.positive(total_steps=total_steps)
    _checks.finite(start=start, end=end)
    if step >= total_steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / total_steps)) / 2


def switch(step: int, *, before: float, after: float, at: int) -> float:
    """`before` until step `at`, `after` from it on: distil first and then reinforce, or the reverse.

    Raises:
        ValueError: `step` or `at` is negative, or a value is not finite.
    """
    _checks.non_negative(step=step, at=at)
    _checks.finite(before=before, after=after)
    return before if step < at else after
