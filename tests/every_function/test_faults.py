"""Holds one regression test per fault that well-known trainers had: the library passes its check, the fault fails it.

Each test has one `check`, written from the definition, token by token. The library must pass it, and the fault,
injected as a small variant, must fail it. Where ordinary data hides the fault, the variant must also pass on such data,
so the test catches the fault and not a slip in the variant.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kdloss

# float64 everywhere unless a test says otherwise: a dozen additions of numbers of order 1 round at 1e-15
assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)

# What well-known trainers got wrong, in the words that the tests' docstrings begin with. Two more, a renormalised top-1
# KL that is identically 0 and a clamped one without gradient, are in tests/_divergences/test_topk.py.
FAULTS = (
    "teacher log-probs shifted by one",
    "labels rolled across a packed boundary",
    "the first token of a packed sequence in the loss",
    "a mask that shrinks its own denominator",
    "count taken before filtering",
    "micro-batch means averaged",
    "double division under accumulation",
    "a fully masked batch",
    "-inf padding that gives NaN gradients",
    "phantom vocabulary rows",
    "temperature on one side only",
    "discounting through tool or prompt tokens",
    "γ^i in place of γ^(i-t)",  # noqa: RUF001
    "the entropy's gradient silently dropped",
    "B×L grids past 65535",  # noqa: RUF001
    "32-bit offsets",
)

VOCAB = 5
LENGTHS = torch.tensor([5, 0, 3, 4])  # one empty sequence: a boundary that is two boundaries
CU_SEQLENS = torch.tensor([0, 5, 5, 8, 12])
TOTAL = 12


def catches(
    check: Callable[[Callable[..., object]], None], right: Callable[..., object], *faulty: Callable[..., object]
):
    """The check passes on the library and fails on every faulty variant."""
    check(right)
    for variant in faulty:
        with pytest.raises(AssertionError):
            check(variant)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (TOTAL,), generator=torch.Generator().manual_seed(seed))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    assert loss.requires_grad, "the loss is cut off from the graph"
    return torch.autograd.grad(loss, of)[0]


def predictions() -> Iterator[tuple[int, int]]:
    """(position, position of the token it predicts) of every pair inside a sequence, from the definition."""
    for start, stop in zip(CU_SEQLENS.tolist(), CU_SEQLENS.tolist()[1:], strict=False):
        for position in range(start, stop - 1):
            yield position, position + 1


def test_teacher_logprobs_shifted_by_one():
    """Fault: teacher log-probs shifted by one: entry t of a server is for token t, entry t of the student for t + 1."""
    ids, student, teacher = token_ids(), leaf(randn(TOTAL, VOCAB)), randn(TOTAL, VOCAB, seed=1).log_softmax(-1)
    labels = kdloss.next_token_labels(ids, cu_seqlens=CU_SEQLENS)
    served = torch.full((TOTAL,), math.nan, dtype=torch.float64)  # the server has none for a first token
    value, slope = 0.0, torch.zeros(TOTAL, VOCAB, dtype=torch.float64)
    log_q = student.detach().log_softmax(-1)
    for t, target in predictions():
        token = ids[target]
        served[target] = teacher[t, token]
        gap = log_q[t, token] - teacher[t, token]
        value += gap
        slope[t] = gap * (torch.eye(VOCAB, dtype=torch.float64)[token] - log_q[t].exp())

    def check(align: Callable[[Tensor], Tensor]):
        logp = kdloss.token_logprobs(student, labels)
        out = kdloss.distillation_loss(logp, None, align(served), loss_mask=labels != -100, normalizer=1.0)
        assert_equal(out.reverse_kl, value)
        assert_equal(gradient(out.loss, student), slope)

    def as_served(x: Tensor) -> Tensor:
        return x.nan_to_num(0)

    def wrong_way(x: Tensor) -> Tensor:
        return kdloss.to_token_positions(x, cu_seqlens=CU_SEQLENS, fill=0).nan_to_num(0)

    catches(check, partial(kdloss.to_prediction_positions, cu_seqlens=CU_SEQLENS, fill=math.nan), as_served, wrong_way)


def test_labels_rolled_across_a_packed_boundary():
    """Fault: labels rolled across a packed boundary, so a sequence's end is trained on the next one's first token."""
    ids, logits = token_ids(), leaf(randn(TOTAL, VOCAB))
    log_q = logits.detach().log_softmax(-1)
    slope = torch.zeros(TOTAL, VOCAB, dtype=torch.float64)
    value = 0.0
    for t, target in predictions():
        value -= log_q[t, ids[target]]
        slope[t] = log_q[t].exp() - torch.eye(VOCAB, dtype=torch.float64)[ids[target]]

    def check(labels_of: Callable[[Tensor], Tensor]):
        labels = labels_of(ids)
        loss = kdloss.sft_loss(kdloss.token_logprobs(logits, labels), loss_mask=labels != -100, normalizer=1.0).loss
        assert_equal(loss, value)
        assert_equal(gradient(loss, logits), slope)

    def rolled(x: Tensor) -> Tensor:
        labels = x.roll(-1)
        labels[-1] = -100  # the end of the stream is handled; the ends inside it are not
        return labels

    catches(check, partial(kdloss.next_token_labels, cu_seqlens=CU_SEQLENS), rolled)


def test_first_token_of_a_packed_sequence_in_the_loss():
    """Fault: the first token of a packed sequence in the loss, predicted from the last token of its neighbour."""
    ids, logits = token_ids(), leaf(randn(TOTAL, VOCAB))
    labels = ids.roll(-1)  # shifted over the whole stream, so only the mask separates sequences

    def check(mask_of: Callable[[Tensor], Tensor], prompt_lengths: Tensor):
        prompt = torch.repeat_interleave(prompt_lengths, LENGTHS)
        start = torch.repeat_interleave(CU_SEQLENS[:-1], LENGTHS)
        trained = torch.zeros(TOTAL, dtype=torch.bool)
        for t, target in predictions():
            trained[t] = target - start[t] >= prompt[t]
        loss_mask = mask_of(prompt_lengths)
        assert loss_mask.tolist() == trained.tolist()
        loss = kdloss.sft_loss(kdloss.token_logprobs(logits, labels), loss_mask=loss_mask).loss
        slope = logits.detach().softmax(-1) - torch.eye(VOCAB, dtype=torch.float64)[labels]
        assert_equal(gradient(loss, logits), torch.where(trained[:, None], slope, 0) / trained.sum())

    def token_mask_shifted(prompt_lengths: Tensor) -> Tensor:
        """True at response tokens, then shifted by one along the stream."""
        offset = torch.arange(TOTAL) - torch.repeat_interleave(CU_SEQLENS[:-1], LENGTHS)
        return (offset >= torch.repeat_interleave(prompt_lengths, LENGTHS)).roll(-1)

    right = partial(kdloss.response_mask, cu_seqlens=CU_SEQLENS, total_tokens=TOTAL)
    with_prompts = torch.tensor([2, 1, 1, 3])
    check(right, with_prompts)
    check(token_mask_shifted, with_prompts)  # every prompt hides the fault
    catches(partial(check, prompt_lengths=torch.tensor([2, 0, 0, 1])), right, token_mask_shifted)


def test_mask_that_shrinks_its_own_denominator():
    """Fault: a mask that shrinks its own denominator, so dropping half of the tokens doubles the rest."""
    logp, teacher_logp = leaf(-randn(TOTAL).abs()), -randn(TOTAL, seed=1).abs()
    loss_mask = torch.arange(TOTAL) % 4 != 3  # 9 tokens
    reward = teacher_logp - logp.detach()

    def check(loss: Callable[..., kdloss.LossOutput], kd_mask: Tensor):
        out = loss(logp, None, teacher_logp, loss_mask=loss_mask, kd_mask=kd_mask)
        kept = torch.where(loss_mask & kd_mask, reward, 0)
        assert_equal(out.reverse_kl, -kept.sum() / 9)
        assert_equal(gradient(out.loss, logp), -kept / 9)

    def filtered_mean(*args: Tensor, loss_mask: Tensor, kd_mask: Tensor) -> kdloss.LossOutput:
        return kdloss.distillation_loss(*args, loss_mask=loss_mask & kd_mask)

    check(filtered_mean, torch.ones(TOTAL, dtype=torch.bool))  # nothing dropped hides the fault
    catches(partial(check, kd_mask=torch.arange(TOTAL) % 2 == 0), kdloss.distillation_loss, filtered_mean)


def test_count_taken_before_filtering():
    """Fault: count taken before filtering, so tokens that no position predicts dilute the mean."""
    x = leaf(randn(TOTAL))

    def check(mean: Callable[..., Tensor], prompt_lengths: Tensor):
        loss_mask = kdloss.response_mask(prompt_lengths, cu_seqlens=CU_SEQLENS, total_tokens=TOTAL)
        kept = [x[t].item() for t in range(TOTAL) if loss_mask[t]]
        loss = mean(x, loss_mask=loss_mask, prompt_lengths=prompt_lengths)
        assert_equal(loss, torch.tensor(sum(kept) / len(kept), dtype=torch.float64))
        assert_equal(gradient(loss, x), loss_mask.double() / len(kept))

    def right(x: Tensor, *, loss_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        return kdloss.token_mean(x, loss_mask=loss_mask)

    def counted_first(x: Tensor, *, loss_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        responses = (LENGTHS - prompt_lengths).clamp(min=0).sum()
        return kdloss.token_mean(x, loss_mask=loss_mask, normalizer=responses)

    check(counted_first, torch.tensor([2, 1, 1, 3]))  # without empty prompts nothing is filtered
    catches(partial(check, prompt_lengths=torch.tensor([2, 0, 0, 0])), right, counted_first)


# Micro-batches of one optimizer step: trained tokens 4 + 1 + 2 of 12, and the same count each.
UNEVEN = torch.tensor([1, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0]).bool()
EVEN = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1]).bool()


def check_accumulation(
    micro_loss: Callable[..., Tensor], loss_mask: Tensor, parts: int, loss: Callable[..., kdloss.LossOutput]
):
    """Micro-batches, one after the other, sum to the whole batch, in value and gradient."""
    logp, old_logp = -randn(TOTAL).abs(), -randn(TOTAL, seed=1).abs()
    teacher_logp, advantages = -randn(TOTAL, seed=2).abs(), randn(TOTAL, seed=3)
    whole = leaf(logp)
    expected = loss(whole, old_logp, teacher_logp, advantages, loss_mask=loss_mask, distill_loss_weight=0.3).loss
    inputs = [x.chunk(parts) for x in (old_logp, teacher_logp, advantages)]
    slopes, total = [], 0.0
    for logp_part, mask, *rest in zip(logp.chunk(parts), loss_mask.chunk(parts), *inputs, strict=True):
        piece = leaf(logp_part)
        value = micro_loss(
            partial(loss, piece, *rest, loss_mask=mask, distill_loss_weight=0.3), count=loss_mask.sum(), parts=parts
        )
        slopes.append(gradient(value, piece))
        total += value.detach()
    assert_equal(total, expected.detach())
    assert_equal(torch.cat(slopes), gradient(expected, whole))


def shared_normalizer(loss: Callable[..., kdloss.LossOutput], *, count: Tensor, parts: int) -> Tensor:
    return loss(normalizer=count).loss


def test_micro_batch_means_averaged():
    """Fault: micro-batch means averaged, so a token of a short micro-batch weighs more than one of a long."""

    def averaged(loss: Callable[..., kdloss.LossOutput], *, count: Tensor, parts: int) -> Tensor:
        return loss().loss / parts

    check = partial(check_accumulation, loss=kdloss.kdrl_loss, parts=3)
    check(averaged, EVEN)  # equal counts hide the fault
    check(shared_normalizer, EVEN)
    catches(partial(check, loss_mask=UNEVEN), shared_normalizer, averaged)


def test_double_division_under_accumulation():
    """Fault: double division under accumulation, by the count of the whole step and by the number of micro-batches."""

    def divided_twice(loss: Callable[..., kdloss.LossOutput], *, count: Tensor, parts: int) -> Tensor:
        return loss(normalizer=count).loss / parts

    check = partial(check_accumulation, loss=kdloss.kdrl_loss, loss_mask=UNEVEN)
    check(divided_twice, parts=1)  # one micro-batch hides the fault
    catches(partial(check, parts=3), shared_normalizer, divided_twice)

    def divided_inside(*args: Tensor, loss_mask: Tensor, normalizer: Tensor | None = None, **rest: float):
        out = kdloss.kdrl_loss(*args, loss_mask=loss_mask, **rest)  # a local mean ...
        return out if normalizer is None else out._replace(loss=out.loss / normalizer)  # ... over the passed count

    with pytest.raises(AssertionError):
        check_accumulation(shared_normalizer, UNEVEN, 3, divided_inside)


def scalar_losses() -> dict[str, Callable[..., Tensor]]:
    """Every public function that returns a scalar, as a function of (logp, other, loss_mask, cu_seqlens)."""
    return {
        "token_mean": lambda logp, other, m, cu: kdloss.token_mean(logp - other, loss_mask=m),
        "token_mean, count passed": lambda logp, other, m, cu: kdloss.token_mean(
            logp - other, loss_mask=m, normalizer=m.sum()
        ),
        "token_mean, number passed": lambda logp, other, m, cu: kdloss.token_mean(
            logp - other, loss_mask=m, normalizer=int(m.sum())
        ),
        "sequence_mean": lambda logp, other, m, cu: kdloss.sequence_mean(logp - other, loss_mask=m, cu_seqlens=cu),
        "sft_loss": lambda logp, other, m, cu: kdloss.sft_loss(logp, loss_mask=m).loss,
        "grpo_loss": lambda logp, other, m, cu: kdloss.grpo_loss(logp, other, other, loss_mask=m).loss,
        "distillation_loss": lambda logp, other, m, cu: (
            kdloss.distillation_loss(
                logp, other, other, loss_mask=m, kd_discount=0.5, reduction="sequence_mean", cu_seqlens=cu
            ).loss
        ),
        "kdrl_loss": lambda logp, other, m, cu: (
            kdloss.kdrl_loss(logp, other, other, other, loss_mask=m, distill_loss_weight=0.005).loss
        ),
        "kdrl_loss, no term": lambda logp, other, m, cu: (
            kdloss.kdrl_loss(logp, None, None, None, loss_mask=m, rl_loss_weight=0, distill_loss_weight=0).loss
        ),
    }


# no sequence, no token, empty sequences only, and a stream of NaN whose every token is masked
NOTHING_TRAINED = [(0, [0]), (0, [0, 0, 0]), (4, [0, 4]), (6, [0, 2, 2, 6])]


def check_nothing_trained(loss: Callable[..., Tensor], total: int, cu_seqlens: list[int]):
    logp = leaf(torch.full((total,), math.nan, dtype=torch.float64))
    garbage = torch.full((total,), -math.inf, dtype=torch.float64)
    value = loss(logp, garbage, torch.zeros(total, dtype=torch.bool), torch.tensor(cu_seqlens))
    assert value.item() == 0
    assert gradient(value, logp).tolist() == [0.0] * total


@pytest.mark.parametrize("name", scalar_losses())
@pytest.mark.parametrize(("total", "cu_seqlens"), NOTHING_TRAINED)
def test_fully_masked_batch(name: str, total: int, cu_seqlens: list[int]):
    """Fault: a fully masked batch gives 0/0, or a zero that is cut off from the graph."""

    def zero_by_zero(logp: Tensor, other: Tensor, m: Tensor, cu: Tensor) -> Tensor:
        return torch.where(m, logp, 0).sum() / m.sum()

    def detached(logp: Tensor, other: Tensor, m: Tensor, cu: Tensor) -> Tensor:
        return zero_by_zero(logp, other, m, cu) if m.any() else torch.tensor(0.0)

    check = partial(check_nothing_trained, total=total, cu_seqlens=cu_seqlens)
    catches(check, scalar_losses()[name], zero_by_zero, detached)


def per_token_losses() -> dict[str, Callable[..., Tensor]]:
    """Every public per-token loss, as a function of (logp, other, loss_mask), where `other` is any second policy."""
    cu = torch.tensor([0, 4, TOTAL])
    advantages = randn(TOTAL, seed=5)

    def surrogate(f: Callable[..., kdloss.Surrogate], **options: object) -> Callable[..., Tensor]:
        return lambda logp, other, m: f(logp, other, advantages, loss_mask=m, **options).loss

    return {
        "kl_k1": lambda logp, other, m: kdloss.kl_k1(logp, other, loss_mask=m),
        "kl_k2": lambda logp, other, m: kdloss.kl_k2(logp, other, loss_mask=m),
        "kl_k3": lambda logp, other, m: kdloss.kl_k3(logp, other, loss_mask=m),
        "importance_sampled": surrogate(kdloss.importance_sampled_surrogate),
        "max_ratio": surrogate(kdloss.importance_sampled_surrogate, max_ratio=1.1),
        "clipped": surrogate(kdloss.clipped_surrogate, dual_clip=3.0),
        "sequence_clipped": surrogate(kdloss.sequence_clipped_surrogate, cu_seqlens=cu, clip_low=0.9, clip_high=9.0),
        "cispo": surrogate(kdloss.cispo_surrogate, clip_high=0.2),
        "sapo": surrogate(kdloss.sapo_surrogate),
        "kdrl_token_loss": lambda logp, other, m: kdloss.kdrl_token_loss(
            logp, other, other, advantages, loss_mask=m, distill_loss_weight=0.005
        ),
    }


@pytest.mark.parametrize("name", per_token_losses())
@pytest.mark.parametrize("side", ["other", "logp", "both"])
def test_inf_padding_gives_no_nan_gradient(name: str, side: str):
    """Fault: -inf padding that gives NaN gradients, as the mask comes after the exponential."""
    logp, other = -randn(TOTAL).abs(), -randn(TOTAL, seed=1).abs()
    loss_mask = torch.arange(TOTAL) % 3 != 2

    def with_padding(x: Tensor, pad: float) -> Tensor:
        return leaf(torch.where(loss_mask, x, pad))

    def check(loss: Callable[..., Tensor]):
        clean, padded = with_padding(logp, 0.0), with_padding(logp, -math.inf if side != "other" else 0.0)
        expected = loss(clean, with_padding(other, 0.0).detach(), loss_mask)
        got = loss(padded, with_padding(other, -math.inf if side != "logp" else 0.0).detach(), loss_mask)
        assert_equal(got, expected)
        slope = gradient(got.sum(), padded)
        assert_equal(slope, gradient(expected.sum(), clean))
        assert not slope[~loss_mask].any()

    def masked_last(logp: Tensor, other: Tensor, m: Tensor) -> Tensor:
        ratio = (logp - other).exp()
        return torch.where(m, ratio * (other - logp.detach()), 0)

    catches(check, per_token_losses()[name], masked_last)


@pytest.mark.parametrize("pad", [-math.inf, math.nan])
def test_inf_padding_leaves_no_trace_in_a_mean(pad: float):
    """Fault: -inf padding that gives NaN gradients, here as 0 * inf in a mean that multiplies by its mask."""
    loss_mask = torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0]).bool()  # 3, 2 and 1 in the sequences with tokens
    per_sequence = torch.tensor([3] * 5 + [2] * 3 + [1] * 4)
    by_token, by_sequence = loss_mask.double() / 6, loss_mask.double() / per_sequence / 3

    def check(mean: Callable[..., Tensor], weight: Tensor, pad: float):
        logp = leaf(torch.where(loss_mask, randn(TOTAL), pad))
        value = mean(logp, loss_mask=loss_mask)
        assert_equal(value, (weight * randn(TOTAL)).sum())
        assert_equal(gradient(value, logp), weight)

    def product(x: Tensor, *, loss_mask: Tensor) -> Tensor:
        return (loss_mask * x).sum() / loss_mask.sum()

    def product_by_sequence(x: Tensor, *, loss_mask: Tensor) -> Tensor:
        return (loss_mask * x / per_sequence).sum() / 3

    sequence_mean = partial(kdloss.sequence_mean, cu_seqlens=CU_SEQLENS)
    check(product, by_token, 0.0)  # padding with zeros hides the fault
    check(product_by_sequence, by_sequence, 0.0)
    catches(partial(check, weight=by_token, pad=pad), kdloss.token_mean, product)
    catches(partial(check, weight=by_sequence, pad=pad), sequence_mean, product_by_sequence)


def test_inf_logits_give_no_nan_entropy_gradient():
    """Fault: -inf padding that gives NaN gradients, as p log p is taken at logits of -inf (a top-k filter's)."""
    kept = torch.tensor([True, False, True, True, False])
    z, labels = randn(3, VOCAB), torch.tensor([0, 2, 3])

    def check(logp_and_entropy: Callable[..., tuple[Tensor, Tensor]]):
        small, filtered = leaf(z[:, kept]), leaf(z.masked_fill(~kept, -math.inf))
        small_logp = small.log_softmax(-1)
        entropy = -(small_logp.exp() * small_logp).sum(-1)
        got = logp_and_entropy(filtered, labels)
        assert_equal(got[1], entropy)
        slope = gradient(got[0].sum() + got[1].sum(), filtered)
        position = torch.tensor([0, 1, 2])[:, None]  # the labels among the three kept columns
        assert_equal(slope[:, kept], gradient(small_logp.gather(-1, position).sum() + entropy.sum(), small))
        assert not slope[:, ~kept].any()

    def naive(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        terms = torch.where(log_p == -math.inf, 0, log_p.exp() * log_p)  # the value is right, the gradient is not
        return log_p.gather(-1, labels[:, None]).squeeze(-1), -terms.sum(-1)

    assert_equal(naive(z.masked_fill(~kept, -math.inf), labels)[1], naive(z[:, kept], torch.tensor([0, 1, 2]))[1])
    catches(check, kdloss.token_logprobs_and_entropy, naive)


def test_phantom_vocabulary_rows():
    """Fault: phantom vocabulary rows, where the padding of the head's vocabulary takes probability mass."""
    hidden, labels = randn(6, 4), token_ids()[:6]

    def check(logp_and_entropy: Callable[..., tuple[Tensor, Tensor]], phantom: Tensor):
        head = randn(VOCAB, 4, seed=1)
        padded = leaf(torch.cat([head, phantom]))
        log_p = torch.log_softmax(hidden @ head.T, -1)
        got = logp_and_entropy(hidden, padded, labels, vocab_size=VOCAB)
        assert_equal(got[0], log_p.gather(-1, labels[:, None]).squeeze(-1))
        assert_equal(got[1], -(log_p.exp() * log_p).sum(-1))
        slope = gradient(got[0].sum(), padded)
        assert_equal(slope[:VOCAB], (torch.eye(VOCAB, dtype=torch.float64)[labels] - log_p.exp()).T @ hidden)
        assert not slope[VOCAB:].any()

    def from_logits(hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
        return kdloss.token_logprobs_and_entropy(hidden @ weight.T, labels, vocab_size=vocab_size)

    def whole_head(hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
        return kdloss.token_logprobs_and_entropy(hidden @ weight.T, labels)

    check(whole_head, torch.zeros(0, 4, dtype=torch.float64))  # a head without padding hides the fault
    for library in (kdloss.linear_token_logprobs_and_entropy, from_logits):
        # padding is initialised with zero rows; a logit of 0 is not a mass of 0
        catches(partial(check, phantom=torch.zeros(3, 4, dtype=torch.float64)), library, whole_head)


def test_temperature_on_one_side_only():
    """Fault: temperature on one side only, so a student equal to its teacher moves away from it."""
    labels = torch.arange(VOCAB)  # every outcome of one next-token distribution, weighted by its probability

    def check(score: Callable[..., tuple[Tensor, Tensor]], temperature: float, teacher: Tensor):
        student = leaf(randn(VOCAB))
        log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum()
        logp, teacher_logp = score(student.expand(VOCAB, VOCAB), teacher.expand(VOCAB, VOCAB), temperature)
        # the probabilities of the outcomes are passed as per-token weights, which are detached
        out = kdloss.kdrl_loss(
            logp,
            None,
            teacher_logp,
            None,
            loss_mask=torch.ones(VOCAB, dtype=torch.bool),
            rl_loss_weight=0,
            distill_loss_weight=log_q.exp().detach(),
            normalizer=1.0,
        )
        assert_equal(out.loss, kl)
        assert_equal(gradient(out.loss, student), gradient(kl, student))

    def both(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return (
            kdloss.token_logprobs(student, labels, temperature=temperature),
            kdloss.token_logprobs(teacher, labels, temperature=temperature),
        )

    def student_only(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return kdloss.token_logprobs(student, labels, temperature=temperature), kdloss.token_logprobs(teacher, labels)

    def teacher_only(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return kdloss.token_logprobs(student, labels), kdloss.token_logprobs(teacher, labels, temperature=temperature)

    check(student_only, 1.0, randn(VOCAB, seed=1))  # temperature 1 hides the fault
    for teacher in (randn(VOCAB, seed=1), randn(VOCAB)):  # another policy; the student itself
        catches(partial(check, temperature=0.7, teacher=teacher), both, student_only, teacher_only)


def check_returns(returns: Callable[..., Tensor], loss_mask: Tensor, discount: float):
    """Return-to-go by its definition: the k-th trained token after t counts discount**k."""
    rewards = randn(TOTAL)
    expected = torch.zeros(TOTAL, dtype=torch.float64)
    for start, stop in zip(CU_SEQLENS.tolist(), CU_SEQLENS.tolist()[1:], strict=False):
        trained = [t for t in range(start, stop) if loss_mask[t]]
        for i, t in enumerate(trained):
            expected[t] = sum(discount**k * rewards[u].item() for k, u in enumerate(trained[i:]))
    got = returns(rewards, loss_mask=loss_mask, cu_seqlens=CU_SEQLENS, discount=discount)
    assert_equal(got, expected)


def descended_returns(rewards: Tensor, *, loss_mask: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    """The returns that `distillation_loss` descends, read from its gradient: -d loss / d logp."""
    logp = leaf(-randn(TOTAL, seed=7).abs())
    teacher_logp = torch.where(loss_mask, logp.detach() + rewards, math.nan)
    out = kdloss.distillation_loss(
        logp, None, teacher_logp, loss_mask=loss_mask, cu_seqlens=cu_seqlens, kd_discount=discount, normalizer=1.0
    )
    return -gradient(out.loss, logp)


def by_position(rewards: Tensor, *, loss_mask: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    returns = torch.where(loss_mask, rewards, 0)
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        for t in reversed(range(start, stop - 1)):
            returns[t] = returns[t] + discount * returns[t + 1]
    return torch.where(loss_mask, returns, 0)


def test_discounting_through_tool_or_prompt_tokens():
    """Fault: discounting through tool or prompt tokens, so a long tool output cuts off the returns after it."""
    tool_inside = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0]).bool()
    prompt_only = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]).bool()
    check_returns(by_position, prompt_only, 0.5)  # one stretch of trained tokens per sequence hides the fault
    check = partial(check_returns, loss_mask=tool_inside, discount=0.5)
    catches(check, kdloss.discounted_returns, by_position)
    catches(check, descended_returns, by_position)


def test_discount_by_absolute_position():
    """Fault: γ^i in place of γ^(i-t), so the end of a long response is not trained at all."""

    def absolute(rewards: Tensor, *, loss_mask: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
        returns = torch.zeros_like(rewards)
        for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
            trained = [t for t in range(start, stop) if loss_mask[t]]
            discounted = [discount**i * rewards[t] for i, t in enumerate(trained)]
            for i, t in enumerate(trained):
                returns[t] = sum(discounted[i:])
        return returns

    everything = torch.ones(TOTAL, dtype=torch.bool)
    check_returns(absolute, everything, 1.0)  # no discount hides the fault
    check = partial(check_returns, loss_mask=everything, discount=0.5)
    catches(check, kdloss.discounted_returns, absolute)
    catches(check, descended_returns, absolute)


@pytest.mark.parametrize("linear", [False, True], ids=["from logits", "from hidden states"])
def test_entropy_gradient_silently_dropped(linear: bool):
    """Fault: the entropy's gradient silently dropped, so a bonus is logged and has no effect."""
    hidden, weight, labels = randn(4, 3), randn(VOCAB, 3, seed=1), torch.tensor([1, -100, 0, 4])
    trained = labels != -100

    def check(logp_and_entropy: Callable[..., tuple[Tensor, Tensor]]):
        head = leaf(weight)
        logp, entropy = logp_and_entropy(hidden, head, labels)
        loss = kdloss.token_mean(-logp - 0.3 * entropy, loss_mask=trained)
        log_p = torch.log_softmax(hidden @ weight.T, -1)
        p = log_p.exp()
        h = -(p * log_p).sum(-1, keepdim=True)
        assert_equal(entropy[trained], h.squeeze(-1)[trained])
        # d logp / dz = onehot - p and d entropy / dz = -p (log p + H)
        onehot = torch.eye(VOCAB, dtype=torch.float64)[labels.clamp(min=0)]
        slope = torch.where(trained[:, None], p - onehot + 0.3 * p * (log_p + h), 0) / 3
        assert_equal(gradient(loss, head), slope.T @ hidden)

    def library(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if linear:
            return kdloss.linear_token_logprobs_and_entropy(hidden, weight, labels)
        return kdloss.token_logprobs_and_entropy(hidden @ weight.T, labels)

    def dropped(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = library(hidden, weight, labels)
        return logp, entropy.detach()

    catches(check, library, dropped)


LARGE = 70_000  # just over 65535, the bound of the second and third axis of a CUDA grid


# All rows in one sequence; one token in each of many sequences; neither axis large by itself.
@pytest.mark.parametrize("shape", [(1, LARGE), (LARGE, 1), (280, 250)], ids=str)
def test_grid_past_65535(shape: tuple[int, int]):
    """Fault: B×L grids past 65535, whose last rows are never computed."""
    labels = torch.randint(3, shape, generator=torch.Generator().manual_seed(0))
    teacher_logp, advantages = -randn(*shape, seed=2).abs(), randn(*shape, seed=3)
    loss_mask = randn(*shape, seed=4) > -1

    def check(logprobs: Callable[..., Tensor]):
        logits = leaf(randn(*shape, 3))
        logp = logprobs(logits, labels)
        q = logits.detach().softmax(-1)
        chosen = q.gather(-1, labels[..., None]).squeeze(-1)
        assert_equal(logp, chosen.log())
        out = kdloss.kdrl_loss(
            logp, None, teacher_logp, advantages, loss_mask=loss_mask, distill_loss_weight=0.3, normalizer=1.0
        )
        weight = torch.where(loss_mask, advantages + 0.3 * (teacher_logp - chosen.log()), 0)
        assert_equal(out.loss, -weight.sum(), atol=1e-9)  # 70,000 terms of order 1
        onehot = torch.eye(3, dtype=torch.float64)[labels]
        assert_equal(gradient(out.loss, logits), -weight[..., None] * (onehot - q))

    def short_grid(logits: Tensor, labels: Tensor) -> Tensor:
        logp = kdloss.token_logprobs(logits, labels)
        computed = torch.arange(logp.numel()).reshape(logp.shape) < 65535
        return torch.where(computed, logp, 0)

    catches(check, kdloss.token_logprobs, short_grid)


def test_more_than_65535_sequences():
    """Fault: B×L grids past 65535, here as more sequences than a grid axis has blocks."""
    lengths = torch.arange(LARGE) % 3  # 0, 1 and 2 tokens
    cu_seqlens = kdloss.cu_seqlens_from_lengths(lengths)
    total = int(lengths.sum())
    position = torch.arange(total, dtype=torch.float64)
    everything = torch.ones(total, dtype=torch.bool)

    def check(sums: Callable[..., Tensor]):
        x = leaf(position)
        got = sums(x, loss_mask=everything, cu_seqlens=cu_seqlens)
        start = cu_seqlens[:-1].double()
        assert_equal(got, torch.where(lengths == 2, 2 * start + 1, start * lengths))
        upstream = torch.arange(LARGE, dtype=torch.float64)
        assert_equal(gradient((got * upstream).sum(), x), torch.repeat_interleave(upstream, lengths))

    def short_grid(x: Tensor, *, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        sums = kdloss.segment_sum(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
        return torch.where(torch.arange(sums.shape[0]) < 65535, sums, 0)

    catches(check, kdloss.segment_sum, short_grid)
    padded = kdloss.unpack(position, cu_seqlens=cu_seqlens, length=2, fill=-1)
    assert padded.shape == (LARGE, 2)
    assert_equal(kdloss.pack(padded, lengths=lengths, total_tokens=total), position)


def test_32_bit_offsets_in_pack():
    """Fault: 32-bit offsets, where row * length passes 2**31 and wraps around to a negative index."""
    rows, length = 2**16, 2**15 + 1
    assert rows * length > 2**31
    # 2 GiB of address space, of which a few pages are touched: only the first and the last row hold tokens
    padded = torch.empty(rows, length, dtype=torch.int8)
    padded[0, :2] = torch.tensor([1, 2])
    padded[-1, :3] = torch.tensor([3, 4, 5])
    lengths = torch.zeros(rows, dtype=torch.int32)
    lengths[0], lengths[-1] = 2, 3

    def check(pack: Callable[..., Tensor]):
        assert pack(padded, lengths=lengths, total_tokens=5).tolist() == [1, 2, 3, 4, 5]

    def narrow_index(padded: Tensor, *, lengths: Tensor, total_tokens: int) -> Tensor:
        cu_seqlens = kdloss.cu_seqlens_from_lengths(lengths)
        ids = kdloss.segment_ids(cu_seqlens, total_tokens=total_tokens).int()
        offset = torch.arange(total_tokens, dtype=torch.int32) - cu_seqlens[:-1][ids]
        index = ids * padded.shape[1] + offset
        # a wrapped index reads other memory on a GPU; on a CPU it would raise
        return padded.flatten()[index.long().clamp(min=0)]

    catches(check, kdloss.pack, narrow_index)


class IndexDtypes(TorchFunctionMode):
    """Records the dtypes of row indices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.index_select, torch.index_select):
            self.seen.add(kwargs.get("index", args[-1]).dtype)
        return func(*args, **kwargs)


def test_32_bit_offsets_in_unpack():
    """Fault: 32-bit offsets, where the start of a sequence plus a column passes 2**31 - 1."""
    # Two sequences fill the range of an int32 cu_seqlens; no storage, because only the dtype of the index matters.
    total = 2**31 - 1
    packed = torch.empty(total, dtype=torch.int8, device="meta")
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    length = 2**30

    def check(unpack: Callable[..., Tensor]):
        with IndexDtypes() as index:
            assert unpack(packed, cu_seqlens=cu_seqlens, length=length).shape == (2, length)
        assert torch.int64 in index.seen
        assert torch.int32 not in index.seen

    def narrow_index(packed: Tensor, *, cu_seqlens: Tensor, length: int) -> Tensor:
        column = torch.arange(length, device=packed.device, dtype=cu_seqlens.dtype)
        index = cu_seqlens[:-1, None] + column
        return packed.index_select(0, index.flatten()).unflatten(0, index.shape)

    # the narrow sum at the start of a last sequence that is shorter than the rows
    start, column = torch.tensor([2**31 - 5], dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    assert (start + column).min() < 0
    catches(check, kdloss.unpack, narrow_index)


def test_int32_lengths_that_sum_past_their_dtype_raise() -> None:
    """Fault: 32-bit offsets, here as cumulative lengths that wrap silently below 0."""
    lengths = torch.tensor([2**30] * 3, dtype=torch.int32)
    assert (lengths.cumsum(0, dtype=torch.int32) < 0).any()  # the faulty variant
    with pytest.raises(ValueError, match=r"lengths must sum to at most 2147483647 as int32, got 3221225472; use int64"):
        kdloss.cu_seqlens_from_lengths(lengths)
    assert kdloss.cu_seqlens_from_lengths(lengths.long())[-1] == 3 * 2**30

    wrapped = torch.tensor([0, 2**30, -(2**31), -(2**30), 0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
        kdloss.segment_ids(wrapped, total_tokens=5)


def test_every_fault_of_the_list_has_a_test_that_an_injected_variant_fails():
    named = {name: f for name, f in globals().items() if name.startswith("test_") and "Fault: " in str(f.__doc__)}
    for fault in FAULTS:
        tests = [f for f in named.values() if f.__doc__.startswith(f"Fault: {fault}")]
        assert any("catches(" in inspect.getsource(f) for f in tests), fault
    assert [name for name, f in named.items() if not f.__doc__[7:].startswith(FAULTS)] == []


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_an_infinite_reward_shows_in_its_group_alone(infinite, scale_by_std):
    rewards = torch.tensor([0.0, 1.0, infinite, 1.0])
    advantages = kdloss.group_relative_advantages(rewards, group_size=2, scale_by_std=scale_by_std)
    assert advantages[:2].isfinite().all()
    assert advantages[2:].isnan().all()
