"""Holds the invariants of every function on packed batches, value and gradient, over batches that break losses.

The hypothesis profile sets the number of examples per test.

Tolerances: 16 ulp of the result's dtype, relative, where only the order of the arithmetic differs. Where a sum may
cancel they are relative to the size of its terms. Gradients of half-precision inputs are rounded to their dtype: 2 ulp.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss
from invariant_cases import CASES, Case, Options, Outcome, case_name, evaluate, options
from kdloss.testing import reference
from kdloss.testing.strategies import (
    GroupedRewards,
    HeadBatch,
    LogitsBatch,
    PackedBatch,
    grouped_rewards,
    head_batches,
    logits_batches,
    packed_batches,
)

GARBAGE = (math.nan, math.inf, -math.inf, 1e30)
HALF = (torch.bfloat16, torch.float16)
every_function = pytest.mark.parametrize("case", CASES, ids=case_name)
every_reduced_function = pytest.mark.parametrize(
    "case", [c for c in CASES if c.axis == "scalar" and c.name != "diagnostics"], ids=case_name
)


def close(actual: Tensor, expected: Tensor, *, scale: float = 0.0, what: str = "") -> None:
    """Equal within the tolerance at the top of this file, with inf and NaN in the same places."""
    assert actual.shape == expected.shape, what
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, expected), f"{what}: {actual} is not {expected}"
        return
    info = torch.finfo(actual.dtype)
    rtol = (2 if actual.dtype in HALF else 16) * info.eps
    # the last term is two steps of the subnormal numbers, whose precision is absolute
    atol = rtol * scale + 2 * info.tiny * info.eps
    # not assert_close, in which these tests would spend most of their time
    equal = torch.isclose(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
    assert equal.all(), f"{what}: {actual} is not {expected} to rtol {rtol}, atol {atol}"


def same_bits(actual: Outcome, expected: Outcome) -> None:
    for a, b in zip(all_of(actual), all_of(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.numpy().tobytes() == b.numpy().tobytes(), f"{actual} is not {expected}"


def all_of(outcome: Outcome) -> list[Tensor]:
    tensors = [*outcome.tokens.values(), *outcome.sequences.values(), *outcome.scalars.values(), outcome.gradient]
    return [x.view(torch.int16) if x.dtype == torch.bfloat16 else x for x in tensors]


def scales(batch: PackedBatch, outcome: Outcome) -> tuple[float, float]:
    """Bounds on the terms whose sums are a scalar and a gradient; inf is compared as inf and left out."""
    logp = 4 + finite(torch.where(batch.loss_mask, batch.logp, 0)).abs().sum().item()
    gradient = finite(outcome.gradient).abs()
    return logp * (4 + gradient.sum().item()), logp * gradient.sum().item()


def finite(x: Tensor) -> Tensor:
    return x.double().nan_to_num(nan=0, posinf=0, neginf=0)


def total(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([x.double() for x in tensors]).sum(0) if tensors else torch.zeros_like(like)


@every_function
@given(data=st.data())
def test_a_packed_batch(case: Case, data: st.DataObject):
    """Every check of an arbitrary batch, on one batch an example, because drawing one costs as much as a check."""
    batch, given_options = data.draw(packed_batches()), data.draw(options(case))
    whole = evaluate(case, batch, given_options)
    packed_is_one_sequence_after_the_other(case, batch, given_options, whole)
    padding_tokens_change_nothing(case, batch, given_options, whole, data)
    the_order_of_the_sequences_does_not_matter(case, batch, given_options, whole, data)
    garbage_under_the_mask_leaves_no_trace(case, batch, given_options, whole, data)
    a_fully_masked_batch_is_an_attached_zero(case, batch, given_options, data)


def packed_is_one_sequence_after_the_other(case: Case, batch: PackedBatch, given_options: Options, whole: Outcome):
    parts = [evaluate(case, batch.take(b), given_options) for b in range(batch.size)]
    value_scale, gradient_scale = scales(batch, whole)
    for name, x in whole.tokens.items():
        close(x, torch.cat([x[:0], *(p.tokens[name] for p in parts)]), what=name)
    for name, x in whole.sequences.items():
        close(x, torch.cat([x[:0], *(p.sequences[name] for p in parts)]), scale=value_scale, what=name)
    shares = [1.0] * batch.size
    if case.axis == "scalar":
        if case.name == "diagnostics":
            return  # means, minima and ratios of means do not add up over sequences
        counts = [int(n > 0) if case.reduced(given_options) == "sequence" else n for n in batch.trained]
        shares = [n / max(1, sum(counts)) for n in counts]
        for name, x in whole.scalars.items():
            expected = total([p.scalars[name] * s for p, s in zip(parts, shares, strict=True)], x)
            close(x, expected, scale=value_scale, what=name)
    gradients = [p.gradient.double() * share for p, share in zip(parts, shares, strict=True)]
    close(whole.gradient, torch.cat([whole.gradient[:0].double(), *gradients]), scale=gradient_scale, what="gradient")


def check_padded(case: Case, batch: PackedBatch, lengths: list[int], packed: Outcome, padded: Outcome) -> None:
    """The padded outcome is the packed one at its tokens; at the padding, losses and gradients are exactly 0."""
    real = torch.tensor([o < n for n, new in zip(batch.lengths, lengths, strict=True) for o in range(new)]).bool()
    value_scale, gradient_scale = scales(batch, packed)
    for name, x in packed.tokens.items():
        close(padded.tokens[name][real], x, what=name)
    for name, x in (packed.sequences | packed.scalars).items():
        close((padded.sequences | padded.scalars)[name], x, scale=value_scale, what=name)
    close(padded.gradient[real], packed.gradient, scale=gradient_scale, what="gradient")
    assert not padded.gradient[~real].any()
    if case.attached and case.axis == "token":
        assert not padded.tokens["loss"][~real].any()


@every_function
@given(data=st.data())
def test_padded_rows_are_the_packed_stream(case: Case, data: st.DataObject):
    batch = data.draw(packed_batches())
    given_options = data.draw(options(case, structure="cu_seqlens" in case.keywords or data.draw(st.booleans())))
    length = max([*batch.lengths, 0]) + data.draw(st.integers(1, 2))
    lengths = [length] * batch.size
    padded = batch.stretch(lengths, fill=data.draw(st.sampled_from(GARBAGE)))
    # where sequences matter, the rows are flattened with arange(0, B*L + 1, L); elsewhere they go in as (B, L)
    assert padded.cu_seqlens.tolist() == list(range(0, batch.size * length + 1, length))
    shape = None if case.structured(given_options) else (batch.size, length)
    check_padded(
        case, batch, lengths, evaluate(case, batch, given_options), evaluate(case, padded, given_options, shape=shape)
    )


def padding_tokens_change_nothing(
    case: Case, batch: PackedBatch, given_options: Options, whole: Outcome, data: st.DataObject
):
    more = data.draw(st.lists(st.integers(0, 3), min_size=batch.size, max_size=batch.size))
    lengths = [n + extra for n, extra in zip(batch.lengths, more, strict=True)]
    padded = batch.stretch(lengths, fill=data.draw(st.sampled_from(GARBAGE)))
    check_padded(case, batch, lengths, whole, evaluate(case, padded, given_options))


def the_order_of_the_sequences_does_not_matter(
    case: Case, batch: PackedBatch, given_options: Options, before: Outcome, data: st.DataObject
):
    order = data.draw(st.permutations(range(batch.size)))
    bounds = batch.cu_seqlens.tolist()
    tokens = torch.tensor([t for b in order for t in range(bounds[b], bounds[b + 1])], dtype=torch.int64)
    after = evaluate(case, batch.take(order), given_options)
    value_scale, gradient_scale = scales(batch, before)
    for name, x in before.tokens.items():
        close(after.tokens[name], x[tokens], what=name)
    for name, x in before.sequences.items():
        close(after.sequences[name], x[torch.tensor(order, dtype=torch.int64)], scale=value_scale, what=name)
    for name, x in before.scalars.items():
        close(after.scalars[name], x, scale=value_scale, what=name)
    close(after.gradient, before.gradient[tokens], scale=gradient_scale, what="gradient")


def garbage_under_the_mask_leaves_no_trace(
    case: Case, batch: PackedBatch, given_options: Options, whole: Outcome, data: st.DataObject
):
    clean = evaluate(case, batch.with_garbage(0.0), given_options)
    same_bits(whole, clean)
    same_bits(evaluate(case, batch.with_garbage(data.draw(st.sampled_from(GARBAGE))), given_options), clean)


@every_reduced_function
@given(data=st.data())
def test_micro_batches_with_a_shared_normalizer_sum_to_the_whole(case: Case, data: st.DataObject):
    batch, given_options = data.draw(packed_batches()), data.draw(options(case))
    parts = data.draw(st.lists(st.integers(0, 2), min_size=batch.size, max_size=batch.size))
    counts = [int(n > 0) if case.reduced(given_options) == "sequence" else n for n in batch.trained]
    count = float(sum(counts))
    kind = data.draw(st.sampled_from((float, int, torch.tensor, lambda n: torch.tensor(n, dtype=torch.float64))))
    micro = [[b for b in range(batch.size) if parts[b] == part] for part in range(3)]
    # with None: the count is the local default
    whole = evaluate(case, batch, given_options)
    value_scale, gradient_scale = scales(batch, whole)
    outcomes = [evaluate(case, batch.take(m), given_options, normalizer=kind(count)) for m in micro]
    for name, x in whole.scalars.items():
        close(total([o.scalars[name] for o in outcomes], x), x.double(), scale=single(x) * value_scale, what=name)
    gradient = torch.cat([o.gradient for o in outcomes])
    bounds = batch.cu_seqlens.tolist()
    order = torch.tensor([t for m in micro for b in m for t in range(bounds[b], bounds[b + 1])], dtype=torch.int64)
    close(gradient, whole.gradient[order], scale=gradient_scale, what="gradient")


def single(x: Tensor) -> float:
    """The factor from a tolerance of float64, in which `total` sums, to that of the dtype of `x`."""
    return torch.finfo(x.dtype).eps / torch.finfo(torch.float64).eps


def a_fully_masked_batch_is_an_attached_zero(
    case: Case, batch: PackedBatch, given_options: Options, data: st.DataObject
):
    batch = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)).with_garbage(
        data.draw(st.sampled_from(GARBAGE))
    )
    normalizer = None
    if case.axis == "scalar" and case.name != "diagnostics":
        normalizer = data.draw(st.sampled_from((None, 0, 7.0, torch.tensor(0), torch.tensor(7.0))))
    outcome = evaluate(case, batch, given_options, normalizer=normalizer)  # asserts that the loss is attached
    assert not outcome.gradient.any()
    assert all(not x.any() for x in (outcome.sequences | outcome.scalars).values())
    if case.attached and case.axis == "token":
        assert not outcome.tokens["loss"].any()
    for name in {"clipped", "dual_clipped"} & outcome.tokens.keys():
        assert not outcome.tokens[name].any()


@every_function
@given(data=st.data())
def test_half_precision_is_the_float32_computation_of_the_same_numbers(case: Case, data: st.DataObject):
    batch, given_options = data.draw(packed_batches(dtypes=HALF)), data.draw(options(case))
    half, wide = evaluate(case, batch, given_options), evaluate(case, batch.to(torch.float32), given_options)
    assert half.gradient.dtype == batch.logp.dtype
    # bit for bit, so a cast after the subtraction or a sum in half precision is noticed. The factors that the loss is
    # summed with for the gradient have the dtype of the batch, and are the same numbers.
    same_bits(
        replace(half, gradient=half.gradient.float()),
        replace(wide, gradient=wide.gradient.to(batch.logp.dtype).float()),
    )


@pytest.mark.parametrize("function", [kdloss.group_relative_advantages, kdloss.leave_one_out_advantages])
@given(batch=grouped_rewards(), data=st.data())
def test_groups_are_independent(function, batch: GroupedRewards, data: st.DataObject):
    whole = function(batch.rewards, group_ids=batch.group_ids)
    assert whole.dtype == (torch.float64 if batch.rewards.dtype == torch.float64 else torch.float32)
    for group in batch.group_ids.unique().tolist():
        members = batch.group_ids == group
        alone = function(batch.rewards[members], group_size=int(members.sum()))
        close(whole[members], alone, scale=1, what=f"group {group}")
        # advantages of a group sum to 0
        close(whole[members].sum(), torch.zeros_like(whole.sum()), scale=10, what="sum")
    order = torch.tensor(data.draw(st.permutations(range(len(whole)))), dtype=torch.int64)
    shuffled = function(batch.rewards[order], group_ids=batch.group_ids[order])
    close(shuffled, whole[order], scale=1, what="shuffled")


def test_advantages_of_nearly_equal_rewards_do_not_depend_on_their_order():
    """Found by fuzzing: an error of the mean, 1e-16 of the rewards, was divided by a standard deviation of 1e-6."""
    spread = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = 0.8 + 1e-6 * spread
    exact = rewards - rewards[0]  # without rounding, because the numbers are within a factor of two
    exact = (exact - exact.mean()) / exact.std()
    for order in itertools.permutations(range(5)):
        advantages = kdloss.group_relative_advantages(rewards[list(order)], group_size=5, eps=0)
        close(advantages, exact[list(order)], scale=1, what=str(order))


# One ulp of float32 and of float64 rewards, and two sums of the same parts.
ROUNDED = {
    "float32": torch.tensor([10.0] * 7 + [10.000001]),
    "float64": torch.tensor([10.0] * 7 + [10.000000000000002], dtype=torch.float64),
    "negative": torch.tensor([-10.0] * 7 + [-10.000001]),
    "sums": torch.tensor([(0.1 + 0.2) + 0.3, 0.1 + (0.2 + 0.3)], dtype=torch.float64),
}


@pytest.mark.parametrize("rewards", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_rewards_that_differ_by_rounding_have_no_advantage(rewards, eps):
    size = len(rewards)
    assert rewards.max() > rewards.min()
    assert not kdloss.group_relative_advantages(rewards, group_size=size, eps=eps).any()
    oracle = reference.group_relative_advantages(rewards.numpy(), group_size=size, eps=eps)
    assert not oracle.any()
    # nothing is divided here, so the difference stays as small as it is
    for function in (kdloss.leave_one_out_advantages, partial(kdloss.group_relative_advantages, scale_by_std=False)):
        found = function(rewards, group_size=size)
        close(found.sum(), torch.zeros_like(found.sum()), scale=1, what="sum")
        assert 0 < found.abs().max() < 2e-6
    # ten ulp are a spread, and so is one in another group of the same call
    wider = rewards + 10 * (rewards - rewards.min())
    other = torch.tensor([0.0, 1.0]).repeat(size // 2 + 1)[:size].to(rewards)
    found = kdloss.group_relative_advantages(torch.cat([wider, rewards, other]), group_size=size, eps=0.0)
    assert (found.reshape(3, size).abs().amax(1) > 0.5).tolist() == [True, False, True]
    close(found[2 * size :], (other - other.mean()) / other.std(), scale=1, what="another group")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rewards_differ_where_their_bits_do(dtype):
    """Their resolution is coarse, 0.03 at 10 in bfloat16: a difference of one ulp may be a real one."""
    rewards = torch.tensor([10.0] * 7 + [10.0 * (1 + torch.finfo(dtype).eps)], dtype=dtype)
    found = kdloss.group_relative_advantages(rewards, group_size=8)
    assert found[-1] > 2
    assert not kdloss.group_relative_advantages(rewards[:7], group_size=7).any()


@given(batch=packed_batches(), data=st.data())
def test_the_top_of_a_batch_does_not_depend_on_its_order_or_its_padding(batch: PackedBatch, data: st.DataObject):
    """The threshold is of all trained tokens, so sequences are not independent of each other."""
    fraction = data.draw(st.sampled_from((0.0, 0.2, 0.5, 1.0)))

    def top(x: PackedBatch) -> Tensor:
        return kdloss.top_entropy_mask(x.entropy, loss_mask=x.loss_mask, fraction=fraction)

    kept = top(batch)
    assert not (kept & ~batch.loss_mask).any()
    assert torch.equal(top(batch.with_garbage(data.draw(st.sampled_from(GARBAGE)))), kept)
    order = data.draw(st.permutations(range(batch.size)))
    bounds = batch.cu_seqlens.tolist()
    tokens = torch.tensor([t for b in order for t in range(bounds[b], bounds[b + 1])], dtype=torch.int64)
    assert torch.equal(top(batch.take(order)), kept[tokens])
    padded = batch.stretch([n + 2 for n in batch.lengths], fill=math.nan)
    assert torch.equal(top(padded)[padded.loss_mask], kept[batch.loss_mask])
    expected = reference.top_entropy_mask(
        batch.entropy.double().numpy(), loss_mask=batch.loss_mask.numpy(), fraction=fraction
    )
    assert kept.tolist() == expected.tolist()


def logits_outcome(batch: LogitsBatch, shape: tuple[int, ...] | None = None, **options: Any) -> Outcome:
    """Log-probs and entropy, flat over the rows, and the gradient of the logits."""
    logits = batch.logits.clone().requires_grad_()
    rows = batch.logits.shape[:1] if shape is None else shape
    labels = batch.labels.reshape(*rows, *batch.labels.shape[1:])
    logp, entropy = kdloss.token_logprobs_and_entropy(logits.reshape(*rows, logits.shape[-1]), labels, **options)
    assert logp.shape == labels.shape
    # no loss descends a log-prob of -inf, whose gradient is not a number
    total = torch.where(logp.isfinite(), logp, 0).cos().sum() + entropy.sin().sum()
    (gradient,) = torch.autograd.grad(total, logits)
    tokens = {"logp": logp.detach().reshape(batch.labels.shape), "entropy": entropy.detach().reshape(-1)}
    return Outcome(tokens, {}, {}, gradient)


@given(batch=logits_batches(), data=st.data())
def test_rows_of_logits_are_independent(batch: LogitsBatch, data: st.DataObject):
    rows = batch.logits.shape[0]
    whole = logits_outcome(batch)
    unit = 16 * torch.finfo(torch.float32).eps
    parts = [logits_outcome(LogitsBatch(batch.logits[t : t + 1], batch.labels[t : t + 1])) for t in range(rows)]
    for name, x in whole.tokens.items():
        close(x, torch.cat([x[:0], *(p.tokens[name] for p in parts)]), scale=1, what=name)
    close(whole.gradient, torch.cat([whole.gradient[:0], *(p.gradient for p in parts)]), scale=unit, what="gradient")
    order = torch.tensor(data.draw(st.permutations(range(rows))), dtype=torch.int64)
    shuffled = logits_outcome(LogitsBatch(batch.logits[order], batch.labels[order]))
    for name, x in whole.tokens.items():
        close(shuffled.tokens[name], x[order], scale=1, what=name)
    close(shuffled.gradient, whole.gradient[order], scale=unit, what="gradient")
    same_bits(logits_outcome(batch, shape=(1, rows)), whole)
    if rows % 2 == 0:
        same_bits(logits_outcome(batch, shape=(2, rows // 2)), whole)


@given(batch=logits_batches(), garbage=st.sampled_from(GARBAGE))
def test_garbage_in_rows_without_a_label_leaves_no_trace(batch: LogitsBatch, garbage: float):
    def filled(value: float) -> LogitsBatch:
        return replace(
            batch, logits=batch.logits.masked_fill(batch.ignored[:, None], torch.tensor(value).to(batch.logits.dtype))
        )

    clean = logits_outcome(filled(0.0))
    same_bits(logits_outcome(batch), clean)
    same_bits(logits_outcome(filled(garbage)), clean)
    assert not clean.gradient[batch.ignored].any()
    assert not clean.tokens["logp"][batch.labels == -100].any()
    assert not clean.tokens["entropy"][batch.ignored].any()


def head_outcome(batch: HeadBatch, **options: Any) -> tuple[kdloss.LogprobsAndEntropy, dict[str, Tensor]]:
    """Log-probs and entropy, and the gradients of hidden, weight and bias."""
    named = batch.named()
    leaves = {
        name: named[name].clone().requires_grad_() for name in ("hidden", "weight", "bias") if named[name] is not None
    }
    out = kdloss.linear_token_logprobs_and_entropy(**(named | leaves), **options)
    gradients = torch.autograd.grad(out.logp.cos().sum() + out.entropy.sin().sum(), list(leaves.values()))
    return out, dict(zip(leaves, gradients, strict=True))


@given(batch=head_batches(), garbage=st.sampled_from(GARBAGE), slack=st.integers(0, 2))
def test_untrained_rows_of_a_linear_head_leave_no_trace(batch: HeadBatch, garbage: float, slack: int):
    def filled(value: float) -> HeadBatch:
        return replace(
            batch, hidden=batch.hidden.masked_fill(~batch.used[:, None], torch.tensor(value).to(batch.hidden.dtype))
        )

    def bits(result: tuple[kdloss.LogprobsAndEntropy, dict[str, Tensor]]) -> list[Any]:
        return [
            x.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for x in (*result[0], *result[1].values())
        ]

    clean = head_outcome(filled(0.0))
    assert bits(head_outcome(batch)) == bits(clean)
    assert bits(head_outcome(filled(garbage))) == bits(clean)
    out, gradients = clean
    assert not gradients["hidden"][~batch.used].any()
    assert not out.logp[~batch.used].any()
    assert not out.entropy[~batch.used].any()
    for name, x in gradients.items():
        assert x.dtype == getattr(batch, name).dtype
    # a static bound, tight or not, gives the same numbers
    bounded, bounded_gradients = head_outcome(filled(garbage), max_trained_tokens=int(batch.used.sum()) + slack)
    close(bounded.logp, out.logp, scale=30, what="logp")
    close(bounded.entropy, out.entropy, scale=30, what="entropy")
    for name, x in gradients.items():
        close(bounded_gradients[name], x, scale=30, what=name)


@given(batch=head_batches(dtypes=(torch.float64, torch.float32)))
def test_a_linear_head_is_the_sum_of_its_rows(batch: HeadBatch):
    out, gradients = head_outcome(batch)
    parts = [
        head_outcome(
            HeadBatch(
                batch.hidden[t : t + 1], batch.weight, batch.bias, batch.labels[t : t + 1], batch.loss_mask[t : t + 1]
            )
        )
        for t in range(batch.hidden.shape[0])
    ]
    close(out.logp, torch.cat([out.logp[:0], *(p.logp for p, _ in parts)]), scale=30, what="logp")
    close(out.entropy, torch.cat([out.entropy[:0], *(p.entropy for p, _ in parts)]), scale=30, what="entropy")
    hidden = torch.cat([gradients["hidden"][:0], *(g["hidden"] for _, g in parts)])
    close(gradients["hidden"], hidden, scale=30, what="hidden")
    for name in gradients.keys() - {"hidden"}:
        summed = total([g[name] for _, g in parts], gradients[name]).to(gradients[name].dtype)
        close(gradients[name], summed, scale=30, what=name)


@given(rows=logits_batches(), head=head_batches())
def test_log_probs_alone_are_those_beside_the_entropy(rows: LogitsBatch, head: HeadBatch):
    logits = rows.logits.clone().requires_grad_()
    alone = kdloss.token_logprobs(logits, rows.labels)
    beside = kdloss.token_logprobs_and_entropy(logits, rows.labels).logp
    close(alone.detach(), beside.detach(), scale=1, what="logp")
    # no loss descends a log-prob of -inf
    slopes = [torch.autograd.grad(torch.where(x.isfinite(), x, 0).sum(), logits)[0] for x in (alone, beside)]
    close(slopes[0], slopes[1], scale=1, what="logits")

    named = head.named()
    leaves = {name: named[name].clone().requires_grad_() for name in ("hidden", "weight")}
    alone = kdloss.linear_token_logprobs(**(named | leaves))
    beside = kdloss.linear_token_logprobs_and_entropy(**(named | leaves)).logp
    close(alone.detach(), beside.detach(), scale=1, what="linear logp")
    gradients = [torch.autograd.grad(x.sum(), list(leaves.values())) for x in (alone, beside)]
    for name, x, y in zip(leaves, *gradients, strict=True):
        close(x, y, scale=30, what=name)


@given(batch=packed_batches())
def test_counts_are_the_sums_of_those_of_the_sequences(batch: PackedBatch):
    parts = [batch.take(b) for b in range(batch.size)]
    tokens = kdloss.global_token_count(batch.loss_mask)
    assert tokens.shape == ()
    assert tokens == sum(kdloss.global_token_count(part.loss_mask) for part in parts)
    sequences = kdloss.global_sequence_count(batch.loss_mask, cu_seqlens=batch.cu_seqlens)
    assert sequences == sum(int(part.loss_mask.any()) for part in parts)
    # as a denominator, each count is the default
    for mean, count, rest in (
        (kdloss.token_mean, tokens, {}),
        (kdloss.sequence_mean, sequences, {"cu_seqlens": batch.cu_seqlens}),
    ):
        given_count = mean(batch.entropy, loss_mask=batch.loss_mask, normalizer=count, **rest)
        assert torch.equal(given_count, mean(batch.entropy, loss_mask=batch.loss_mask, **rest))
