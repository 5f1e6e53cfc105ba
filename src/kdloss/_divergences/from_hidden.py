"""Divergences between whole next-token distributions, from hidden states and output heads, for trained tokens only.

    logits = softcap(logit_scale * (hidden @ weight.T + bias)),   then as from logits

on either side, each with its own width, dtype, bias, softcap and scale. Logits exist for a few rows at a time, so
memory does not grow with T * V, and tokens that `loss_mask` leaves out cost nothing. Finding them waits for the device
once.

Everything is computed in float32, or float64 where any input is. Half-precision heads are widened slice by slice; the
kernels multiply them as they are, into float32. What bfloat16 rounds on a CPU is in `_softmax/products.py`. The
student's hidden states, weight and bias get gradients in their dtypes; the teacher's get none. A token that is masked
out, or whose incoming gradient is 0, leaves no trace, even if its hidden states hold NaN. `from_logits.py` says what
logits of -inf (from a bias) do.
"""

from __future__ import annotations

from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._softmax.backend import Impl, TorchImpl, torch_form
from kdloss._softmax.head import HEAD_ARGS, Head, prepare_heads

from .from_logits import DIVERGENCE_ARGS
from .hidden_op import linear_divergence, sharded_linear_divergence
from .rows import (
    FORWARD_KL,
    GENERALIZED_JSD,
    REVERSE_KL,
    SKEWED_FORWARD_KL,
    SKEWED_REVERSE_KL,
    TOTAL_VARIATION,
    Form,
)

LINEAR_ARGS = HEAD_ARGS | {
    "weight": """(V, D) the student's output head. Differentiable. If neither it nor `bias` requires grad, the gradient
        is computed in the forward, and the backward is one multiplication. Gradients of weight and bias are summed in
        float32 and rounded once. On a CPU, bfloat16 hidden states and head also have the gradient of their logits
        rounded to bfloat16.""",
    "loss_mask": "(T,) bool, True where a token is trained on.",
    "temperature": """τ > 0, a number or (T,); both sides' logits are divided by it after `bias`, `logit_scale` and
        `softcap`, in that order. It carries no gradient.""",
    "vocab_size": """the true V, where the last rows of either head are padding: they get no mass and no gradient.
        Required where the heads differ in rows.""",
    "shard": """the slice of the vocabulary that both heads are, where each rank holds one (`VocabShard`). Hidden
        states, mask and the incoming gradient are the same on every rank, and the gradient of `hidden` is summed over
        the ranks. The gradient is then always computed in the backward. DTensor heads beside DTensor hidden states need
        no `shard`.""",
    "ValueError": DIVERGENCE_ARGS["ValueError"],
}


@documented(LINEAR_ARGS)
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
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Forward KL from the teacher, from hidden states and output heads, for the trained tokens only.

        KL(p || q) = sum_v p_v (log p_v - log q_v)

    with q and p the softmax of student's and teacher's softcap(logit_scale * (hidden @ weight.T + bias)) / τ.
    The (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {teacher_hidden}
        {teacher_weight}
        {loss_mask}
        {bias}
        {teacher_bias}
        {softcap}
        {teacher_softcap}
        {logit_scale}
        {teacher_logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens. +inf
        where the teacher has mass on what the student excludes.

    Expected gradient:
        ∇KL(p || q) = (q - p) / temperature in the logits, carried through softcap, scale and head.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> teacher_weight = torch.tensor([0.2, 0.5, 0.3]).log()[:, None]
        >>> hidden, loss_mask = torch.ones(2, 1), torch.tensor([True, False])
        >>> kdloss.linear_forward_kl(hidden, weight, hidden, teacher_weight, loss_mask=loss_mask)
        tensor([0.1938, 0.0000])

    Source:
        Hinton et al., arXiv 1503.02531, without the T² factor.
    """
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(FORWARD_KL)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


@documented(LINEAR_ARGS)
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
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Reverse KL to the teacher, from hidden states and output heads, for the trained tokens only.

        KL(q || p) = sum_v q_v (log q_v - log p_v)

    with q and p the softmax of student's and teacher's softcap(logit_scale * (hidden @ weight.T + bias)) / τ.
    The (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {teacher_hidden}
        {teacher_weight}
        {loss_mask}
        {bias}
        {teacher_bias}
        {softcap}
        {teacher_softcap}
        {logit_scale}
        {teacher_logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens. +inf
        where the student has mass on what the teacher excludes.

    Expected gradient:
        ∇KL(q || p) = q (log q/p - KL(q || p)) / temperature in the logits, carried through softcap, scale and head.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> teacher_weight = torch.tensor([0.2, 0.5, 0.3]).log()[:, None]
        >>> hidden, loss_mask = torch.ones(2, 1), torch.tensor([True, False])
        >>> kdloss.linear_reverse_kl(hidden, weight, hidden, teacher_weight, loss_mask=loss_mask)
        tensor([0.2238, 0.0000])

    Source:
        MiniLLM, arXiv 2306.08543, for one token.
    """
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(REVERSE_KL)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


@documented(LINEAR_ARGS)
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
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Generalised Jensen-Shannon divergence, from hidden states and output heads, for the trained tokens only.

        β KL(p || m) + (1-β) KL(q || m),   m = β p + (1-β) q

    with q and p the softmax of student's and teacher's softcap(logit_scale * (hidden @ weight.T + bias)) / τ.
    The (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {teacher_hidden}
        {teacher_weight}
        {loss_mask}
        beta: β, 0 < β < 1. JSD / (β (1-β)) tends to the forward KL as β → 0 and to the reverse KL as β → 1; JSD itself
            goes to 0 at both ends.
        {bias}
        {teacher_bias}
        {softcap}
        {teacher_softcap}
        {logit_scale}
        {teacher_logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens. At
        most the entropy of (β, 1-β): always finite.

    Expected gradient:
        ∇JSD = (1-β) q (log q/m - KL(q || m)) / temperature in the logits, carried through softcap, scale and head.

    Raises:
        {TypeError}
        ValueError: `beta` is 0 or 1 (use the KL that the error names), shapes, devices or vocabularies disagree, an
            option is out of range, or `impl` is "triton" where the kernels cannot run.

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> teacher_weight = torch.tensor([0.2, 0.5, 0.3]).log()[:, None]
        >>> hidden, loss_mask = torch.ones(2, 1), torch.tensor([True, False])
        >>> kdloss.linear_generalized_jsd(hidden, weight, hidden, teacher_weight, loss_mask=loss_mask, beta=0.5)
        tensor([0.0509, 0.0000])

    Source:
        GKD, arXiv 2306.13649, section 3, where p is the teacher.
    """
    _checks.share("beta", beta, linear_forward_kl.__name__, linear_reverse_kl.__name__)
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(GENERALIZED_JSD, beta)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


@documented(LINEAR_ARGS)
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
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Skewed forward KL, from hidden states and output heads, for the trained tokens only.

        KL(p || m),   m = α p + (1-α) q

    with q and p the softmax of student's and teacher's softcap(logit_scale * (hidden @ weight.T + bias)) / τ.
    The (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {teacher_hidden}
        {teacher_weight}
        {loss_mask}
        alpha: α, the teacher's share of the mixture, 0 < α < 1; DistiLLM takes 0.1.
        {bias}
        {teacher_bias}
        {softcap}
        {teacher_softcap}
        {logit_scale}
        {teacher_logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens. At
        most -log α: always finite.

    Expected gradient:
        ∇KL(p || m) = (q sum_u p_u w_u - p w) / temperature in the logits, w = (1-α) q/m, carried through softcap, scale
        and head.

    Raises:
        {TypeError}
        ValueError: `alpha` is 0 (use `linear_forward_kl`) or 1 (the divergence is 0 for any student), shapes, devices
            or vocabularies disagree, an option is out of range, or `impl` is "triton" where the kernels cannot run.

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> teacher_weight = torch.tensor([0.2, 0.5, 0.3]).log()[:, None]
        >>> hidden, loss_mask = torch.ones(2, 1), torch.tensor([True, False])
        >>> kdloss.linear_skewed_forward_kl(hidden, weight, hidden, teacher_weight, loss_mask=loss_mask, alpha=0.1)
        tensor([0.1593, 0.0000])

    Source:
        DistiLLM, arXiv 2402.03898, section 3.1.
    """
    _checks.share("alpha", alpha, linear_forward_kl.__name__, None)
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    form = Form(SKEWED_FORWARD_KL, alpha)
    return _linear(form, student, teacher, loss_mask, temperature, vocab_size, shard, impl)


@documented(LINEAR_ARGS)
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
    impl: Impl = "auto",
) -> Tensor:  # (T,)
    """Skewed reverse KL, from hidden states and output heads, for the trained tokens only.

        KL(q || m),   m = (1-α) p + α q

    with q and p the softmax of student's and teacher's softcap(logit_scale * (hidden @ weight.T + bias)) / τ.
    The (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {teacher_hidden}
        {teacher_weight}
        {loss_mask}
        alpha: α, the student's share of the mixture, 0 < α < 1; DistiLLM takes 0.1.
        {bias}
        {teacher_bias}
        {softcap}
        {teacher_softcap}
        {logit_scale}
        {teacher_logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `loss_mask`, nats, float32 for half-precision inputs; 0 without gradient at untrained tokens. At
        most -log α: always finite.

    Expected gradient:
        ∇KL(q || m) = q (h - sum_u q_u h_u) / temperature in the logits, h = log q/m - α q/m, carried through softcap,
        scale and head.

    Raises:
        {TypeError}
        ValueError: `alpha` is 0 (use `linear_reverse_kl`) or 1 (the divergence is 0 for any student), shapes, devices
            or vocabularies disagree, an option is out of range, or `impl` is "triton" where the kernels cannot run.

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> teacher_weight = torch.tensor([0.2, 0.5, 0.3]).log()[:, None]
        >>> hidden, loss_mask = torch.ones(2, 1), torch.tensor([True, False])
        >>> kdloss.linear_skewed_reverse_kl(hidden, weight, hidden, teacher_weight, loss_mask=loss_mask, alpha=0.1)
        tensor([0.1730, 0.0000])

    Source:
        DistiLLM, arXiv 2402.03898, section 3.1.
    """
    _checks.share("alpha", alpha, linear_reverse_kl.__name__, None)
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    return _linear(Form(SKEWED_REVERSE_KL, alpha), student, teacher, loss_mask, temperature, vocab_size, shard, impl)


@documented(LINEAR_ARGS)
def linear_total_variation(
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
    impl: TorchImpl = "auto",
) -> Tensor:  # (T,)
    """Total variation distance to the teacher, from hidden states and output heads, for the trained tokens only.

        TV(p, q) = 1/2 sum_v |p_v - q_v|

    with q and p the softmax of student's and teacher's softcap(logit_scale * (hidden @ weight.T + bias)) / τ.
    The (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {teacher_hidden}
        {teacher_weight}
        {loss_mask}
        {bias}
        {teacher_bias}
        {softcap}
        {teacher_softcap}
        {logit_scale}
        {teacher_logit_scale}
        {temperature}
        {vocab_size}
        {shard}
        impl: "auto" or "torch", which are the same: there is no kernel, and a GPU runs torch's operations in a scratch
            of a fixed size.

    Returns:
        The shape of `loss_mask`, in 0 .. 1, float32 for half-precision inputs; 0 without gradient at untrained tokens.
        Always finite.

    Expected gradient:
        ∇TV = 1/2 q (s - sum_u q_u s_u) / temperature in the logits, s = sign(q - p) and 0 where q = p, carried through
        softcap, scale and head. It does not shrink as q approaches p.

    Raises:
        {TypeError}
        ValueError: shapes, devices or vocabularies disagree, an option is out of range, or `impl` is "triton".

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([0.5, 0.3, 0.2]).log()[:, None]
        >>> teacher_weight = torch.tensor([0.2, 0.5, 0.3]).log()[:, None]
        >>> hidden, loss_mask = torch.ones(2, 1), torch.tensor([True, False])
        >>> kdloss.linear_total_variation(hidden, weight, hidden, teacher_weight, loss_mask=loss_mask)
        tensor([0.3000, 0.0000])

    Source:
        Wen et al., arXiv 2307.15190, for one token.
    """
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    return _linear(Form(TOTAL_VARIATION), student, teacher, loss_mask, temperature, vocab_size, shard, torch_form(impl))


def _linear(
    form: Form,
    student: Head,
    teacher: Head,
    loss_mask: Tensor,
    temperature: float | Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: Impl,
) -> Tensor:
    _checks.tensors(loss_mask=loss_mask)
    heads = prepare_heads(
        student,
        teacher,
        loss_mask=loss_mask,
        temperature=temperature,
        vocab_size=vocab_size,
        shard=shard,
        impl=impl,
    )
    _checks.row_temperatures(heads.softmax.row_temperature, loss_mask)
    compute = linear_divergence if heads.softmax.shard is None else sharded_linear_divergence
    return compute(heads, _checks.savable(loss_mask).flatten(), form).reshape(heads.shape)
