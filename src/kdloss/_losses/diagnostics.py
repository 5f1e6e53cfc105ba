"""Detached statistics to log beside a loss. Nothing here syncs with the device: read the tensors when you log."""

from __future__ import annotations

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._docs import documented

from .estimators import difference
from .texts import LOSS_ARGS

# Nats. Servers write -9999 for -inf, which bfloat16 rounds to this. Real log-probs are above: the logits of a language
# model span at most a few hundred, so a log-prob is above -5000 even at a temperature of 0.1.
EXCLUDED = -9984.0


@documented(LOSS_ARGS)
def diagnostics(
    logp: Tensor,  # (T,)
    old_logp: Tensor | None,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    teacher_logp: Tensor | None = None,  # (T,)
    entropy: Tensor | None = None,  # (T,)
) -> dict[str, Tensor]:
    """Statistics over the trained tokens, with rho = exp(logp - old_logp).

    | key | unit | meaning |
    |---|---|---|
    | `tokens` | tokens | trained tokens |
    | `logp`, `old_logp` | nats | means |
    | `ratio_mean`, `ratio_min`, `ratio_max` | - | of rho; the mean is 1 in expectation for tokens from `old_logp` |
    | `approx_kl` | nats | mean of rho - 1 - log rho, an estimate of KL(old || new) |
    | `effective_sample_size` | - | (sum rho)^2 / (tokens * sum rho^2), 1 on-policy, towards 0 as weights degenerate |
    | `reverse_kl` | nats | mean of logp - teacher_logp, with `teacher_logp` |
    | `teacher_logp` | nats | mean over the tokens that the teacher does not exclude, with `teacher_logp` |
    | `teacher_neg_inf` | tokens | trained tokens that the teacher excludes, with `teacher_logp` |
    | `entropy` | nats | mean, with `entropy` |

    The teacher excludes a token where `teacher_logp` <= -9984: at -inf, and at the -9999 that vLLM writes into JSON for
    -inf and for a token that it did not score (-9999 is -9984 in bfloat16).

    Args:
        logp: (T,) or any shape: log-probs of the tokens under the student, nats. Detached.
        {old_logp}
        {loss_mask}
        teacher_logp: the shape of `logp`: log-probs of the same tokens under the teacher. None: no teacher statistics.
        entropy: the shape of `logp`: entropy of the student's next-token distribution, nats, from
            `token_logprobs_and_entropy`. None: no entropy statistic.

    Returns:
        0-dim detached tensors on the device of `logp`; all 0 where nothing is trained.

    Expected gradient:
        None: for logging.

    Raises:
        TypeError: a per-token tensor is not floating-point, or `loss_mask` is not bool.
        ValueError: shapes or devices differ.

    Example:
        >>> import torch, kdloss
        >>> logp, teacher_logp = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.25])
        >>> loss_mask = torch.tensor([True, True])
        >>> statistics = kdloss.diagnostics(logp, None, loss_mask=loss_mask, teacher_logp=teacher_logp)
        >>> {name: statistics[name].item() for name in ("tokens", "ratio_mean", "reverse_kl")}
        {'tokens': 2, 'ratio_mean': 1.0, 'reverse_kl': 0.375}
    """
    _checks.per_token("logp", logp, loss_mask=loss_mask, old_logp=old_logp, teacher_logp=teacher_logp, entropy=entropy)
    logp = logp.detach()
    old_logp = logp if old_logp is None else old_logp.detach()

    log_ratio = difference(logp, old_logp)
    zero, lowest = log_ratio.new_zeros(()), log_ratio.new_full((1,), -torch.inf)
    # maxima over trained tokens of log rho and -log rho, -inf without any (the appended entry also allows T = 0)
    both = torch.where(loss_mask, torch.stack([log_ratio, -log_ratio]), lowest).flatten(1)
    largest, minus_smallest = torch.cat([both, lowest.expand(2, 1)], 1).amax(1).unbind()
    log_ratio = torch.where(loss_mask, log_ratio, zero)
    ratio = log_ratio.exp()
    # scaled by the largest ratio, so that squares of large ratios stay finite
    scaled = (log_ratio - largest).exp()
    averaged = {
        "logp": logp,
        "old_logp": old_logp,
        "ratio_mean": ratio,
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
        "scaled": scaled,
        "squares": scaled.square(),
    }
    excluded = None
    if teacher_logp is not None:
        teacher_logp = teacher_logp.detach()
        excluded = loss_mask & (teacher_logp <= EXCLUDED)
        averaged["reverse_kl"] = difference(logp, teacher_logp)
        averaged["teacher_logp"] = torch.where(excluded, teacher_logp.new_zeros(()), teacher_logp)
    if entropy is not None:
        averaged["entropy"] = entropy.detach()

    tokens = loss_mask.sum()
    counts = tokens.clamp(min=1)
    # one sum for all of them; untrained tokens are 0 in it
    sums = torch.where(loss_mask, torch.stack([*averaged.values()]), zero).flatten(1).sum(1)
    means = {
        name: mean.to(_checks.promoted_dtype(x))
        for (name, x), mean in zip(averaged.items(), (sums / counts).unbind(), strict=True)
    }
    # without a trained token, the smallest ratio would be exp(inf), and the sample size 0 / 0
    trained = tokens > 0
    effective = means.pop("scaled").square() / means.pop("squares")
    statistics = {
        "tokens": tokens,
        "logp": means.pop("logp"),
        "old_logp": means.pop("old_logp"),
        "ratio_mean": means.pop("ratio_mean"),
        "ratio_min": torch.where(trained, (-minus_smallest).exp(), zero),
        "ratio_max": largest.exp(),
        "approx_kl": means.pop("approx_kl"),
        "effective_sample_size": torch.where(trained, effective, zero),
    }
    if excluded is not None:
        number = excluded.sum()
        total = sums[[*averaged].index("teacher_logp")].to(means["teacher_logp"].dtype)
        means["teacher_logp"] = total / (tokens - number).clamp(min=1)  # a denominator of its own
        means["teacher_neg_inf"] = number
    return {**statistics, **means}
