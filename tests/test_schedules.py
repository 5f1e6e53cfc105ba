"""Holds the four schedules: KDRL's own numbers, edges, exact zeros, and floats that a loss accepts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import kdloss
from kdloss.schedules import constant, cosine, linear_floor, switch


def test_kdrls_schedule_goes_from_5e_3_to_1e_3_at_5e_5_a_step():
    assert linear_floor(0) == 5e-3
    assert linear_floor(1) == pytest.approx(4.95e-3, rel=1e-12)
    assert linear_floor(40) == pytest.approx(3e-3, rel=1e-12)
    assert linear_floor(79) == pytest.approx(1.05e-3, rel=1e-12)
    # 5e-3 - 80 * 5e-5 is 1e-3 up to rounding; after that it is exactly the floor
    assert linear_floor(80) == pytest.approx(1e-3, rel=1e-12)
    assert [linear_floor(step) for step in (81, 1000, 10**9)] == [1e-3] * 3


def test_linear_floor_never_rises_and_never_leaves_its_bounds():
    weights = [linear_floor(step, start=0.3, slope=0.007, floor=0.1) for step in range(100)]
    assert all(a >= b for a, b in pairwise(weights))
    assert (weights[0], weights[-1], min(weights)) == (0.3, 0.1, 0.1)
    assert linear_floor(5, slope=0) == 5e-3
    # a start below the floor gives the floor
    assert linear_floor(0, start=1e-4, floor=1e-3) == 1e-3
    # with a negative floor the weight changes sign, as in the formula
    assert linear_floor(100, start=0.1, slope=0.01, floor=-1.0) == pytest.approx(-0.9, rel=1e-12)


def test_cosine_is_half_a_period_with_exact_ends():
    assert cosine(0, start=0.7, end=0.1, total_steps=8) == pytest.approx(0.7, rel=1e-15)
    assert cosine(4, start=0.7, end=0.1, total_steps=8) == pytest.approx(0.4, rel=1e-12)
    assert cosine(2, start=0.7, end=0.1, total_steps=8) == pytest.approx(0.4 + 0.3 * math.sqrt(0.5), rel=1e-12)
    assert [cosine(step, start=0.7, end=0.1, total_steps=8) for step in (8, 9, 10**9)] == [0.1] * 3
    assert cosine(1, start=0.7, end=0.1, total_steps=1) == 0.1
    # up and down are symmetric about the middle
    for step in range(9):
        down = cosine(step, start=1.0, end=0.0, total_steps=8)
        assert down + cosine(step, start=0.0, end=1.0, total_steps=8) == pytest.approx(1.0, rel=1e-12)


def test_switch_changes_at_its_step():
    assert [switch(step, before=1.0, after=0.25, at=3) for step in range(5)] == [1.0, 1.0, 1.0, 0.25, 0.25]
    assert switch(0, before=1.0, after=0.25, at=0) == 0.25


def test_constant_is_constant():
    assert {constant(step, value=0.005) for step in (0, 1, 10**9)} == {0.005}


@pytest.mark.parametrize(
    "weight",
    [switch(9, before=1.0, after=0.0, at=3), cosine(9, start=1.0, end=0.0, total_steps=9), constant(0, value=0.0)],
)
def test_a_weight_of_zero_is_exactly_zero_and_skips_its_term(weight):
    assert weight == 0
    logp = torch.tensor([-0.5, -1.0], requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    nan = torch.full((2,), math.nan)
    advantages = torch.tensor([1.0, -1.0])
    out = kdloss.kdrl_loss(logp, None, nan, advantages, loss_mask=mask, distill_loss_weight=weight)
    out.loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-0.5, 0.5]))
    assert out.kd == 0


@pytest.mark.parametrize("step", [-1, -0.5])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda step: constant(step, value=1.0),
        linear_floor,
        lambda step: cosine(step, start=1.0, end=0.0, total_steps=5),
        lambda step: switch(step, before=1.0, after=0.0, at=5),
    ],
)
def test_a_step_before_the_first_is_an_error(schedule, step):
    with pytest.raises(ValueError, match=f"step must be >= 0, got {step}"):
        schedule(step)


def test_a_schedule_of_no_steps_is_an_error():
    with pytest.raises(ValueError, match="total_steps must be > 0, got 0"):
        cosine(0, start=1.0, end=0.0, total_steps=0)
