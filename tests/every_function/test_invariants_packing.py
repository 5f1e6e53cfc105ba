"""Holds the invariants of packing and elementwise functions, and that no public function is without invariants.

`test_invariants.py` holds those of functions with a `loss_mask`. The functions here have none: every token counts, so
batches hold no garbage. Padding follows the last token of a sequence, so it may change what that token gives.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import invariant_cases
import kdloss
from kdloss.testing.strategies import PackedBatch, packed_batches

ROW = 9  # of unpacked rows: the longest sequence of 6, stretched by 3


@dataclass(frozen=True)
class Case:
    """A function of a batch and of one floating-point input, its `logp` or `rewards`."""

    call: Callable[[PackedBatch, Tensor], Tensor]
    input: str = "logp"  # (T,), or "rewards": (B,)
    output: str = "token"  # or "sequence"
    follows: int = 0  # 1: an entry depends on the next token, -1: on the one before
    attached: bool = True


def ids(batch: PackedBatch) -> Tensor:
    """Token ids that move with the tokens."""
    return (batch.entropy.double() * 64).long()


def prompt_lengths(batch: PackedBatch) -> Tensor:
    return (batch.rewards.double().abs() * 3).long()


def padded(x: Tensor, lengths: list[int], *, left: bool = False) -> Tensor:
    """(B, ROW) by a loop, NaN past the end, or before the start."""
    rows = x.new_full((len(lengths), ROW), math.nan) + x[:0].sum()  # attached even without rows
    for b, part in enumerate(x.split(lengths)):
        rows[b, ROW - len(part) if left else 0 :][: len(part)] = part
    return rows


def left_mask(batch: PackedBatch) -> Tensor:
    """(B, ROW), True at the last tokens of every row."""
    return torch.arange(ROW) >= ROW - torch.tensor(batch.lengths, dtype=torch.int64)[:, None]


def fold(batch: PackedBatch, x: Tensor, *, weight: float | str) -> Tensor:
    weight_of = batch.weights if isinstance(weight, str) else weight
    return kdloss.fold_kd_reward(x, batch.advantages, rl_loss_weight=0.7, distill_loss_weight=weight_of)


def tokens(batch: PackedBatch) -> int:
    return batch.logp.shape[0]


def there_and_back(batch: PackedBatch, x: Tensor) -> Tensor:
    """Moved behind prompts that are two tokens longer, and back."""
    lengths = torch.tensor(batch.lengths, dtype=torch.int64)
    cu = kdloss.cu_seqlens_from_lengths(lengths + 2)
    long = torch.arange(int(cu[-1])) - cu[kdloss.segment_ids(cu)] >= 2
    short = torch.ones(tokens(batch), dtype=torch.bool)
    moves = {"from_cu_seqlens": batch.cu_seqlens, "to_cu_seqlens": cu}
    there = kdloss.align_responses(x, from_mask=short, to_mask=long, fill=math.nan, **moves)
    moves = {"from_cu_seqlens": cu, "to_cu_seqlens": batch.cu_seqlens}
    return kdloss.align_responses(there, from_mask=long, to_mask=short, fill=math.nan, **moves)


CASES = {
    "cu_seqlens_from_lengths": Case(
        lambda b, x: kdloss.cu_seqlens_from_lengths(torch.tensor(b.lengths, dtype=torch.int64)).diff(),
        output="sequence",
        attached=False,
    ),
    # the index of a sequence differs between batches, the reward it selects does not
    "segment_ids": Case(
        lambda b, x: b.rewards[kdloss.segment_ids(b.cu_seqlens, total_tokens=tokens(b))], attached=False
    ),
    "broadcast_to_tokens": Case(
        lambda b, x: kdloss.broadcast_to_tokens(x, cu_seqlens=b.cu_seqlens, total_tokens=tokens(b)), input="rewards"
    ),
    "next_token_labels": Case(
        lambda b, x: kdloss.next_token_labels(ids(b), cu_seqlens=b.cu_seqlens), follows=1, attached=False
    ),
    "response_mask": Case(
        lambda b, x: kdloss.response_mask(prompt_lengths(b), cu_seqlens=b.cu_seqlens, total_tokens=tokens(b)),
        follows=1,
        attached=False,
    ),
    "to_prediction_positions": Case(
        lambda b, x: kdloss.to_prediction_positions(x, cu_seqlens=b.cu_seqlens, fill=-7.0), follows=1
    ),
    "to_token_positions": Case(
        lambda b, x: kdloss.to_token_positions(x, cu_seqlens=b.cu_seqlens, fill=-7.0), follows=-1
    ),
    "pack": Case(
        lambda b, x: kdloss.pack(
            padded(x, b.lengths), lengths=torch.tensor(b.lengths, dtype=torch.int64), total_tokens=tokens(b)
        )
    ),
    "pack, left-padded": Case(lambda b, x: kdloss.pack(padded(x, b.lengths, left=True), mask=left_mask(b))),
    "unpack": Case(
        lambda b, x: kdloss.unpack(x, cu_seqlens=b.cu_seqlens, length=ROW, fill=-7.0).flatten(1), output="sequence"
    ),
    "align_responses": Case(there_and_back),
    "fold_kd_reward": Case(partial(fold, weight=0.3), attached=False),
    "fold_kd_reward, a weight per token": Case(partial(fold, weight="weights"), attached=False),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
batches = partial(packed_batches, garbage=False, huge_ratios=False, infinite_teacher=False)


def outcome(case: Case, batch: PackedBatch, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its sum with a factor per entry; entries where `kept` is False are left out."""
    x = getattr(batch, case.input).clone().requires_grad_()
    out = case.call(batch, x)
    assert out.shape[0] == (tokens(batch) if case.output == "token" else batch.size)
    assert out.requires_grad == case.attached
    if not case.attached:
        return out, torch.zeros_like(x)
    upstream = batch.entropy if case.output == "token" else batch.rewards[:, None] * torch.arange(ROW)
    if kept is not None:
        upstream = upstream * kept
    (gradient,) = torch.autograd.grad(out, x, upstream.to(out.dtype))
    return out.detach(), gradient


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Moved values are equal; a gradient is a sum over the tokens of one sequence, in another order."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype.is_floating_point:
        eps = torch.finfo(actual.dtype).eps
        # not assert_close, which takes longer than a function
        equal = torch.isclose(actual, expected, rtol=8 * eps, atol=64 * eps, equal_nan=True)
        assert equal.all(), f"{actual} is not {expected}"
    else:
        assert torch.equal(actual, expected)


@every_case
@given(batch=batches())
def test_packed_is_one_sequence_after_the_other(case: Case, batch: PackedBatch):
    out, gradient = outcome(case, batch)
    parts = [outcome(case, batch.take(b)) for b in range(batch.size)]
    assert_same(out, torch.cat([out[:0], *(part for part, _ in parts)]))
    assert_same(gradient, torch.cat([gradient[:0], *(part for _, part in parts)]))


@every_case
@given(batch=batches(), data=st.data())
def test_the_order_of_the_sequences_does_not_matter(case: Case, batch: PackedBatch, data: st.DataObject):
    order = data.draw(st.permutations(range(batch.size)))
    bounds = batch.cu_seqlens.tolist()
    of_tokens = torch.tensor([t for b in order for t in range(bounds[b], bounds[b + 1])], dtype=torch.int64)
    of_sequences = torch.tensor(order, dtype=torch.int64)
    before, after = outcome(case, batch), outcome(case, batch.take(order))
    assert_same(after[0], before[0][of_tokens if case.output == "token" else of_sequences])
    assert_same(after[1], before[1][of_tokens if case.input == "logp" else of_sequences])


@pytest.mark.parametrize(
    "case",
    [case for name, case in CASES.items() if name != "cu_seqlens_from_lengths"],  # its input is the lengths
    ids=[name for name in CASES if name != "cu_seqlens_from_lengths"],
)
@given(batch=batches(), data=st.data())
def test_padding_changes_only_the_last_token(case: Case, batch: PackedBatch, data: st.DataObject):
    more = data.draw(st.lists(st.integers(0, 3), min_size=batch.size, max_size=batch.size))
    longer = [n + extra for n, extra in zip(batch.lengths, more, strict=True)]
    stretched = batch.stretch(longer, fill=1.5)
    pairs = list(zip(batch.lengths, longer, strict=True))
    real = torch.tensor([o < n for n, new in pairs for o in range(new)], dtype=torch.bool)
    # a function of the next token is not checked at the last one
    asked = torch.tensor([o < n - (case.follows == 1) for n, _ in pairs for o in range(n)], dtype=torch.bool)
    asked_there = torch.zeros_like(real).masked_scatter(real, asked)
    if case.output == "sequence":
        column = torch.arange(ROW)
        asked = asked_there = column < torch.tensor(batch.lengths, dtype=torch.int64)[:, None]
    before, after = outcome(case, batch, asked), outcome(case, stretched, asked_there)
    assert_same(after[0][asked_there], before[0][asked])
    assert_same(after[1][real] if case.input == "logp" else after[1], before[1])


@given(batch=packed_batches(), fill=st.sampled_from((math.nan, math.inf, -math.inf)))
def test_a_fold_is_elementwise(batch: PackedBatch, fill: float):
    """It has no mask: each token's result depends on that token only, in any shape."""
    clean = batch.with_garbage(0.0)
    for case in (CASES["fold_kd_reward"], CASES["fold_kd_reward, a weight per token"]):
        expected, _ = outcome(case, clean)
        filled, _ = outcome(case, batch.with_garbage(fill))
        assert torch.equal(filled[batch.loss_mask], expected[batch.loss_mask])
    shaped = kdloss.fold_kd_reward(clean.logp[None], clean.advantages[None], distill_loss_weight=0.3)
    flat = kdloss.fold_kd_reward(clean.logp, clean.advantages, distill_loss_weight=0.3)
    assert torch.equal(shaped[0], flat)


@given(batch=packed_batches(huge_ratios=False), fill=st.sampled_from((math.nan, math.inf, -math.inf, 1e30)))
def test_reports_read_trained_tokens_alone(batch: PackedBatch, fill: float):
    """Garbage under the mask changes no word of a report, and the padding of rows no verdict."""
    clean, dirty = batch.with_garbage(0.0), batch.with_garbage(fill)
    report, alignment = reports(clean)
    assert tuple(map(str, reports(dirty))) == (str(report), str(alignment))
    of_rows, alignment_of_rows = reports(dirty, packed=False)
    assert [f[:2] for f in of_rows.findings] == [f[:2] for f in report.findings]
    assert str(alignment_of_rows) == str(alignment)


def reports(batch: PackedBatch, *, packed: bool = True) -> tuple[kdloss.BatchReport, kdloss.Alignment]:
    offsets = {"cu_seqlens": batch.cu_seqlens} if packed else {}

    def laid_out(x: Tensor) -> Tensor:
        return x if packed else kdloss.unpack(x, cu_seqlens=batch.cu_seqlens, length=ROW)

    logp, old_logp, teacher_logp, mask, advantages = map(
        laid_out, (batch.logp, batch.old_logp, batch.teacher_logp, batch.loss_mask, batch.advantages)
    )
    report = kdloss.check_batch(logp, old_logp, teacher_logp, loss_mask=mask, advantages=advantages, **offsets)
    alignment = kdloss.check_alignment(logp, teacher_logp, loss_mask=mask, **offsets)
    return report, alignment


# --- the list ---------------------------------------------------------------------------------------------------------

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "generalized_jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
)

# Tests of functions that take no packed batch, or return no tensor.
OWN = {
    "token_logprobs_and_entropy": ("test_rows_of_logits_are_independent",),
    "token_logprobs": ("test_log_probs_alone_are_those_beside_the_entropy",),
    "linear_token_logprobs_and_entropy": (
        "test_untrained_rows_of_a_linear_head_leave_no_trace",
        "test_a_linear_head_is_the_sum_of_its_rows",
    ),
    "linear_token_logprobs": ("test_log_probs_alone_are_those_beside_the_entropy",),
    "group_relative_advantages": ("test_groups_are_independent",),
    "leave_one_out_advantages": ("test_groups_are_independent",),
    **dict.fromkeys(DIVERGENCES, ("test_rows_of_divergences_are_independent",)),
    "reverse_kl_baseline": ("test_rows_of_baselines_are_independent",),
    **{f"linear_{name}": ("test_a_linear_divergence_is_the_sum_of_its_trained_rows",) for name in DIVERGENCES},
    **{f"topk_{name}": ("test_rows_of_topk_divergences_are_independent",) for name in DIVERGENCES[:3]},
    **{f"linear_topk_{name}": ("test_rows_of_linear_topk_divergences_are_independent",) for name in DIVERGENCES[:3]},
    **dict.fromkeys(
        ("topk_sampled_reverse_kl", "linear_topk_sampled_reverse_kl"),
        ("test_rows_of_sampled_topk_losses_are_independent",),
    ),
    "topk_diagnostics": ("test_topk_diagnostics_are_means_of_their_rows",),
    "global_token_count": ("test_counts_are_the_sums_of_those_of_the_sequences",),
    "global_sequence_count": ("test_counts_are_the_sums_of_those_of_the_sequences",),
    "top_entropy_mask": ("test_the_top_of_a_batch_does_not_depend_on_its_order_or_its_padding",),
    "fused_linear_loss": ("test_a_fused_loss_is_the_sum_of_its_micro_batches",),
    **dict.fromkeys(("check_alignment", "check_batch"), ("test_reports_read_trained_tokens_alone",)),
}


def test_no_public_function_without_invariants():
    functions = {name for name in kdloss.__all__ if inspect.isfunction(getattr(kdloss, name))}
    functions -= {"output_head"}  # of a module: it sees no tokens
    on_batches = {case.name for case in invariant_cases.CASES}
    assert functions - on_batches - {name.split(",")[0] for name in CASES} - OWN.keys() == set()
    assert on_batches <= functions


def test_what_is_named_is_a_test_under_hypothesis():
    trees = [ast.parse(file.read_text("utf-8")) for file in Path(__file__).parent.glob("test_invariants*.py")]
    given_tests = {
        f.name
        for tree in trees
        for f in tree.body
        if isinstance(f, ast.FunctionDef) and any(ast.unparse(d).startswith("given(") for d in f.decorator_list)
    }
    assert {test for tests in OWN.values() for test in tests} <= given_tests
