"""Detached statistics to log beside a loss. Nothing here syncs with the device: read the tensors when you log."""

from __future__ import annotations

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._docs import documented
from kdloss._packing.reductions import token_mean

from .estimators import masked_log_ratio
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

    def mean(x: Tensor, mask: Tensor = loss_mask) -> Tensor:
        return token_mean(x.detach(), loss_mask=mask)

    log_ratio = masked_log_ratio("logp", logp, loss_mask, old_logp=old_logp)
    ratio = log_ratio.exp()
    tokens = loss_mask.sum()
    smallest = -_largest(-log_ratio, loss_mask)
    largest = _largest(log_ratio, loss_mask)
    # scaled by the largest ratio, so that squares of large ratios stay finite
    scaled = (log_ratio - largest).exp()
    statistics = {
        "tokens": tokens,
        "logp": mean(logp),
        "old_logp": mean(old_logp),
        "ratio_mean": mean(ratio),
        "ratio_min": torch.where(tokens > 0, smallest.exp(), 0),
        "ratio_max": torch.where(tokens > 0, largest.exp(), 0),
        "approx_kl": mean(torch.expm1(log_ratio) - log_ratio),
        "effective_sample_size": torch.where(tokens > 0, mean(scaled).square() / mean(scaled.square()), 0),
    }
    if teacher_logp is not None:
        excluded = loss_mask & (teacher_logp <= EXCLUDED)
        statistics["reverse_kl"] = mean(masked_log_ratio("logp", logp, loss_mask, teacher_logp=teacher_logp))
        statistics["teacher_logp"] = mean(teacher_logp, loss_mask & ~excluded)
        statistics["teacher_neg_inf"] = excluded.sum()
    if entropy is not None:
        statistics["entropy"] = mean(entropy)
    return statistics


def _largest(x: Tensor, loss_mask: Tensor) -> Tensor:
    """The maximum over trained tokens, -inf without any (the appended entry also allows T = 0)."""
    kept = torch.where(loss_mask, x, -torch.inf).flatten()
    return torch.cat([kept, kept.new_full((1,), -torch.inf)]).amax()
