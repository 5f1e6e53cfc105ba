"""Reverse KL that is exact on a teacher's top K and takes one sample, or several, for the rest of the vocabulary.

    h_v = log q_v - log p_v,   S = the ids of a row,   y = the sampled token,   ρ = q_y / μ_y
    value = sum_S q_v h_v + 1[y not in S] min(ρ, max_ratio) h_y

The student's log-probs of the ids and of the sampled tokens are read from the logits in one pass. What follows needs
K + M values per row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._logprobs.from_hidden import check_head_labels, logprobs_from_hidden
from kdloss._logprobs.from_logits import logprobs_from_logits
from kdloss._softmax.backend import Impl
from kdloss._softmax.head import HEAD_ARGS, Head, prepare_heads
from kdloss._softmax.operator import operator
from kdloss._softmax.vocabulary import IGNORE_INDEX, check_labels, prepare_logits

from .topk import TOPK_ARGS, Support, check_support

SAMPLE_ARGS = {
    "labels": """(...,) int64, the sampled token of each row, or (..., M) for M tokens that were sampled independently
        from the same distribution, whose terms are averaged. -100 is ignored.""",
    "teacher_logp": """the shape of `labels`: log-probs of the sampled tokens under the teacher, at the sampling
        temperature, nats. Detached. Not read where the token is in S.""",
    "teacher_topk_logp": TOPK_ARGS["teacher_topk_logp"],
    "teacher_topk_ids": """(..., K) int32 or int64, the set S, distinct within a row, in any order; -1 is padding. S
        must not depend on the sampled token: where a server adds that token to its top K, drop the added entry, and no
        other.""",
    "old_logp": """the shape of `labels`: log-probs of the sampled tokens under the policy μ that sampled them, nats.
        Detached. None: on-policy, so that every ratio is 1.""",
    "max_ratio": "bound of the ratio of the sampled term, > 0. None: no bound.",
    "temperature": TOPK_ARGS["temperature"],
    "ValueError": """shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
        run, or (on the CPU) a label is outside the vocabulary, or an id is twice in a row or outside the vocabulary.
        Elsewhere, and under `torch.compile`, such a row is NaN.""",
}


class _Samples(NamedTuple):
    """The tokens that were sampled, and what teacher and behaviour policy say of them: (..., M) each."""

    labels: Tensor
    teacher_logp: Tensor
    old_logp: Tensor | None
    max_ratio: float | None


@documented(TOPK_ARGS, SAMPLE_ARGS)
def topk_sampled_reverse_kl(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...,) or (..., M)
    teacher_logp: Tensor,  # like labels
    teacher_topk_logp: Tensor,  # (..., K)
    teacher_topk_ids: Tensor,  # (..., K) int
    *,
    old_logp: Tensor | None = None,  # like labels
    max_ratio: float | None = None,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Reverse KL to the teacher, exact on its top K and sampled elsewhere: unbiased, and as a rule less noisy.

        sum_S q_v h_v + 1[y not in S] min(rho, max_ratio) h_y,   h = log q - log p,   rho = q_y / mu_y

    What is descended is sum_S sg(q_v h_v) log q_v + 1[y not in S] sg(min(rho, max_ratio) h_y) log q_y: each term has
    the value above, and the gradient of its own log q.

    Args:
        {logits}
        {labels}
        {teacher_logp}
        {teacher_topk_logp}
        {teacher_topk_ids}
        {old_logp}
        {max_ratio}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision inputs; its expectation over y is KL(q || p). 0 without gradient where
        every label is ignored. A row of padding only has an empty S: its value is that of the samples. +inf where the
        student has mass on an id that the teacher excludes, or samples a token outside S that it excludes.

    Expected gradient:
        grad KL(q || p), for any K and any policy mu that is positive wherever q is outside S. (A top-p or top-k sampler
        is not; its truncated tokens are left out.) Biased by design where `max_ratio` is active. Biased where S depends
        on y: the term of a token that is added to S only when it is sampled is multiplied by mu, and that of a token of
        S that is dropped when it is sampled by 2 - mu. Not finite where the value is infinite.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> q, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
        >>> kept = p[1:2].log().expand(3, 1), torch.ones(3, 1, dtype=torch.int64)  # the teacher's most probable token
        >>> value = kdloss.topk_sampled_reverse_kl(q.log().expand(3, 3), torch.arange(3), p.log(), *kept)
        >>> round((q * value).sum().item(), 4)  # over the tokens that q may sample: KL(q || p)
        0.2238

    Source:
        A Rao-Blackwellised form of the surrogate of KDRL (arXiv 2506.02208, J_RKL).
    """
    logits, _, softmax = prepare_logits(logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl)
    rows = logits.shape[:-1]
    check_labels(labels, rows, softmax.vocab_size)
    _checks.same_device("logits", logits, labels=labels)
    samples = _check_samples(labels, teacher_logp, old_logp, max_ratio, rows)
    support = check_support("logits", logits, rows, teacher_topk_logp, teacher_topk_ids, softmax.vocab_size)
    columns = _columns(samples.labels, support)
    logp, _ = logprobs_from_logits(logits, columns, None, softmax, with_entropy=False)
    return _exact_and_sampled(logp, samples, support)


@documented(HEAD_ARGS, SAMPLE_ARGS)
def linear_topk_sampled_reverse_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,) or (T, M)
    teacher_logp: Tensor,  # like labels
    teacher_topk_logp: Tensor,  # (T, K)
    teacher_topk_ids: Tensor,  # (T, K) int
    *,
    loss_mask: Tensor | None = None,  # (T,) bool
    old_logp: Tensor | None = None,  # like labels
    max_ratio: float | None = None,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    max_trained_tokens: int | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Reverse KL from hidden states, exact on the teacher's top K and sampled elsewhere, for the trained tokens only.

        sum_S q_v h_v + 1[y not in S] min(rho, max_ratio) h_y,   h = log q - log p,   rho = q_y / mu_y
        q = softmax(z),   z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature

    Equal to `topk_sampled_reverse_kl` of these logits, but the (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {labels}
        {teacher_logp}
        {teacher_topk_logp}
        {teacher_topk_ids}
        {loss_mask}
        {old_logp}
        {max_ratio}
        {bias}
        {softcap}
        {logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {max_trained_tokens}
        {impl}

    Returns:
        (T,) nats, float32 for half-precision inputs; its expectation over y is KL(q || p). 0 without gradient at
        untrained tokens, even if their hidden states hold NaN. A row of padding only has an empty S: its value is that
        of the samples. +inf where the student has mass on an id that the teacher excludes, or samples a token outside S
        that it excludes.

    Expected gradient:
        grad KL(q || p), carried on to `hidden`, `weight` and `bias`, for any K and any policy mu that is positive
        wherever q is outside S. (A top-p or top-k sampler is not; its truncated tokens are left out.) Biased by design
        where `max_ratio` is active. Biased where S depends on y. Not finite where the value is infinite.

    Raises:
        {TypeError}
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run, or (on the CPU) a label is outside the vocabulary, an id is twice in a row or outside the vocabulary,
            `loss_mask` is True where every label is -100, or there are more trained tokens than `max_trained_tokens`.

    Example:
        >>> import torch, kdloss
        >>> q, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
        >>> hidden, weight = torch.ones(3, 1), q.log()[:, None]
        >>> kept = p[1:2].log().expand(3, 1), torch.ones(3, 1, dtype=torch.int64)  # the teacher's most probable token
        >>> value = kdloss.linear_topk_sampled_reverse_kl(hidden, weight, torch.arange(3), p.log(), *kept)
        >>> round((q * value).sum().item(), 4)  # over the tokens that q may sample: KL(q || p)
        0.2238

    Source:
        A Rao-Blackwellised form of the surrogate of KDRL (arXiv 2506.02208, J_RKL).
    """
    heads = prepare_heads(
        Head(hidden, weight, bias, softcap, logit_scale),
        loss_mask=loss_mask,
        temperature=temperature,
        vocab_size=vocab_size,
        shard=shard,
        impl=impl,
    )
    check_head_labels(heads, labels, loss_mask)
    samples = _check_samples(labels, teacher_logp, old_logp, max_ratio, heads.shape)
    if loss_mask is not None:
        trained = samples.labels.masked_fill(~loss_mask.unsqueeze(-1), IGNORE_INDEX)
        samples = _Samples(trained, samples.teacher_logp, samples.old_logp, samples.max_ratio)
    size = heads.softmax.vocab_size
    support = check_support("hidden", heads.student.hidden, heads.shape, teacher_topk_logp, teacher_topk_ids, size)
    columns = _columns(samples.labels, support)
    logp, _ = logprobs_from_hidden(heads, columns, loss_mask=None, max_trained_tokens=max_trained_tokens)
    return _exact_and_sampled(logp, samples, support)


def _check_samples(
    labels: Tensor, teacher_logp: Tensor, old_logp: Tensor | None, max_ratio: float | None, rows: torch.Size
) -> _Samples:
    """Checked arguments of the samples, as (..., M)."""
    _checks.tensors(teacher_logp=teacher_logp)
    _checks.floating(teacher_logp=teacher_logp, old_logp=old_logp)
    _checks.same_shape("labels", labels, teacher_logp=teacher_logp, old_logp=old_logp)
    _checks.positive_or_none(max_ratio=max_ratio)
    teacher_logp = teacher_logp.detach()
    old_logp = None if old_logp is None else old_logp.detach()
    if labels.shape == rows:
        labels, teacher_logp = labels.unsqueeze(-1), teacher_logp.unsqueeze(-1)
        old_logp = None if old_logp is None else old_logp.unsqueeze(-1)
    return _Samples(labels, teacher_logp, old_logp, max_ratio)


def _columns(labels: Tensor, support: Support) -> Tensor:
    """(..., K + M) labels whose log-probs are read: the ids and the samples, none in a row without a sample."""
    sampled = (labels != IGNORE_INDEX).any(-1, keepdim=True)
    ids = torch.where(support.valid() & sampled, support.ids, IGNORE_INDEX)
    return torch.cat([ids, labels], -1)


def _exact_and_sampled(logp: Tensor, samples: _Samples, support: Support) -> Tensor:
    """The value of each row, from the student's log-probs (..., K + M); it is differentiable in these."""
    labels, teacher_logp, old_logp, max_ratio = samples
    dtype = _checks.promoted_dtype(logp, support.logp, teacher_logp, old_logp)
    kept, drawn = logp.to(dtype).split([support.ids.shape[-1], labels.shape[-1]], -1)
    sampled = labels != IGNORE_INDEX
    # log-probs of ids that are not read are 0, and so would be tokens without mass: their term is 0 without gradient
    valid = support.valid() & sampled.any(-1, keepdim=True) & (kept.detach() != -math.inf)
    q = torch.where(valid, kept.detach(), -math.inf).exp()
    exact: Tensor = _descended(torch.where(valid, kept, 0), q * _cost(kept.detach(), support.logp.to(dtype), valid))

    outside = ~(labels.unsqueeze(-1) == support.ids.unsqueeze(-2)).any(-1)
    counted = sampled & outside & (drawn.detach() != -math.inf)
    cost = _cost(drawn.detach(), teacher_logp.to(dtype), counted)
    if old_logp is not None:
        ratio = _cost(drawn.detach(), old_logp.to(dtype), counted).exp()
        cost = torch.where(cost == 0, 0, (ratio if max_ratio is None else ratio.clamp(max=max_ratio)) * cost)
    elif max_ratio is not None:
        cost = min(1.0, max_ratio) * cost
    tail: Tensor = _descended(torch.where(counted, drawn, 0), cost) / sampled.sum(-1).clamp(min=1)
    value = exact + tail
    if support.broken is not None:
        value = value.masked_fill(support.broken & sampled.any(-1), math.nan)
    return value


def _cost(logp: Tensor, other: Tensor, where: Tensor) -> Tensor:
    """logp - other, 0 where it is not read."""
    return torch.where(where, logp - torch.where(where, other, 0), 0)


@operator("descended")
def _descended(logp: Tensor, cost: Tensor) -> Tensor:
    """(...,) the sum of `cost` over the last axis, with the gradient of cost * logp; 0 in a row without upstream."""
    return cost.sum(-1)


@_descended.register_fake
def _(logp: Tensor, cost: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[:-1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    (cost,) = ctx.saved_tensors
    upstream = upstream.unsqueeze(-1)
    return (torch.where((upstream == 0) | (cost == 0), 0, upstream * cost),)


_descended.register_autograd(_backward, _save)
