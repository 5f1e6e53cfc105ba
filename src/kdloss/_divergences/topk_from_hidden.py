"""Divergences from a teacher's K log-probs per token, from hidden states and the output head, for trained tokens only.

`topk.py` of logits that never exist at once, unless they are few: those are kept for the backward.
"""

from __future__ import annotations

from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._softmax.backend import Impl
from kdloss._softmax.head import HEAD_ARGS, Head, prepare_heads

from .rows import FORWARD_KL, GENERALIZED_JSD, REVERSE_KL, Form
from .topk import TOPK_ARGS, JSDTail, Tail, check_support, check_tail, divergence_of_support
from .topk_hidden_op import linear_kept_and_rest

LINEAR_TOPK_ARGS = {
    "teacher_topk_logp": TOPK_ARGS["teacher_topk_logp"].replace("(..., K)", "(T, K)"),
    "teacher_topk_ids": TOPK_ARGS["teacher_topk_ids"].replace("(..., K)", "(T, K)"),
    "loss_mask": "(T,) bool, True where a token is trained on.",
    "temperature": """τ > 0, a number or (T,), for the student only: the teacher's log-probs already have it. It carries
        no gradient.""",
    "ValueError": TOPK_ARGS["ValueError"],
}


@documented(HEAD_ARGS, LINEAR_TOPK_ARGS)
def linear_topk_forward_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_topk_logp: Tensor,  # (T, K)
    teacher_topk_ids: Tensor,  # (T, K) int
    *,
    loss_mask: Tensor,  # (T,) bool
    tail: Tail,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Forward KL from a teacher's K log-probs, from hidden states, for the trained tokens only.

        sum_S p (log p - log q), and a tail
        q = softmax(z),   z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature

    Equal to `topk_forward_kl` of these logits, but the (T, V) logits never exist at once. The mass outside S is
    summed over its own columns, so a small one keeps its digits.

    Args:
        {hidden}
        {weight}
        {teacher_topk_logp}
        {teacher_topk_ids}
        {loss_mask}
        tail: "bucket" adds (1-P) log (1-P)/(1-Q), "renormalize" divides by P and Q first, "truncate" does neither,
            "generalized" adds Q - P.
        {bias}
        {softcap}
        {logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens and in
        a row of padding only. All but "truncate": >= 0, +inf where the student excludes what the teacher does not.
        "truncate": may be negative.

    Expected gradient:
        That of `topk_forward_kl` in the logits, carried on to `hidden`, `weight` and `bias`. In the logits, times
        1 / temperature: "bucket": q - p on S, q - (1-P) q/(1-Q) outside. "renormalize": q/Q - p/P on S, 0 outside.
        "truncate": P q - p on S, P q outside. "generalized": (1 + P - Q) q - p on S, (P - Q) q outside.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> hidden, weight = torch.ones(2, 1), torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> logp, ids = torch.full((2, 1), 0.5).log(), torch.ones(2, 1, dtype=torch.int64)  # the teacher's top token
        >>> loss_mask = torch.tensor([True, False])
        >>> kdloss.linear_topk_forward_kl(hidden, weight, logp, ids, loss_mask=loss_mask, tail="bucket")
        tensor([0.0872, 0.0000])

    Source:
        The bucket is the KL's coarse-graining (log-sum inequality: Cover and Thomas, theorem 2.7.1).
    """
    head, teacher = Head(hidden, weight, bias, softcap, logit_scale), (teacher_topk_logp, teacher_topk_ids)
    return _linear_topk(Form(FORWARD_KL), tail, head, teacher, loss_mask, temperature, vocab_size, shard, impl)


@documented(HEAD_ARGS, LINEAR_TOPK_ARGS)
def linear_topk_reverse_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_topk_logp: Tensor,  # (T, K)
    teacher_topk_ids: Tensor,  # (T, K) int
    *,
    loss_mask: Tensor,  # (T,) bool
    tail: Tail,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Reverse KL to a teacher's K log-probs, from hidden states, for the trained tokens only.

        sum_S q (log q - log p), and a tail
        q = softmax(z),   z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature

    Equal to `topk_reverse_kl` of these logits, but the (T, V) logits never exist at once. The mass outside S is
    summed over its own columns, so a small one keeps its digits.

    Args:
        {hidden}
        {weight}
        {teacher_topk_logp}
        {teacher_topk_ids}
        {loss_mask}
        tail: "bucket" adds (1-Q) log (1-Q)/(1-P), "renormalize" divides by Q and P first, "truncate" does neither,
            "generalized" adds P - Q.
        {bias}
        {softcap}
        {logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens and in
        a row of padding only. All but "truncate": >= 0. +inf where the teacher excludes an id that the student does
        not. "truncate": may be negative.

    Expected gradient:
        That of `topk_reverse_kl` in the logits, carried on to `hidden`, `weight` and `bias`. In the logits, times
        1 / temperature, with h = log q/p on S: "bucket": q (h - C), with h of the bucket outside S, and C the mean of h
        under q. "renormalize": the same of q/Q and p/P, 0 outside. "truncate": q (h + 1 - C) on S, -q C outside, C =
        sum_S q (h + 1). "generalized": q (h - C) on S, -q C outside, C = sum_S q h.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> hidden, weight = torch.ones(2, 1), torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> logp, ids = torch.full((2, 1), 0.5).log(), torch.ones(2, 1, dtype=torch.int64)  # the teacher's top token
        >>> loss_mask = torch.tensor([True, False])
        >>> kdloss.linear_topk_reverse_kl(hidden, weight, logp, ids, loss_mask=loss_mask, tail="bucket")
        tensor([0.0823, 0.0000])

    Source:
        The bucket is the reverse KL's coarse-graining (log-sum inequality: Cover and Thomas, theorem 2.7.1).
    """
    head, teacher = Head(hidden, weight, bias, softcap, logit_scale), (teacher_topk_logp, teacher_topk_ids)
    return _linear_topk(Form(REVERSE_KL), tail, head, teacher, loss_mask, temperature, vocab_size, shard, impl)


@documented(HEAD_ARGS, LINEAR_TOPK_ARGS)
def linear_topk_generalized_jsd(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_topk_logp: Tensor,  # (T, K)
    teacher_topk_ids: Tensor,  # (T, K) int
    *,
    loss_mask: Tensor,  # (T,) bool
    tail: JSDTail,
    beta: float,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Generalised JSD from a teacher's K log-probs, from hidden states, for the trained tokens only.

        sum_S β p log p/m + (1-β) q log q/m, and a tail;   m = β p + (1-β) q
        q = softmax(z),   z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature

    Equal to `topk_generalized_jsd` of these logits, but the (T, V) logits never exist at once. The mass outside S is
    summed over its own columns, so a small one keeps its digits.

    Args:
        {hidden}
        {weight}
        {teacher_topk_logp}
        {teacher_topk_ids}
        {loss_mask}
        tail: "bucket" adds the same two terms of the masses outside S, 1-P and 1-Q; "renormalize" divides by P and Q
            first; "truncate" does neither. "generalized" is refused: its masses cancel, so it would be "truncate".
        beta: β, 0 < β < 1. JSD / (β (1-β)) tends to the forward KL as β → 0 and to the reverse KL as β → 1.
        {bias}
        {softcap}
        {logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens and in
        a row of padding only. Finite. "truncate": may be negative.

    Expected gradient:
        That of `topk_generalized_jsd` in the logits, carried on to `hidden`, `weight` and `bias`. In the logits, times
        1 / temperature, with a = log q/m on S: "bucket": (1-β) q (a - C), with a of the bucket outside S, and C the
        mean of a under q. "renormalize": the same of q/Q and p/P, 0 outside. "truncate": (1-β) q (a - C) on S, -(1-β) q
        C outside, C = sum_S q a.

    Raises:
        {TypeError}
        ValueError: `beta` is 0 or 1 (use the KL that the error names), shapes or devices disagree, an option is out of
            range (`tail="generalized"` is for the two KLs), `impl` is "triton" where the kernels cannot run, or (on the
            CPU) an id is twice in a row or outside the vocabulary. Elsewhere, and under `torch.compile`, such a row is
            NaN.

    Example:
        >>> import torch, kdloss
        >>> hidden, weight = torch.ones(2, 1), torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> logp, ids = torch.full((2, 1), 0.5).log(), torch.ones(2, 1, dtype=torch.int64)  # the teacher's top token
        >>> mask = torch.tensor([True, False])
        >>> kdloss.linear_topk_generalized_jsd(hidden, weight, logp, ids, loss_mask=mask, tail="bucket", beta=0.5)
        tensor([0.0210, 0.0000])

    Source:
        GKD, arXiv 2306.13649, section 3, where p is the teacher; its coarse-graining (Cover and Thomas, theorem 2.7.1).
    """
    _checks.share("beta", beta, linear_topk_forward_kl.__name__, linear_topk_reverse_kl.__name__)
    head, teacher = Head(hidden, weight, bias, softcap, logit_scale), (teacher_topk_logp, teacher_topk_ids)
    return _linear_topk(
        Form(GENERALIZED_JSD, beta), tail, head, teacher, loss_mask, temperature, vocab_size, shard, impl
    )


def _linear_topk(
    form: Form,
    tail: Tail,
    head: Head,
    teacher: tuple[Tensor, Tensor],  # log-probs and ids, (T, K) each
    loss_mask: Tensor,
    temperature: float | Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: Impl,
) -> Tensor:  # (T,)
    """Any divergence with any tail; the public functions differ only in `form`."""
    check_tail(tail, form)
    _checks.tensors(loss_mask=loss_mask)
    heads = prepare_heads(
        head,
        loss_mask=loss_mask,
        temperature=temperature,
        vocab_size=vocab_size,
        shard=shard,
        impl=impl,
    )
    softmax, student = heads.softmax, heads.student
    support = check_support("hidden", student.hidden, heads.shape, *teacher, softmax.vocab_size).only(loss_mask)
    _checks.row_temperatures(softmax.row_temperature, support.counted())

    def columns(ids: Tensor, *, with_rest: bool) -> tuple[Tensor, Tensor]:
        trained = support.counted().reshape(-1)
        kept, rest = linear_kept_and_rest(heads, ids.reshape(-1, ids.shape[-1]), trained, with_rest=with_rest)
        return kept.reshape(ids.shape), rest.reshape(heads.shape)

    dtype = _checks.promoted_dtype(*student.tensors(), teacher[0])
    return divergence_of_support(form, tail, support, columns, softmax, dtype)
