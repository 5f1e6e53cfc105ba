"""Divergences between whole next-token distributions, from hidden states and output heads, for trained tokens only.

    logits = softcap(logit_scale * (hidden @ weight.T + bias)),   then as from logits

on either side, each with its own width, dtype, bias, softcap and scale. Logits exist for a few rows at a time, so
memory does not grow with T * V, and tokens that `loss_mask` leaves out cost nothing. Finding them waits for the device
once.

Everything is computed in float32, or float64 where any input is; half-precision heads are widened slice by slice, or
multiplied as they are into float32 by the kernels. The student's hidden states, weight and bias get gradients, in their
dtypes; the teacher's get none. Logits that are masked out, or whose incoming gradient is 0, leave no trace, whatever
their hidden states hold. What -inf logits (from a bias) do is in `_divergences`.
"""

from __future__ import annotations

from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.head import Head, prepare_head

from .from_logits import check_share
from .hidden_op import linear_divergence
from .rows import FORWARD_KL, GENERALIZED_JSD, REVERSE_KL, SKEWED_FORWARD_KL, SKEWED_REVERSE_KL, Form
from .sharded_hidden import sharded_linear_divergence


def linear_forward_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (T, D')
    teacher_weight: Tensor,  # (V, D')
    *,
    loss_mask: Tensor,  # (T,) bool
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """`forward_kl`, KL(p || q), from hidden states, for the trained tokens only.

    Args:
        hidden: (T, D) of the student at prediction positions, any leading shape in place of T. Differentiable.
        weight: (V, D) the student's head. Differentiable. Where neither it nor `bias` requires grad, the gradient is
            taken in the forward, and the backward is one multiplication.
        teacher_hidden: (T, D') of the teacher, at the same positions, of any width. Detached.
        teacher_weight: (V, D') the teacher's head, of any dtype. Detached.
        loss_mask: (T,) bool, the tokens that are trained on.
        bias: (V,) of the student. Differentiable.
        teacher_bias: (V,) of the teacher. Detached.
        softcap: c > 0 of c * tanh(logits / c) for the student. None: none.
        teacher_softcap: the same for the teacher.
        logit_scale: finite factor of the student's logits, before the softcap.
        teacher_logit_scale: the same for the teacher.
        temperature: > 0, a number or (T,), for both sides, after all of these.
        vocab_size: the true V, where the last rows of either head are padding; needed where the heads differ in rows.
        shard: which slice of the vocabulary both heads are, where ranks hold one each (`VocabShard`): what else is the
            same on every rank, as in `linear_token_logprobs`. The gradient is then taken in the backward, always.
        impl: "auto" | "torch" | "triton": the kernels where hidden is on a GPU; never; or else an error.

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens.

    Expected gradient:
        That of `forward_kl` in the logits, (q - p) / temperature, carried through softcap, scale and head; gradients of
        weight and bias are summed in float32 and rounded once.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, devices or vocabularies disagree, an option is out of range, or `impl` is "triton" where the
            kernels cannot run.

    Source: as `forward_kl`.
    """
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(FORWARD_KL)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


def linear_reverse_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (T, D')
    teacher_weight: Tensor,  # (V, D')
    *,
    loss_mask: Tensor,  # (T,) bool
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """`reverse_kl`, KL(q || p), from hidden states, for the trained tokens only.

    Args, results and errors as in `linear_forward_kl`; value and expected gradient in the logits as in `reverse_kl`.
    """
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(REVERSE_KL)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


def linear_generalized_jsd(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (T, D')
    teacher_weight: Tensor,  # (V, D')
    *,
    loss_mask: Tensor,  # (T,) bool
    beta: float,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """`generalized_jsd`, β KL(p || m) + (1-β) KL(q || m), from hidden states, for the trained tokens only.

    Args, results and errors as in `linear_forward_kl`; `beta`, value and expected gradient in the logits as in
    `generalized_jsd`.
    """
    check_share("beta", beta, linear_forward_kl.__name__, linear_reverse_kl.__name__)
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(GENERALIZED_JSD, beta)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


def linear_skewed_forward_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (T, D')
    teacher_weight: Tensor,  # (V, D')
    *,
    loss_mask: Tensor,  # (T,) bool
    alpha: float,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """`skewed_forward_kl`, KL(p || α p + (1-α) q), from hidden states, for the trained tokens only.

    Args, results and errors as in `linear_forward_kl`; `alpha`, value and expected gradient in the logits as in
    `skewed_forward_kl`.
    """
    check_share("alpha", alpha, linear_forward_kl.__name__, None)
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(SKEWED_FORWARD_KL, alpha)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


def linear_skewed_reverse_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (T, D')
    teacher_weight: Tensor,  # (V, D')
    *,
    loss_mask: Tensor,  # (T,) bool
    alpha: float,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:  # (T,)
    """`skewed_reverse_kl`, KL(q || (1-α) p + α q), from hidden states, for the trained tokens only.

    Args, results and errors as in `linear_forward_kl`; `alpha`, value and expected gradient in the logits as in
    `skewed_reverse_kl`.
    """
    check_share("alpha", alpha, linear_reverse_kl.__name__, None)
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    return _linear(
        Form(SKEWED_REVERSE_KL, 1 - alpha), student, teacher, loss_mask, temperature, vocab_size, shard, impl
    )


def _linear(
    form: Form,
    student: Head,
    teacher: Head,
    loss_mask: Tensor,
    temperature: float | Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: str,
) -> Tensor:
    _checks.tensors(loss_mask=loss_mask)
    heads = prepare_head(
        student,
        teacher,
        loss_mask=loss_mask,
        temperature=temperature,
        vocab_size=vocab_size,
        shard=shard,
        impl=impl,
    )
    compute = linear_divergence if heads.softmax.shard is None else sharded_linear_divergence
    return compute(heads, loss_mask.flatten(), form).reshape(heads.shape)
