"""Holds the baselines of the sampled reverse KL: by enumeration, no constant is quieter, and none moves the mean.

Every token that the behaviour policy may sample is weighted by its probability. Values against the oracle, error texts
and compilation are tested in `every_function`.
"""

from __future__ import annotations

import math
from typing import Literal
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._divergences import baseline as module
from simulated_ranks import Ranks

# float64; sums of at most 9 outcomes
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
# the row of docs/gradients.md and of the README
Q, P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
KINDS: tuple[Literal["value", "optimal"], ...] = ("value", "optimal")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(q: Tensor, p: Tensor, mu: Tensor | None, constant: Tensor | float) -> Tensor:
    """(V, V): the gradient of the surrogate on r - constant in the logits, for every token that may be sampled."""
    size = len(q)
    logits = q.log().expand(size, size).clone().requires_grad_()
    logp = kdloss.token_logprobs(logits, torch.arange(size))
    mask = torch.ones(size, dtype=torch.bool)
    reward = kdloss.reverse_kl_reward(logp, p.log(), loss_mask=mask) - constant
    surrogate = kdloss.importance_sampled_surrogate(logp, None if mu is None else mu.log(), reward, loss_mask=mask)
    return torch.autograd.grad(surrogate.loss.sum(), logits)[0]


def moments(q: Tensor, p: Tensor, mu: Tensor | None, constant: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance of the gradient over the tokens that mu samples; None: on-policy."""
    each, weight = gradients(q, p, mu, constant), q if mu is None else mu
    mean = (weight[:, None] * each).sum(0)
    return mean, (weight * (each - mean).square().sum(-1)).sum()


ROWS = [
    pytest.param(Q, P, None, id="on-policy"),
    pytest.param(Q, P, torch.full((3,), 1 / 3, dtype=torch.float64), id="uniform"),
    *(
        pytest.param(
            *((scale * random(9, seed=seed + i)).softmax(-1) for i in range(2)),
            random(9, seed=seed + 2).softmax(-1) if off else None,
            id=f"random {scale}{', off-policy' if off else ''}",
        )
        for seed, scale in ((0, 1.0), (3, 3.0))
        for off in (False, True)
    ),
]


@pytest.mark.parametrize(("q", "p", "mu"), ROWS)
def test_no_constant_is_quieter_than_the_optimal_one_and_none_moves_the_mean(
    q: Tensor, p: Tensor, mu: Tensor | None
) -> None:
    value, optimal = (
        kdloss.reverse_kl_baseline(q.log(), p.log(), kind=kind, behaviour_logits=None if mu is None else mu.log())
        for kind in KINDS
    )
    exact = q.log().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(kdloss.reverse_kl(exact, p.log()), exact)
    _, least = moments(q, p, mu, optimal)
    for constant in (value, optimal, 0.0, 1.0, *(optimal + x for x in (-1.0, -1e-2, 1e-2, 1.0))):
        mean, variance = moments(q, p, mu, constant)
        torch.testing.assert_close(mean, wanted, **CLOSE)
        assert variance >= least
        if constant is not optimal:
            # a parabola: E_mu[rho² |s|²] is its curvature
            score = torch.eye(len(q), dtype=torch.float64) - q
            curvature = (q * (1 if mu is None else q / mu) * score.square().sum(-1)).sum()
            torch.testing.assert_close(variance, least + curvature * (constant - optimal) ** 2, **CLOSE)


def test_the_baseline_of_the_policy_that_samples_is_the_right_one() -> None:
    """Off-policy the on-policy constant is louder, and may be louder than none."""
    q, p, mu = (random(9, seed=seed).softmax(-1) for seed in (3, 4, 5))
    on_policy = kdloss.reverse_kl_baseline(q.log(), p.log(), kind="optimal")
    off_policy = kdloss.reverse_kl_baseline(q.log(), p.log(), kind="optimal", behaviour_logits=mu.log())
    assert moments(q, p, mu, off_policy)[1] < moments(q, p, mu, on_policy)[1]
    assert moments(q, p, None, off_policy)[1] > moments(q, p, None, on_policy)[1]
    same = kdloss.reverse_kl_baseline(q.log(), p.log(), kind="optimal", behaviour_logits=q.log())
    torch.testing.assert_close(same, on_policy, **CLOSE)


def test_a_known_row() -> None:
    """|s|² = 0.38, 0.78, 0.98: weights 0.19, 0.234 and 0.196 of 0.62."""
    wanted = (0.19 * math.log(0.4) + 0.234 * math.log(5 / 3) + 0.196 * math.log(1.5)) / 0.62
    found = kdloss.reverse_kl_baseline(Q.log(), P.log(), kind="optimal")
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), **CLOSE)
    assert kdloss.reverse_kl_baseline(Q.log(), P.log(), kind="value").item() == pytest.approx(-0.2238046571856474)


@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9, 1e-15, 1e-25])
def test_a_student_that_is_nearly_certain_keeps_its_digits(rest: float) -> None:
    """In float32, against float64: 1 - 2 q + sum q² would have none left for the probable token."""
    x = torch.tensor([0.0, math.log(rest), math.log(rest) - 1, math.log(rest) - 0.5])
    teacher, behaviour = random(4).float(), random(4, seed=1).float()
    for mu in (None, *([behaviour] if rest > 1e-19 else [])):  # q²/μ of a smaller rest is 0 in float32
        found, wanted = (
            kdloss.reverse_kl_baseline(
                x.to(dtype),
                teacher.to(dtype),
                kind="optimal",
                behaviour_logits=None if mu is None else mu.to(dtype),
            )
            for dtype in (torch.float32, torch.float64)
        )
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_is_widened() -> None:
    x, y = random(4, 9).bfloat16(), random(4, 9, seed=1).half()
    for kind in KINDS:
        found = kdloss.reverse_kl_baseline(x, y, kind=kind)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, kdloss.reverse_kl_baseline(x.float(), y.float(), kind=kind))


def test_nothing_carries_gradient() -> None:
    x, y, z = (random(3, 5, seed=seed).requires_grad_() for seed in range(3))
    for kind in KINDS:
        assert not kdloss.reverse_kl_baseline(x, y, kind=kind, behaviour_logits=z).requires_grad


def test_hostile_rows() -> None:
    """What is no distribution is NaN in its own row alone; what is excluded gives a finite number or 0."""
    inf = math.inf
    x = torch.tensor([[0.0, 1, 2], [0, math.nan, 1], [0, inf, 1], [-inf] * 3, [3e38, 0, 0], [0, 1, 2], [0, -inf, 1]])
    y = torch.zeros(7, 3)
    y[5, 0] = -inf
    y[6, 1] = -inf
    for kind in KINDS:
        found = kdloss.reverse_kl_baseline(x, y, kind=kind)
        assert found.isnan().tolist() == [False, True, True, True, False, False, False]
        assert found[5] == 0
        assert found[4].item() == pytest.approx(-math.log(3))  # a certain student: the value
    for side in ("teacher_logits", "behaviour_logits"):
        for bad in (math.nan, inf):
            z = torch.zeros(7, 3)
            z[0, 1] = bad
            given = {"teacher_logits": y, side: z}
            assert kdloss.reverse_kl_baseline(torch.zeros(7, 3), **given, kind="optimal").isnan()[0]


def test_tokens_that_are_never_sampled_are_left_out() -> None:
    """What the teacher says of them has no effect, and where none is left the value is taken."""
    mu = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    x, y = Q.log(), P.log()
    found = kdloss.reverse_kl_baseline(x, y, kind="optimal", behaviour_logits=mu.log())
    weights = torch.tensor([0.5**2 * 0.38, 0.0, 0.2**2 * 0.98], dtype=torch.float64)
    torch.testing.assert_close(found, (weights * (P / Q).log()).sum() / weights.sum(), **CLOSE)
    silent = torch.where(mu == 0, -math.inf, y)  # renormalised: p grows by the same factor everywhere else
    moved = kdloss.reverse_kl_baseline(x, silent, kind="optimal", behaviour_logits=mu.log())
    torch.testing.assert_close(moved, found - math.log(1 - 0.5), **CLOSE)
    certain = torch.tensor([-math.inf, 0.0, -math.inf], dtype=torch.float64)
    nothing = kdloss.reverse_kl_baseline(certain, y, kind="optimal", behaviour_logits=mu.log())
    torch.testing.assert_close(nothing, P.log()[1], **CLOSE)


def test_blocks_give_what_one_block_gives() -> None:
    """Also for views whose rows are no single stride apart, and for no rows."""
    x, y, z = (random(3, 6, 9, seed=seed)[:, :-1] for seed in range(3))
    tau = random(3, 5, seed=4).exp()
    whole = kdloss.reverse_kl_baseline(x, y, kind="optimal", behaviour_logits=z, temperature=tau)
    with mock.patch.object(module, "_CPU_ENTRIES", 20):  # two rows
        found = kdloss.reverse_kl_baseline(x, y, kind="optimal", behaviour_logits=z, temperature=tau)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-15)
    assert kdloss.reverse_kl_baseline(x[:0], y[:0], kind="optimal").shape == (0, 5)


@pytest.mark.parametrize("bounds", [[(0, 4), (4, 9)], [(6, 9), (0, 2), (2, 6)], [(0, 8), (8, 9)]], ids=str)
def test_shards_give_the_baselines_of_whole_rows(bounds: list[tuple[int, int]]) -> None:
    """With ties of the largest probability across slices, slices without mass, and a student that is certain."""
    x, y, z = (3 * random(8, 9, seed=seed) for seed in range(3))
    x[1] = 0  # every token is the most probable one
    x[2, bounds[0][0] : bounds[0][1]] = -math.inf
    y[2, bounds[0][0] : bounds[0][1]] = -math.inf
    x[3, :8] = -math.inf  # certain
    y[4, 8] = -math.inf  # excluded
    z[5, bounds[1][0] : bounds[1][1]] = -math.inf
    x[6, 8] = x[6].max() + 30  # nearly certain
    x[7] += 1e4
    ranks = Ranks(bounds)
    for options in ({"kind": "value"}, {"kind": "optimal"}, {"kind": "optimal", "temperature": 0.7, "behaviour": z}):
        behaviour = options.pop("behaviour", None)
        whole = kdloss.reverse_kl_baseline(x, y, behaviour_logits=behaviour, **options)

        def call(shard, behaviour=behaviour, options=options):
            mine = None if behaviour is None else behaviour[:, shard.start : shard.stop]
            given = (a[:, shard.start : shard.stop] for a in (x, y))
            return kdloss.reverse_kl_baseline(*given, behaviour_logits=mine, shard=shard, **options)

        found = ranks.run(call)
        assert ranks.collectives == (1 if options["kind"] == "value" else 4)
        for each in found:
            torch.testing.assert_close(each, whole, rtol=1e-9, atol=1e-11)
            assert torch.equal(each, found[0])
