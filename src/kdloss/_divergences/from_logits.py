"""Divergences between whole next-token distributions, from the logits of student and teacher.

    q = softmax(logits / τ),   p = softmax(teacher_logits / τ)

Each is the exact expectation that a sampled estimator only averages to: it has no noise, and needs V logits per token
from a teacher. Only the student's logits get a gradient; `teacher_logits` that require grad get none.

A logit of -inf is a mass of 0 and legal on either side: 0 log 0 is 0, and a divergence that divides a mass by 0 is
+inf, not NaN. NaN and +inf make their own row NaN and no other. A row whose incoming gradient is 0 gets exactly 0, even
if it holds NaN: `token_mean` and `where` keep untrained rows out.

Half-precision logits are widened before anything else. Rows go through a scratch of a few MB, so peak extra memory is
the gradient; the kernels that a GPU runs need no scratch. There is no T² factor: multiply losses of another temperature
by it yourself if you want Hinton's.
"""

from __future__ import annotations

from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._softmax.backend import Impl, TorchImpl, torch_form
from kdloss._softmax.vocabulary import LOGITS_ARGS, prepare_logits

from .logits_op import divergence
from .rows import (
    FORWARD_KL,
    GENERALIZED_JSD,
    REVERSE_KL,
    SKEWED_FORWARD_KL,
    SKEWED_REVERSE_KL,
    TOTAL_VARIATION,
    Form,
)

DIVERGENCE_ARGS = LOGITS_ARGS | {
    "teacher_logits": "(..., V) with the leading shape and the vocabulary of `logits`. Detached.",
    "temperature": "τ > 0, a number or one value per row, for both sides. It carries no gradient.",
    "vocab_size": """the true V, where the last columns of either side are padding: they get no mass and no gradient.
        Required where the sides differ in width.""",
    "shard": """the slice of the vocabulary that these logits and the teacher's are, where each rank holds one
        (`VocabShard`). Logits that are DTensors placed `Shard(-1)` need no `shard`.""",
    "ValueError": """shapes, devices or vocabularies disagree, an option is out of range, or `impl` is "triton" where
        the kernels cannot run.""",
}


@documented(DIVERGENCE_ARGS)
def forward_kl(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Forward KL from the teacher: KL(p || q) = sum_v p_v (log p_v - log q_v). Mass-covering.

    Args:
        {logits}
        {teacher_logits}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision logits. +inf where the teacher has mass on what the student excludes.

    Expected gradient:
        ∇KL(p || q) = (q - p) / temperature, exact and without noise, in the dtype of `logits`. It stays that, and
        finite, where the value is +inf.

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
        >>> teacher_logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        >>> (gradient,) = torch.autograd.grad(kdloss.forward_kl(logits, teacher_logits).sum(), logits)
        >>> gradient  # q - p
        tensor([[ 0.3000, -0.2000, -0.1000]])

    Source:
        Hinton et al., arXiv 1503.02531, without the T² factor.
    """
    return _of_logits(Form(FORWARD_KL), logits, teacher_logits, temperature, vocab_size, shard, impl)


@documented(DIVERGENCE_ARGS)
def reverse_kl(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Reverse KL to the teacher: KL(q || p) = sum_v q_v (log q_v - log p_v). Mode-seeking.

    Args:
        {logits}
        {teacher_logits}
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision logits. +inf where the student has mass on what the teacher excludes.

    Expected gradient:
        ∇KL(q || p) = q (log q/p - KL(q || p)) / temperature: what `distillation_loss` has in expectation over sampled
        tokens, without variance. Not finite in a row whose value is +inf: exclude the same tokens on both sides, or
        take a form that is bounded there (`generalized_jsd`, `skewed_reverse_kl`).

    Raises:
        {TypeError}
        {ValueError}

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> teacher_logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        >>> kdloss.reverse_kl(logits, teacher_logits)
        tensor([0.2238])

    Source:
        MiniLLM, arXiv 2306.08543, for one token.
    """
    return _of_logits(Form(REVERSE_KL), logits, teacher_logits, temperature, vocab_size, shard, impl)


@documented(DIVERGENCE_ARGS)
def generalized_jsd(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    beta: float,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Generalised Jensen-Shannon divergence: β KL(p || m) + (1-β) KL(q || m), m = β p + (1-β) q.

    Args:
        {logits}
        {teacher_logits}
        beta: β, 0 < β < 1. JSD / (β (1-β)) tends to the forward KL as β → 0 and to the reverse KL as β → 1, and is
            accurate on the way: the mixture is taken in log space. JSD itself goes to 0 at both ends.
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision logits. At most the entropy of (β, 1-β), log 2 at β = ½: always finite.

    Expected gradient:
        ∇JSD = (1-β) q (log q/m - KL(q || m)) / temperature: the mixture moves with the student.

    Raises:
        {TypeError}
        ValueError: `beta` is 0 or 1 (use the KL that the error names), shapes, devices or vocabularies disagree, an
            option is out of range, or `impl` is "triton" where the kernels cannot run.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> teacher_logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        >>> kdloss.generalized_jsd(logits, teacher_logits, beta=0.5)
        tensor([0.0509])

    Source:
        GKD, arXiv 2306.13649, section 3, where p is the teacher.
    """
    _checks.share("beta", beta, forward_kl.__name__, reverse_kl.__name__)
    return _of_logits(Form(GENERALIZED_JSD, beta), logits, teacher_logits, temperature, vocab_size, shard, impl)


@documented(DIVERGENCE_ARGS)
def skewed_forward_kl(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    alpha: float,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Skewed forward KL: KL(p || m), m = α p + (1-α) q. The forward KL with bounded ratios.

    Args:
        {logits}
        {teacher_logits}
        alpha: α, the teacher's share of the mixture, 0 < α < 1; DistiLLM takes 0.1.
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision logits. At most -log α: always finite.

    Expected gradient:
        ∇KL(p || m) = (q sum_u p_u w_u - p w) / temperature, w = (1-α) q/m.

    Raises:
        {TypeError}
        ValueError: `alpha` is 0 (use `forward_kl`) or 1 (the divergence is 0 for any student), shapes, devices or
            vocabularies disagree, an option is out of range, or `impl` is "triton" where the kernels cannot run.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> teacher_logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        >>> kdloss.skewed_forward_kl(logits, teacher_logits, alpha=0.1)
        tensor([0.1593])

    Source:
        DistiLLM, arXiv 2402.03898, section 3.1.
    """
    _checks.share("alpha", alpha, forward_kl.__name__, None)
    return _of_logits(Form(SKEWED_FORWARD_KL, alpha), logits, teacher_logits, temperature, vocab_size, shard, impl)


@documented(DIVERGENCE_ARGS)
def skewed_reverse_kl(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    alpha: float,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,)
    """Skewed reverse KL: KL(q || m), m = (1-α) p + α q. The reverse KL with bounded ratios.

    Args:
        {logits}
        {teacher_logits}
        alpha: α, the student's share of the mixture, 0 < α < 1; DistiLLM takes 0.1.
        {temperature}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        (...,) nats, float32 for half-precision logits. At most -log α: finite even where the teacher excludes what the
        student does not.

    Expected gradient:
        ∇KL(q || m) = q (h - sum_u q_u h_u) / temperature, h = log q/m - α q/m: the mixture moves with the student.

    Raises:
        {TypeError}
        ValueError: `alpha` is 0 (use `reverse_kl`) or 1 (the divergence is 0 for any student), shapes, devices or
            vocabularies disagree, an option is out of range, or `impl` is "triton" where the kernels cannot run.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> teacher_logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        >>> kdloss.skewed_reverse_kl(logits, teacher_logits, alpha=0.1)
        tensor([0.1730])

    Source:
        DistiLLM, arXiv 2402.03898, section 3.1.
    """
    _checks.share("alpha", alpha, reverse_kl.__name__, None)
    return _of_logits(Form(SKEWED_REVERSE_KL, alpha), logits, teacher_logits, temperature, vocab_size, shard, impl)


@documented(DIVERGENCE_ARGS)
def total_variation(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    temperature: float | Tensor = 1.0,  # or (...,)
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: TorchImpl = "auto",
) -> Tensor:  # (...,)
    """Total variation distance: TV(p, q) = 1/2 sum_v |p_v - q_v|. Symmetric and bounded.

    Args:
        {logits}
        {teacher_logits}
        {temperature}
        {vocab_size}
        {shard}
        impl: "auto" or "torch", which are the same: there is no kernel, and a GPU runs torch's operations in a scratch
            of a fixed size.

    Returns:
        (...,) in 0 .. 1, float32 for half-precision logits. Always finite. Where the two distributions nearly agree it
        has the absolute error of one rounding of a probability.

    Expected gradient:
        ∇TV = 1/2 q (s - sum_u q_u s_u) / temperature, s = sign(q - p), and s = 0 where q = p. It does not shrink as
        q approaches p, so steps of a constant size do not settle there; where the two agree to rounding, s is the sign
        of the rounding error.

    Raises:
        {TypeError}
        ValueError: shapes, devices or vocabularies disagree, an option is out of range, or `impl` is "triton".

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> teacher_logits = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> round(kdloss.total_variation(logits, teacher_logits).item(), 4)  # half of 1/4 + 0 + 1/4
        0.25

    Source:
        Wen et al., arXiv 2307.15190, for one token.
    """
    return _of_logits(Form(TOTAL_VARIATION), logits, teacher_logits, temperature, vocab_size, shard, torch_form(impl))


def _of_logits(
    form: Form,
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: Impl,
) -> Tensor:
    _checks.tensors(teacher_logits=teacher_logits)
    student, teacher, softmax = prepare_logits(
        logits, teacher_logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl
    )
    _checks.row_temperatures(softmax.row_temperature)
    assert teacher is not None
    return divergence(student, teacher, form, softmax)
