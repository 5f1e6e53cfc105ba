"""Schedules of `rl_loss_weight` and `distill_loss_weight`: pure functions of the step.

A weight of 0 from `switch` or `cosine` is exactly 0, so the loss skips its term.
"""

from __future__ import annotations

import math

from . import _checks


def constant(step: int, *, value: float) -> float:
    """`value` at every step.

    Args:
        step: optimizer steps done, >= 0.
        value: the weight.

    Returns:
        The weight.

    Raises:
        ValueError: `step` is negative, or `value` is not finite.

    Example:
        >>> from kdloss import schedules
        >>> weights = [schedules.constant(step, value=0.25) for step in (0, 10, 1000)]
        >>> weights
        [0.25, 0.25, 0.25]
    """
    _checks.non_negative(step=step)
    _checks.finite(value=value)
    return value


def linear_floor(step: int, *, start: float = 5e-3, slope: float = 5e-5, floor: float = 1e-3) -> float:
    """max(start - slope * step, floor): from 5e-3 down to 1e-3 in 80 steps, KDRL's schedule.

    Args:
        step: optimizer steps done, >= 0.
        start: the weight at step 0.
        slope: the decrease per step, >= 0.
        floor: the smallest weight.

    Returns:
        The weight at `step`.

    Raises:
        ValueError: `step` or `slope` is negative, or a value is not finite.

    Example:
        >>> from kdloss import schedules
        >>> weights = [schedules.linear_floor(step) for step in (0, 40, 80, 1000)]
        >>> [round(weight, 6) for weight in weights]
        [0.005, 0.003, 0.001, 0.001]

    Source:
        KDRL (arXiv 2506.02208), section 4.
    """
    _checks.non_negative(step=step, slope=slope)
    _checks.finite(start=start, slope=slope, floor=floor)
    return max(start - slope * step, floor)


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """end + (start - end) * (1 + cos(pi * step / total_steps)) / 2, and `end` from `total_steps` on.

    Args:
        step: optimizer steps done, >= 0.
        start: the weight at step 0.
        end: the weight from step `total_steps` on.
        total_steps: steps from `start` to `end`, > 0.

    Returns:
        The weight at `step`.

    Raises:
        ValueError: `step` is negative, `total_steps` is not > 0, or a value is not finite.

    Example:
        >>> from kdloss import schedules
        >>> weights = [schedules.cosine(step, start=1.0, end=0.0, total_steps=100) for step in (0, 50, 100, 200)]
        >>> [round(weight, 6) for weight in weights]
        [1.0, 0.5, 0.0, 0.0]

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
    """`before` until step `at`, `after` from that step on: distil first and then reinforce, or the reverse.

    Args:
        step: optimizer steps done, >= 0.
        before: the weight at steps below `at`.
        after: the weight from step `at` on.
        at: the step of the switch, >= 0.

    Returns:
        The weight at `step`.

    Raises:
        ValueError: `step` or `at` is negative, or a value is not finite.

    Example:
        >>> from kdloss import schedules
        >>> weights = [schedules.switch(step, before=0.0, after=1.0, at=100) for step in (0, 99, 100)]
        >>> weights
        [0.0, 0.0, 1.0]
    """
    _checks.non_negative(step=step, at=at)
    _checks.finite(before=before, after=after)
    return before if step < at else after
