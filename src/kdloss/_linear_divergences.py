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

from . import _checks
from ._distributed import VocabShard, head_shard
from ._divergence_rows import FORWARD_KL, GENERALIZED_JSD, REVERSE_KL, SKEWED_FORWARD_KL, SKEWED_REVERSE_KL
from ._divergences import check_share, common_vocab_size
from ._impl import takes_triton
from ._linear_divergence_ops import linear_divergence
from ._linear_divergence_passes import Head
from ._logprobs import check_vocab_size
from ._sharded_linear_divergence import sharded_linear_divergence


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
    return _linear(FORWARD_KL, 0.5, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


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
    return _linear(REVERSE_KL, 0.5, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


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
    return _linear(GENERALIZED_JSD, beta, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


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
    return _linear(SKEWED_FORWARD_KL, alpha, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


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
    return _linear(SKEWED_REVERSE_KL, 1 - alpha, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


def _linear(
    kind: str,
    omega: float,
    student: Head,
    teacher: Head,
    loss_mask: Tensor,
    temperature: float | Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: str,
) -> Tensor:
    hidden, weight, bias, shard = head_shard(*student[:3], shard)
    student = student._replace(hidden=hidden, weight=weight, bias=bias)
    split = None if shard is None else shard.with_rows_gathered(False)
    hidden, weight, bias, _ = head_shard(*teacher[:3], split, "teacher_")
    teacher = teacher._replace(hidden=hidden, weight=weight, bias=bias)
    sides = (("", student), ("teacher_", teacher))
    for side, head in sides:
        _checks.head(*head[:3], logit_scale=head.logit_scale, side=side)
        _checks.positive(**{f"{side}softcap": head.softcap})
    _checks.tensors(loss_mask=loss_mask)
    _checks.boolean(loss_mask=loss_mask)
    rows = student.hidden.shape[:-1]
    if loss_mask.shape != rows:
        raise ValueError(f"loss_mask must match the rows of hidden {tuple(rows)}, got {tuple(loss_mask.shape)}")
    if teacher.hidden.shape[:-1] != rows:
        came = tuple(teacher.hidden.shape)
        raise ValueError(f"teacher_hidden must match the rows of hidden {(*rows, 'D')}, got {came}")
    _checks.same_device(
        "hidden",
        student.hidden,
        weight=student.weight,
        bias=student.bias,
        teacher_hidden=teacher.hidden,
        teacher_weight=teacher.weight,
        teacher_bias=teacher.bias,
        loss_mask=loss_mask,
    )
    if shard is None:
        vocab_size = common_vocab_size("teacher_weight", student.weight.shape[0], teacher.weight.shape[0], vocab_size)
    else:
        vocab_size = shard.local_size(check_vocab_size(vocab_size, shard.vocab_size))
    tau = _checks.row_temperature("hidden", student.hidden, temperature)
    inputs = {f"{side}{name}": getattr(head, name) for side, head in sides for name in ("hidden", "weight", "bias")}
    kernels = takes_triton(impl, **inputs)
    student = student._replace(hidden=student.hidden.flatten(0, -2))
    teacher = teacher._replace(hidden=teacher.hidden.flatten(0, -2))
    mask, tau = loss_mask.flatten(), tau.flatten() if isinstance(tau, Tensor) else tau
    if shard is None:
        value = linear_divergence(
            student,
            teacher,
            loss_mask=mask,
            kind=kind,
            omega=omega,
            temperature=tau,
            vocab_size=vocab_size,
            kernels=kernels,
        )
    else:
        value = sharded_linear_divergence(
            student,
            teacher,
            mask,
            kind=kind,
            omega=omega,
            temperature=tau,
            vocab_size=vocab_size,
            shard=shard,
            kernels=kernels,
        )
    return value.reshape(rows)
