"""Holds what hostile inputs give, exactly: garbage, infinities, overflow, no tokens, bad lengths, no values to read.

Tested elsewhere: error texts (`test_errors.py`), garbage under the mask in all arguments at once and half precision
(`test_invariants.py`), hostile logits and labels (`_logprobs/test_numerics.py`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import kdloss
from cases import TABLE, T, put
from contract import call, fields as parts_of, public_function
from invariant_cases import CASES, Case, Field, Options, Outcome, case_name, evaluate
from kdloss import _checks
from kdloss.testing.strategies import PackedBatch

LENGTHS = (3, 0, 1, 4)  # an empty sequence, and one of a single token
FLOATS = ("logp", "old_logp", "prox_logp", "teacher_logp", "advantages", "weights", "entropy")
DTYPES = (torch.float64, torch.float32)
every_function = pytest.mark.parametrize("case", CASES, ids=case_name)
every_objective = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name.endswith(("_loss", "kdrl_token_loss"))], ids=case_name
)


def batch_of(lengths: tuple[int, ...] = LENGTHS, *, dtype: torch.dtype = torch.float64) -> PackedBatch:
    """An ordinary batch: every second token is trained, and no advantage or weight is zero."""
    generator = torch.Generator().manual_seed(7)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    total = sum(lengths)
    cu_seqlens = kdloss.cu_seqlens_from_lengths(torch.tensor(lengths, dtype=torch.int64))
    return PackedBatch(
        **{name: -normal(total).abs() for name in ("logp", "old_logp", "prox_logp", "teacher_logp")},
        **{name: normal(total).abs() + 0.1 for name in ("weights", "entropy")},
        advantages=normal(total) + 0.01,
        loss_mask=torch.arange(total) % 2 == 0,
        kd_mask=torch.arange(total) % 4 == 0,
        cu_seqlens=cu_seqlens,
        rewards=normal(len(lengths)),
    )


def variants(case: Case) -> list[Options]:
    """Every value of every option at least once, in as few calls as that takes."""
    count = max([1, *map(len, case.options.values())])
    return [{name: values[i % len(values)] for name, values in case.options.items()} for i in range(count)]


def values(outcome: Outcome) -> dict[str, Tensor]:
    return {**outcome.tokens, **outcome.sequences, **outcome.scalars}


def assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    for name, x in {**values(expected), "gradient": expected.gradient}.items():
        other = {**values(actual), "gradient": actual.gradient}[name]
        assert x.dtype == other.dtype
        assert x.numpy().tobytes() == other.numpy().tobytes(), f"{name}: {other} is not {x}"


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values must not be read, as on a GPU and under `torch.compile`."""
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)


# Half-precision inputs are computed in float32; float64 stays float64. Inputs are cast before they are subtracted.


@pytest.mark.parametrize("teacher", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("student", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes_promote_and_gradients_keep_the_dtype_of_their_input(student, teacher):
    expected = torch.float64 if torch.float64 in (student, teacher) else torch.float32
    batch = batch_of()
    logp = batch.logp.to(student).requires_grad_()
    teacher_logp = batch.teacher_logp.to(teacher)
    k1 = kdloss.kl_k1(logp, teacher_logp, loss_mask=batch.loss_mask)
    out = kdloss.distillation_loss(logp, None, teacher_logp, loss_mask=batch.loss_mask)
    assert {k1.dtype, out.loss.dtype, out.reverse_kl.dtype} == {expected}
    # subtracted in bf16, the difference of two bf16 numbers would be rounded to 8 bits
    exact = logp.detach().to(expected) - teacher_logp.to(expected)
    assert torch.equal(k1.detach()[batch.loss_mask], exact[batch.loss_mask])
    out.loss.backward()
    assert logp.grad.dtype == student


@every_function
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_results(case: Case, dtype):
    for options in variants(case):
        outcome = evaluate(case, batch_of(dtype=dtype), options)
        floating = set() if case.name.endswith("_mask") else {dtype}
        assert {x.dtype for x in values(outcome).values()} - {torch.bool, torch.int64} == floating


# Masked positions may hold NaN or ±inf and leave no trace in value or gradient.


@every_function
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_under_the_mask_in_one_argument_at_a_time(case: Case, garbage):
    # one at a time: two kinds of garbage may hide each other, as a NaN hides inf - inf
    batch = batch_of()
    for options in variants(case):
        clean = evaluate(case, batch, options)
        for name in FLOATS:
            filled = replace(batch, **{name: getattr(batch, name).masked_fill(~batch.loss_mask, garbage)})
            assert_same_bits(evaluate(case, filled, options), clean)


@every_objective
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_a_teacher_outside_kd_mask_may_hold_anything(case: Case, garbage):
    if "kd_mask" not in case.options:
        return
    batch = batch_of()
    filled = replace(batch, teacher_logp=batch.teacher_logp.masked_fill(~batch.kd_mask, garbage))
    assert (batch.loss_mask & ~batch.kd_mask).any()
    for drawn in variants(case):
        options = drawn | {"kd_mask": Field("kd_mask")}
        assert_same_bits(evaluate(case, filled, options), evaluate(case, batch, options))


# A trained token with teacher_logp = -inf: the reward is -inf, the loss is inf, its gradient is not finite.
# kd_reward_clip makes both finite; diagnostics counts such tokens.


def excluded_batch(dtype: torch.dtype) -> tuple[PackedBatch, Tensor]:
    """Two trained tokens and an untrained one have teacher_logp = -inf."""
    batch = batch_of(dtype=dtype)
    excluded = torch.tensor([True, True, False, False, False, False, True, False])
    assert (excluded & batch.loss_mask).sum() == 2
    return replace(batch, teacher_logp=batch.teacher_logp.masked_fill(excluded, -math.inf)), excluded & batch.loss_mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_excluded_token_has_an_infinite_reward_and_infinite_estimates(dtype):
    batch, excluded = excluded_batch(dtype)
    reward = kdloss.reverse_kl_reward(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask)
    assert torch.equal(reward == -math.inf, excluded)
    clipped = kdloss.reverse_kl_reward(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask, clip=5.0)
    assert torch.equal(clipped == -5, excluded)
    for estimator in (kdloss.kl_k1, kdloss.kl_k2, kdloss.kl_k3):
        estimate = estimator(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask)
        assert torch.equal(estimate == math.inf, excluded)
        assert not estimate.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("max_ratio", [None, 2.0])
@pytest.mark.parametrize("loss", ["distillation_loss", "kdrl_loss"])
def test_an_excluded_token_makes_the_loss_infinite_and_its_gradient_not_finite(dtype, on_policy, max_ratio, loss):
    batch, excluded = excluded_batch(dtype)
    logp = batch.logp.clone().requires_grad_()
    arguments = [logp, None if on_policy else batch.old_logp, batch.teacher_logp]
    keywords: dict[str, Any] = {"loss_mask": batch.loss_mask}
    if loss == "kdrl_loss":
        arguments.append(batch.advantages)
        keywords["distill_loss_weight"] = 0.005
    out = getattr(kdloss, loss)(*arguments, kd_max_ratio=max_ratio, **keywords)
    # with a bounded ratio logp < 0 is a factor of the value, so the sign flips
    assert out.loss == (math.inf if max_ratio is None else -math.inf)
    assert out.reverse_kl == math.inf
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert torch.equal(~gradient.isfinite(), excluded)

    out = getattr(kdloss, loss)(*arguments, kd_max_ratio=max_ratio, kd_reward_clip=5.0, **keywords)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.isfinite()
    assert gradient.isfinite().all()
    if loss == "distillation_loss":
        # exactly the clipped reward times the ratio, divided by the trained tokens
        ratio = torch.ones_like(batch.logp) if on_policy else (batch.logp - batch.old_logp).exp()
        ratio = ratio if max_ratio is None else ratio.clamp(max=max_ratio)
        expected = 5 * ratio[excluded] / batch.loss_mask.sum()
        torch.testing.assert_close(gradient[excluded], expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_an_infinite_reward_stays_in_its_sequence(discount):
    batch, excluded = excluded_batch(torch.float64)
    reward = kdloss.reverse_kl_reward(batch.logp, batch.teacher_logp, loss_mask=batch.loss_mask)
    returns = kdloss.discounted_returns(
        reward, loss_mask=batch.loss_mask, cu_seqlens=batch.cu_seqlens, discount=discount
    )
    # tokens 0 and 6 are excluded; the sequences are 0-2, 3 and 4-7, and even tokens are trained
    assert excluded.nonzero().flatten().tolist() == [0, 6]
    assert (returns == -math.inf).nonzero().flatten().tolist() == [0, 4, 6]
    assert not returns.isnan().any()


def test_the_direct_penalty_is_infinite_but_its_gradient_is_not():
    batch, _ = excluded_batch(torch.float64)
    logp = batch.logp.clone().requires_grad_()
    with pytest.warns(UserWarning, match="direct_penalty=True descends"):
        out = kdloss.kdrl_loss(
            logp,
            None,
            batch.teacher_logp,
            None,
            loss_mask=batch.loss_mask,
            rl_loss_weight=0,
            distill_loss_weight=1.0,
            direct_penalty=True,
        )
    assert out.loss == out.kd == out.reverse_kl == math.inf
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert torch.equal(gradient, batch.loss_mask / batch.loss_mask.sum().double())  # independent of the teacher


def test_diagnostics_count_excluded_tokens():
    batch, excluded = excluded_batch(torch.float64)
    statistics = kdloss.diagnostics(batch.logp, None, loss_mask=batch.loss_mask, teacher_logp=batch.teacher_logp)
    assert statistics["teacher_neg_inf"] == 2
    assert statistics["reverse_kl"] == math.inf
    left = batch.loss_mask & ~excluded
    torch.testing.assert_close(statistics["teacher_logp"], batch.teacher_logp[left].mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_diagnostics_count_what_servers_write_for_minus_infinity(dtype):
    """vLLM writes -9999 into JSON. A log-prob of -5000, as from a temperature of 0.01, is real."""
    teacher_logp = torch.tensor([-1.0, -9999.0, -math.inf, -5000.0, -9999.0, -2.0]).to(dtype)
    mask = torch.tensor([True, True, True, True, False, True])
    statistics = kdloss.diagnostics(torch.full((6,), -1.0), None, loss_mask=mask, teacher_logp=teacher_logp)
    assert statistics["teacher_neg_inf"] == 2
    assert statistics["teacher_logp"].item() == pytest.approx(teacher_logp[[0, 3, 5]].double().mean().item())


# An overflowing ratio times a zero advantage is 0, not NaN.

SURROGATES: dict[str, Callable[..., kdloss.Surrogate]] = {
    "importance_sampled": kdloss.importance_sampled_surrogate,
    "importance_sampled, bounded": lambda *a, **k: kdloss.importance_sampled_surrogate(*a, max_ratio=2.0, **k),
    "clipped": kdloss.clipped_surrogate,
    "clipped, dual": lambda *a, **k: kdloss.clipped_surrogate(*a, dual_clip=3.0, **k),
    "cispo": lambda *a, **k: kdloss.cispo_surrogate(*a, clip_high=0.28, **k),
    "cispo, both bounds": lambda *a, **k: kdloss.cispo_surrogate(*a, clip_low=0.2, clip_high=0.28, **k),
    "sapo": kdloss.sapo_surrogate,
    "sequence_clipped": lambda *a, **k: kdloss.sequence_clipped_surrogate(
        *a, cu_seqlens=torch.arange(len(a[0]) + 1), **k
    ),
}


def one_token(surrogate: str, log_ratio: float, advantage: float, dtype: torch.dtype, weight: float | None = None):
    """(loss, gradient, surrogate) of a trained token beside an untrained one."""
    logp = torch.tensor([-2.0, -1.0], dtype=dtype, requires_grad=True)
    old_logp = logp.detach() - torch.tensor([log_ratio, 0.0], dtype=dtype)
    out = SURROGATES[surrogate](
        logp,
        old_logp,
        torch.tensor([advantage, 1.0], dtype=dtype),
        loss_mask=torch.tensor([True, False]),
        weights=None if weight is None else torch.tensor([weight, 1.0], dtype=dtype),
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), logp)
    assert (out.loss[1], gradient[1], out.ratio[1]) == (0, 0, 1)
    assert not out.clipped[1]
    return out.loss[0].item(), gradient[0].item(), out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("advantage", "weight"), [(0.0, None), (-0.0, None), (0.0, 2.0), (1.0, 0.0), (math.inf, 0.0)])
def test_an_overflowing_ratio_times_zero_is_zero(surrogate, dtype, advantage, weight):
    loss, gradient, out = one_token(surrogate, 1000.0, advantage, dtype, weight)
    assert out.ratio[0] == math.inf
    # an infinite advantage of weight 0 leaves nothing, with a clip or without
    assert (loss, gradient) == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("surrogate", "advantage", "loss", "gradient", "clipped", "dual_clipped"),
    [
        # where the clip stops the gradient, the value is at the bound: (1 + clip_high) * A, and dual_clip * |A|
        ("clipped", 1.5, -1.2 * 1.5, 0, True, False),
        ("clipped, dual", 1.5, -1.2 * 1.5, 0, True, False),
        ("clipped, dual", -1.5, 3 * 1.5, 0, False, True),
        ("sequence_clipped", 1.5, -(1 + 4e-4) * 1.5, 0, True, False),
        # where the clip bounds the gradient, the value is -bound * A * logp, logp = -2
        ("importance_sampled, bounded", 1.5, 2 * 1.5 * 2, -2 * 1.5, True, False),
        ("importance_sampled, bounded", -1.5, -2 * 1.5 * 2, 2 * 1.5, True, False),
        ("cispo", 1.5, 1.28 * 1.5 * 2, -1.28 * 1.5, True, False),
        ("cispo, both bounds", -1.5, -1.28 * 1.5 * 2, 1.28 * 1.5, True, False),
        # SAPO's gate is saturated: (4 / tau) * A, flat
        ("sapo", 1.5, -4 * 1.5, 0, False, False),
        ("sapo", -1.5, 4 / 1.05 * 1.5, 0, False, False),
        # no clip applies: the ratio exploded against the sign of the advantage, or the surrogate has no clip
        ("clipped", -1.5, math.inf, math.inf, False, False),
        ("sequence_clipped", -1.5, math.inf, math.inf, False, False),
        ("importance_sampled", 1.5, -math.inf, -math.inf, False, False),
    ],
)
def test_an_overflowing_ratio_leaves_what_the_clip_leaves(
    surrogate, advantage, loss, gradient, clipped, dual_clipped, dtype
):
    actual_loss, actual_gradient, out = one_token(surrogate, 1000.0, advantage, dtype)
    rtol = 4 * torch.finfo(dtype).eps
    assert actual_loss == pytest.approx(loss, rel=rtol)
    assert actual_gradient == pytest.approx(gradient, rel=rtol, abs=0)
    assert (out.ratio[0], out.clipped[0], out.dual_clipped[0]) == (math.inf, clipped, dual_clipped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_vanishing_ratio_is_zero_and_finite(surrogate, advantage, dtype):
    loss, gradient, out = one_token(surrogate, -1000.0, advantage, dtype)
    assert out.ratio[0] == 0
    stopped = advantage < 0 and surrogate in ("clipped", "clipped, dual", "sequence_clipped")
    assert bool(out.clipped[0]) == (stopped or surrogate == "cispo, both bounds")
    assert math.isfinite(loss)
    if surrogate == "cispo, both bounds":  # the lower bound keeps the gradient at 0.8
        assert gradient == pytest.approx(-0.8 * advantage, rel=4 * torch.finfo(dtype).eps)
    else:
        assert gradient == 0


def test_importance_weights_of_overflowing_ratios():
    prox_logp = torch.tensor([-1.0, -1.0, -1000.0, 1.0])
    old_logp = torch.tensor([-1000.0, -1.0, -1.0, math.nan])
    mask = torch.tensor([True, True, True, False])
    each = torch.arange(5)
    assert kdloss.truncated_importance_weights(prox_logp, old_logp, loss_mask=mask).tolist() == [2, 1, 0, 1]
    assert kdloss.masked_importance_weights(prox_logp, old_logp, loss_mask=mask).tolist() == [0, 1, 0, 1]
    for aggregate in ("sum", "mean"):
        sequence = {"loss_mask": mask, "cu_seqlens": each, "aggregate": aggregate, "min_weight": 0.5, "max_weight": 4.0}
        weights = kdloss.sequence_importance_weights(prox_logp, old_logp, action="truncate", **sequence)
        assert weights.tolist() == [4, 1, 0.5, 1]
        weights = kdloss.sequence_importance_weights(prox_logp, old_logp, action="mask", **sequence)
        assert weights.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("statistic", ["k2", "k3"])
def test_a_token_that_the_sampler_excludes_is_dropped_by_every_statistic(statistic):
    prox_logp, old_logp, mask = torch.tensor([-1.0, -1.0]), torch.tensor([-math.inf, -1.0]), torch.ones(2).bool()
    bound = {"loss_mask": mask, "statistic": statistic, "max_statistic": 0.5}
    assert kdloss.masked_importance_weights(prox_logp, old_logp, **bound).tolist() == [0, 1]
    sequence = {"cu_seqlens": torch.arange(3), "aggregate": "mean", "action": "mask", "max_weight": 4.0}
    assert kdloss.sequence_importance_weights(prox_logp, old_logp, **bound, **sequence).tolist() == [0, 1]


def test_diagnostics_of_large_ratios_stay_in_range():
    logp, old_logp = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-61.0, -61.0, -1.0])  # squares overflow
    statistics = kdloss.diagnostics(logp, old_logp, loss_mask=torch.ones(3, dtype=torch.bool))
    assert statistics["effective_sample_size"].item() == pytest.approx(2 / 3, rel=1e-6)
    assert statistics["ratio_max"].item() == pytest.approx(math.exp(60), rel=1e-5)
    assert statistics["ratio_min"] == 1


# A Python weight of 0 skips its term, and the term's fields are 0: NaN or inf in its inputs cannot leak.


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
@pytest.mark.parametrize("poison", ["none", math.nan, math.inf, -math.inf])
def test_a_weight_of_zero_skips_its_term(zero, poison):
    batch = batch_of()
    spoilt = None if poison == "none" else torch.full_like(batch.logp, poison)
    mask = {"loss_mask": batch.loss_mask}
    logp = batch.logp.clone().requires_grad_()

    def gradient(out: kdloss.LossOutput) -> Tensor:
        return torch.autograd.grad(out.loss, logp, retain_graph=True)[0]

    alone = kdloss.grpo_loss(logp, batch.old_logp, batch.advantages, prox_logp=batch.prox_logp, **mask)
    joint = kdloss.kdrl_loss(
        logp, batch.old_logp, spoilt, batch.advantages, prox_logp=batch.prox_logp, distill_loss_weight=zero, **mask
    )
    assert joint.loss == alone.loss
    assert joint.kd == joint.reverse_kl == 0
    assert torch.equal(gradient(joint), gradient(alone))

    alone = kdloss.distillation_loss(logp, batch.old_logp, batch.teacher_logp, **mask)
    for keywords in ({}, {"prox_logp": spoilt, "weights": spoilt}):
        joint = kdloss.kdrl_loss(
            logp,
            batch.old_logp,
            batch.teacher_logp,
            spoilt,
            rl_loss_weight=zero,
            distill_loss_weight=1.0,
            **keywords,
            **mask,
        )
        assert joint.loss == alone.loss
        assert joint.rl == 0
        assert not any(x.any() for x in (joint.ratio, joint.clipped, joint.dual_clipped))
        assert torch.equal(gradient(joint), gradient(alone))

    nothing = kdloss.kdrl_loss(logp, spoilt, spoilt, spoilt, rl_loss_weight=zero, distill_loss_weight=zero, **mask)
    assert nothing.loss == 0
    assert not gradient(nothing).any()

    if spoilt is not None:
        folded = kdloss.fold_kd_reward(spoilt, batch.weights, rl_loss_weight=zero, distill_loss_weight=2.0)
        assert torch.equal(folded, 2 * batch.weights)
        folded = kdloss.fold_kd_reward(batch.weights, spoilt, distill_loss_weight=zero)
        assert torch.equal(folded, batch.weights)


@pytest.mark.parametrize("direct_penalty", [False, True])
def test_a_tensor_weight_of_zero_silences_an_infinite_reward(direct_penalty):
    batch, excluded = excluded_batch(torch.float64)
    weight = torch.where(excluded, 0.0, 0.5).double()
    logp = batch.logp.clone().requires_grad_()
    call: dict[str, Any] = {
        "loss_mask": batch.loss_mask,
        "distill_loss_weight": weight,
        "direct_penalty": direct_penalty,
    }
    arguments = (logp, batch.old_logp, batch.teacher_logp, batch.advantages)
    if direct_penalty:
        with pytest.warns(UserWarning, match="direct_penalty=True descends"):
            loss = kdloss.kdrl_token_loss(*arguments, **call)
    else:
        loss = kdloss.kdrl_token_loss(*arguments, **call)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    # there only GRPO is left
    alone = kdloss.clipped_surrogate(logp, batch.old_logp, batch.advantages, loss_mask=batch.loss_mask).loss
    assert torch.equal(loss[excluded], alone[excluded])
    folded = kdloss.fold_kd_reward(
        batch.advantages, torch.where(excluded, -math.inf, 1.0).double(), distill_loss_weight=weight
    )
    assert torch.equal(folded, batch.advantages + weight)


# A count of 0, local or passed, gives a 0 that is still attached. T = 0 and B = 0 are valid everywhere.


@every_function
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(case: Case, lengths, dtype):
    batch = batch_of(lengths, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for options in variants(case):
        outcome = evaluate(case, batch, options)  # asserts that the loss is attached
        assert {x.shape for x in outcome.tokens.values()} <= {(0,)}
        assert {x.shape for x in outcome.sequences.values()} <= {(len(lengths),)}
        assert {x.dtype for x in values(outcome).values()} <= {wide, torch.bool, torch.int64}
        assert not any(x.any() for x in values(outcome).values())
        assert (outcome.gradient.shape, outcome.gradient.dtype) == ((0,), dtype)
        if case.axis == "scalar" and case.name != "diagnostics":
            for normalizer in (0, 3.0, torch.tensor(0.0), torch.tensor(3)):
                assert not any(x.any() for x in values(evaluate(case, batch, options, normalizer=normalizer)).values())


@pytest.mark.parametrize("sequences", [0, 2])
def test_no_tokens_in_packing(sequences):
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int64)
    floats, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    lengths = torch.zeros(sequences, dtype=torch.int64)
    assert kdloss.cu_seqlens_from_lengths(lengths).tolist() == cu_seqlens.tolist()
    assert kdloss.segment_ids(cu_seqlens, total_tokens=0).shape == (0,)
    assert kdloss.broadcast_to_tokens(torch.ones(sequences), cu_seqlens=cu_seqlens, total_tokens=0).shape == (0,)
    assert kdloss.next_token_labels(ids, cu_seqlens=cu_seqlens).shape == (0,)
    assert kdloss.response_mask(lengths, cu_seqlens=cu_seqlens, total_tokens=0).dtype == torch.bool
    assert kdloss.to_prediction_positions(floats, cu_seqlens=cu_seqlens, fill=0).shape == (0,)
    assert kdloss.to_token_positions(floats, cu_seqlens=cu_seqlens, fill=0).shape == (0,)
    for length in (0, 3):
        padded = torch.ones(sequences, length, 2)
        assert kdloss.pack(padded, lengths=lengths, total_tokens=0).shape == (0, 2)
        rows = kdloss.unpack(torch.zeros(0, 2), cu_seqlens=cu_seqlens, length=length, fill=7.0)
        assert rows.shape == (sequences, length, 2)
        assert (rows == 7).all()


def test_no_rewards_and_no_logits():
    empty, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for function in (kdloss.group_relative_advantages, kdloss.leave_one_out_advantages):
        assert function(empty, group_size=4).shape == (0,)
        assert function(empty, group_ids=ids).shape == (0,)
    assert kdloss.fold_kd_reward(empty, empty, distill_loss_weight=1.0).shape == (0,)
    for shape in ((), (2,)):
        labels = torch.zeros(0, *shape, dtype=torch.int64)
        logits = torch.zeros(0, 5, requires_grad=True)
        out = kdloss.token_logprobs_and_entropy(logits, labels)
        assert (out.logp.shape, out.entropy.shape) == ((0, *shape), (0,))
        (gradient,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), logits)
        assert gradient.shape == (0, 5)
        hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
        for bound in (None, 0, 4):
            out = kdloss.linear_token_logprobs_and_entropy(hidden, weight, labels, max_trained_tokens=bound)
            assert (out.logp.shape, out.entropy.shape) == ((0, *shape), (0,))
            gradients = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
            assert [g.shape for g in gradients] == [(0, 3), (5, 3)]
            assert not gradients[1].any()


# Values are checked on CPU tensors only. On a GPU bad values never read out of bounds; they give NaN, as documented.

MISFITS = {
    "starts late": ([1, 3, 3, 4, 8], "cu_seqlens must start at 0, got 1"),
    "starts below 0": ([-5, 3, 3, 4, 8], "cu_seqlens must start at 0, got -5"),
    "ends early": ([0, 3, 3, 4, 7], "cu_seqlens must end at the number of tokens 8, got 7"),
    "ends late": ([0, 3, 3, 4, 9], "cu_seqlens must end at the number of tokens 8, got 9"),
    "decreases": ([0, 3, 2, 4, 8], r"cu_seqlens must not decrease, got \[0, 3, 2, 4, 8\]"),
    "jumps far out": ([0, 10**12, 3, -(10**12), 8], "cu_seqlens must not decrease"),
}


def reading_variants(case: Case) -> list[Options]:
    """The calls that read `cu_seqlens`; other calls ignore it."""

    def reads(options: Options) -> bool:
        if case.name.endswith("_loss"):
            discounts = options.get("kd_discount", 0) > 0 and options.get("distill_loss_weight") != 0
            return discounts or options["reduction"] == "sequence_mean"
        return options.get("discount") != 0

    return [options for options in variants(case) if reads(options)]


every_function_of_sequences = pytest.mark.parametrize(
    "case", [c for c in CASES if "cu_seqlens" in c.keywords or "reduction" in c.options], ids=case_name
)


@every_function_of_sequences
@pytest.mark.parametrize("misfit", MISFITS)
def test_cu_seqlens_that_do_not_fit_raise_where_they_can_be_read(case: Case, misfit):
    bounds, message = MISFITS[misfit]
    for dtype in (torch.int64,) if misfit == "jumps far out" else (torch.int32, torch.int64):
        for options in reading_variants(case):
            with pytest.raises(ValueError, match=message):
                evaluate(case, replace(batch_of(), cu_seqlens=torch.tensor(bounds, dtype=dtype)), options)


@every_function_of_sequences
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.usefixtures("unreadable")
def test_cu_seqlens_that_do_not_fit_give_nan_where_they_cannot_be_read(case: Case, misfit):
    batch = batch_of()
    for options in reading_variants(case):
        outcome = evaluate(case, replace(batch, cu_seqlens=torch.tensor(MISFITS[misfit][0])), options)
        # the loss is NaN; a skipped term stays 0
        if case.axis == "scalar":
            assert outcome.scalars["loss"].isnan(), options
        elif case.axis == "sequence":
            assert outcome.sequences["loss"].isnan().all()
        elif case.name.endswith("_mask"):  # booleans have no NaN
            assert not outcome.tokens["loss"].any()
        else:
            assert outcome.tokens["loss"][batch.loss_mask].isnan().all(), options
        # and so is the gradient: a gradient of 0 would look like a step without data
        skipped = options.get("rl_loss_weight") == options.get("distill_loss_weight") == 0
        if case.attached and not skipped:
            assert outcome.gradient.isnan().any(), options


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.usefixtures("unreadable")
def test_gradients_through_packing_are_nan_where_cu_seqlens_do_not_fit(misfit):
    cu_seqlens, mask = torch.tensor(MISFITS[misfit][0]), torch.ones(8, dtype=torch.bool)
    for size, function in (
        (8, lambda x: kdloss.segment_sum(x, loss_mask=mask, cu_seqlens=cu_seqlens)),
        (8, lambda x: kdloss.segment_mean(x, loss_mask=mask, cu_seqlens=cu_seqlens)),
        (8, lambda x: kdloss.sequence_mean(x, loss_mask=mask, cu_seqlens=cu_seqlens)),
        (4, lambda x: kdloss.broadcast_to_tokens(x, cu_seqlens=cu_seqlens, total_tokens=8)),
        (8, lambda x: kdloss.unpack(x, cu_seqlens=cu_seqlens, length=4)),
        (8, lambda x: kdloss.to_prediction_positions(x, cu_seqlens=cu_seqlens, fill=0)),
        (8, lambda x: kdloss.to_token_positions(x, cu_seqlens=cu_seqlens, fill=0)),
    ):
        x = torch.ones(size, requires_grad=True)
        result = function(x)
        assert result.isnan().all()
        (gradient,) = torch.autograd.grad(result.sum(), x)
        assert gradient.isnan().any()


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.usefixtures("unreadable")
def test_packing_of_cu_seqlens_that_do_not_fit_stays_in_bounds(misfit):
    cu_seqlens = torch.tensor(MISFITS[misfit][0])
    x, ids = torch.arange(8.0), torch.arange(8)
    for result in (
        kdloss.broadcast_to_tokens(torch.ones(4), cu_seqlens=cu_seqlens, total_tokens=8),
        kdloss.to_prediction_positions(x, cu_seqlens=cu_seqlens, fill=0),
        kdloss.to_token_positions(x, cu_seqlens=cu_seqlens, fill=0),
        kdloss.unpack(x, cu_seqlens=cu_seqlens, length=4),
    ):
        assert result.isnan().all()
    assert not kdloss.response_mask(torch.zeros(4).long(), cu_seqlens=cu_seqlens, total_tokens=8).any()
    assert (kdloss.next_token_labels(ids, cu_seqlens=cu_seqlens) == -100).all()
    found = kdloss.segment_ids(cu_seqlens, total_tokens=8)
    assert ((found >= 0) & (found < 4)).all()


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(("lengths", "total_tokens"), [([2, 2], 3), ([2, 2], 5), ([-1, 5], 4), ([9, 1], 4)])
def test_pack_of_lengths_that_do_not_fit_gives_nan(lengths, total_tokens):
    packed = kdloss.pack(torch.ones(2, 3), lengths=torch.tensor(lengths), total_tokens=total_tokens)
    assert packed.shape == (total_tokens,)
    assert packed.isnan().all()


@pytest.mark.usefixtures("unreadable")
def test_unpack_does_not_truncate():
    assert kdloss.unpack(torch.ones(4), cu_seqlens=torch.tensor([0, 3, 4]), length=2).isnan().all()


@pytest.mark.slow
def test_cu_seqlens_that_do_not_fit_give_nan_under_compile():
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        return kdloss.sequence_mean(x, loss_mask=mask, cu_seqlens=cu_seqlens)

    batch = batch_of()
    arguments = batch.logp, batch.loss_mask
    expected = kdloss.sequence_mean(*arguments[:1], loss_mask=batch.loss_mask, cu_seqlens=batch.cu_seqlens)
    assert compiled(*arguments, batch.cu_seqlens) == expected
    assert compiled(*arguments, torch.tensor(MISFITS["ends early"][0])).isnan()


@pytest.mark.parametrize("label", [5, -1, -99, -101, 2**40])
@pytest.mark.parametrize("linear", [False, True])
def test_labels_outside_the_vocabulary(label, linear, monkeypatch):
    labels = torch.tensor([1, label, -100, 4])
    leaf = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    identity = torch.eye(5, dtype=torch.float64)

    def call(labels: Tensor) -> kdloss.LogprobsAndEntropy:
        if linear:
            return kdloss.linear_token_logprobs_and_entropy(leaf, identity, labels)
        return kdloss.token_logprobs_and_entropy(leaf, labels)

    with pytest.raises(ValueError, match=rf"labels must be -100 \(ignored\) or in 0 \.\. 4, got {label}"):
        call(labels)
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    out = call(labels)
    assert out.logp.isnan().tolist() == [False, True, False, False]
    # the other rows are as with a good label
    assert torch.equal(out.logp[[0, 2, 3]], call(torch.tensor([1, 0, -100, 4])).logp[[0, 2, 3]])


@pytest.mark.parametrize("bound", [0, 2])
def test_more_trained_tokens_than_the_bound(bound, monkeypatch):
    hidden = torch.ones(4, 3, requires_grad=True)
    weight = torch.ones(5, 3)
    labels = torch.tensor([1, 2, -100, 4])
    mask = labels != -100

    def call(**options: Any) -> Tensor:
        return kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=mask, **options)

    with pytest.raises(ValueError, match=f"max_trained_tokens must hold the 3 trained tokens, got {bound}"):
        call(max_trained_tokens=bound)
    assert torch.equal(call(max_trained_tokens=3), call())
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    # no trained row passes for a result, and the one without a label stays 0, also where the mask trains it
    for trained in (labels != -100, torch.ones(4, dtype=torch.bool)):
        mask = trained
        assert call(max_trained_tokens=bound).isnan().tolist() == [True, True, False, True]
        assert torch.equal(call(max_trained_tokens=3), call())


def that_take(keyword: str) -> list[str]:
    return [name for name in TABLE if keyword in inspect.signature(public_function(name)).parameters]


@pytest.mark.parametrize("temperature", [-1.0, 0.0, math.inf])
@pytest.mark.parametrize("name", [x for x in that_take("temperature") if x != "topk_diagnostics"])  # its means are NaN
def test_a_temperature_that_is_not_positive_makes_its_row_nan_where_it_cannot_be_checked(
    name, temperature, monkeypatch
):
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    arguments, one = TABLE[name].variants["base"], torch.ones(T, dtype=torch.float64)
    expected = call(public_function(name), arguments | {"temperature": one})
    found = call(public_function(name), arguments | {"temperature": put(one, 2, temperature)})
    for x, y in zip(parts_of(found).values(), parts_of(expected).values(), strict=True):
        assert x[2].isnan()
        torch.testing.assert_close(put(x, 2, 0), put(y, 2, 0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("normalizer", [-3.0, math.inf])
@pytest.mark.parametrize("name", that_take("normalizer"))
def test_a_normalizer_that_is_none_makes_the_loss_nan_where_it_cannot_be_checked(name, normalizer, monkeypatch):
    monkeypatch.setattr(_checks, "value_checks_allowed", lambda x: False)
    arguments = TABLE[name].variants["base"] | {"normalizer": torch.tensor(normalizer)}
    assert next(iter(parts_of(call(public_function(name), arguments)).values())).isnan()


def test_a_nan_normalizer_gives_nan():
    batch = batch_of()
    loss = kdloss.token_mean(batch.logp, loss_mask=batch.loss_mask, normalizer=torch.tensor(math.nan))
    assert loss.isnan()


# A loss_mask of any dtype but bool is a TypeError.


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_that_is_not_boolean_is_a_type_error(case: Case, dtype):
    batch = batch_of()
    for options in variants(case):
        with pytest.raises(TypeError, match=f"loss_mask must be torch.bool, got {dtype}"):
            evaluate(case, _Raw(batch, loss_mask=batch.loss_mask.to(dtype)), options)
        if isinstance(options.get("kd_mask"), Field) and options.get("distill_loss_weight") != 0:
            with pytest.raises(TypeError, match=f"kd_mask must be torch.bool, got {dtype}"):
                evaluate(case, _Raw(batch, kd_mask=batch.kd_mask.to(dtype)), options)


class _Raw:
    """A batch with fields that a `PackedBatch` would refuse."""

    def __init__(self, batch: PackedBatch, **changes: Tensor) -> None:
        for f in fields(batch):
            setattr(self, f.name, changes.get(f.name, getattr(batch, f.name)))


# Sums over sequences are segmented and in float64, not differences of a global cumsum (an error of 4e-3 at T = 32768).

LONG = 32768
ULP = 2.0**-24  # of float32: the relative error of rounding one number


def long_stream() -> tuple[Tensor, Tensor, Tensor]:
    """A sequence of large values beside small ones: a global cumsum is large where a sequence's own sum is not."""
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = torch.tensor([0, 20000, 20000, 20001, 32000, LONG])
    x = torch.randn(LONG, generator=generator) * 1e-3
    x[:20000] += 3.0
    return x, torch.rand(LONG, generator=generator) < 0.9, cu_seqlens


def test_segment_sums_of_a_long_stream():
    x, mask, cu_seqlens = long_stream()
    bounds = cu_seqlens.tolist()
    sums = kdloss.segment_sum(x, loss_mask=mask, cu_seqlens=cu_seqlens)
    means = kdloss.segment_mean(x, loss_mask=mask, cu_seqlens=cu_seqlens)
    for b, (start, stop) in enumerate(pairwise(bounds)):
        trained = x[start:stop][mask[start:stop]].tolist()
        exact = math.fsum(trained)
        # summed in float64, so only the result is rounded; a float32 sum would be off by T/2 roundings at worst
        assert abs(sums[b].item() - exact) <= ULP * abs(exact) + LONG * 2.0**-53 * math.fsum(map(abs, trained))
        assert means[b].item() == pytest.approx(exact / max(1, len(trained)), rel=4 * ULP, abs=1e-12)


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99, 0.999, 0.9999, 1.0])
def test_discounted_returns_of_a_long_stream(discount):
    x, mask, cu_seqlens = long_stream()
    returns = kdloss.discounted_returns(x, loss_mask=mask, cu_seqlens=cu_seqlens, discount=discount).double()
    # lists, because every access to an entry of a tensor is slow
    given, trained = x.tolist(), mask.tolist()
    sums, sizes = [0.0] * LONG, [0.0] * LONG
    for start, stop in pairwise(cu_seqlens.tolist()):
        value = magnitude = 0.0
        for t in reversed(range(start, stop)):
            if trained[t]:
                value = given[t] + discount * value
                magnitude = abs(given[t]) + discount * magnitude
                sums[t], sizes[t] = value, magnitude
    exact, size = (torch.tensor(column, dtype=torch.float64) for column in (sums, sizes))
    # The scan runs in float64, so the error is the one rounding of the result. The second term, 4e-12 of the sum of
    # magnitudes, allows a float64 rounding at each of T steps where terms of either sign cancel.
    bound = ULP * exact.abs() + LONG * 2.0**-53 * size
    assert ((returns - exact).abs() <= bound).all()
    # the difference of two global cumulative sums, which the scan replaces, is outside this bound
    if discount == 1:
        total = torch.where(mask, x, 0).flip(0).cumsum(0).flip(0)
        end = torch.cat([total, total.new_zeros(1)])[cu_seqlens[1:]]
        ids = kdloss.segment_ids(cu_seqlens, total_tokens=LONG)
        naive = torch.where(mask, total - end[ids], 0).double()
        assert not ((naive - exact).abs() <= bound).all()


# Same inputs, same bits, where torch is set to be deterministic.


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@every_function
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(case: Case):
    for options in variants(case):
        for dtype in DTYPES:
            batch = batch_of((30, 0, 1, 40), dtype=dtype)
            assert_same_bits(evaluate(case, batch, options), evaluate(case, batch, options))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("labels_per_row", [None, 3])
@pytest.mark.parametrize("bound", [None, 32])
def test_deterministic_log_probs(labels_per_row, bound):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(32, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    shape = (32,) if labels_per_row is None else (32, labels_per_row)
    labels = torch.randint(0, 50, shape, generator=generator).masked_fill(
        torch.rand(shape, generator=generator) < 0.3, -100
    )

    def run() -> list[bytes]:
        out = kdloss.linear_token_logprobs_and_entropy(hidden, weight, labels, max_trained_tokens=bound)
        gradients = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
        return [x.detach().numpy().tobytes() for x in (*out, *gradients)]

    assert run() == run()


# No host sync in a loss, and no branch on values.
#
# A fake tensor has a shape and no values: reading a value, or making a shape that depends on one, raises.


def fake(mode: FakeTensorMode, batch: PackedBatch) -> PackedBatch:
    return PackedBatch(**{f.name: mode.from_tensor(getattr(batch, f.name)) for f in fields(batch)})


@pytest.mark.slow
@every_function
def test_no_function_looks_at_a_value(case: Case):
    for options in variants(case):
        for normalizer in (None, 7.0, torch.tensor(7.0)) if case.axis == "scalar" and case.attached else (None,):
            with FakeTensorMode() as mode:
                given = mode.from_tensor(normalizer) if isinstance(normalizer, Tensor) else normalizer
                outcome = evaluate(case, fake(mode, batch_of()), options, normalizer=given)
            assert outcome.gradient.shape == (8,)


def test_no_function_of_packing_and_log_probs_looks_at_a_value():
    with FakeTensorMode():
        cu_seqlens, lengths = torch.zeros(5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        x, ids = torch.zeros(8), torch.zeros(8, dtype=torch.int64)
        mask = torch.ones(8, dtype=torch.bool)
        kdloss.cu_seqlens_from_lengths(lengths)
        kdloss.segment_ids(cu_seqlens, total_tokens=8)
        kdloss.broadcast_to_tokens(lengths, cu_seqlens=cu_seqlens, total_tokens=8)
        kdloss.next_token_labels(ids, cu_seqlens=cu_seqlens)
        kdloss.response_mask(lengths, cu_seqlens=cu_seqlens, total_tokens=8)
        kdloss.to_prediction_positions(x, cu_seqlens=cu_seqlens, fill=0)
        kdloss.to_token_positions(x, cu_seqlens=cu_seqlens, fill=0)
        kdloss.pack(torch.zeros(4, 3), lengths=lengths, total_tokens=8)
        kdloss.unpack(x, cu_seqlens=cu_seqlens, length=8)
        for function in (kdloss.group_relative_advantages, kdloss.leave_one_out_advantages):
            function(x, group_size=4)
            function(x, group_ids=ids)
        kdloss.fold_kd_reward(x, x, distill_loss_weight=x)
        logits = torch.zeros(8, 5, requires_grad=True)
        sum(kdloss.token_logprobs_and_entropy(logits, ids, temperature=x, softcap=3.0, vocab_size=4)).sum().backward()
        hidden, weight = torch.zeros(8, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
        bounded = kdloss.linear_token_logprobs(hidden, weight, ids, loss_mask=mask, max_trained_tokens=4)
        bounded.sum().backward()
        # the documented exception: selecting the trained rows without a static bound
        with pytest.raises(DynamicOutputShapeException):
            kdloss.linear_token_logprobs(hidden, weight, ids, loss_mask=mask)
