"""What each path computes: its formula in plain torch, f(*arguments) -> outputs of shape (T,), and kdloss's call.

In float64 the formulas and torch's autograd are the truth; in the dtype of the inputs they are the contender "naive".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdloss

from .cases import KINDS, Case

Formula = Callable[..., tuple[Tensor, ...]]

BETA = 0.5  # of the Jensen-Shannon divergence
DISTILL_WEIGHT = 0.1


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return (torch.log_softmax(wide(logits), -1).gather(-1, labels[:, None]).squeeze(-1),)


def logps_entropies(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    all_logp = torch.log_softmax(wide(logits), -1)
    return all_logp.gather(-1, labels[:, None]).squeeze(-1), -(all_logp.exp() * all_logp).sum(-1)


def hidden_logps(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    (logp,) = logps(F.linear(hidden, weight), labels.clamp(min=0))
    return (torch.where(loss_mask, logp, 0),)


def hidden_logps_entropies(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    both = logps_entropies(F.linear(hidden, weight), labels.clamp(min=0))
    return tuple(torch.where(loss_mask, x, 0) for x in both)


def nll(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    return (-hidden_logps(hidden, weight, labels, loss_mask)[0],)


def kdrl_tail(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-min(rho A, clip(rho) A) - w rho (log p - log q), the latter difference held constant."""
    reward = (teacher_logp - logp).detach()
    return _clipped(logp, old_logp, advantages) - DISTILL_WEIGHT * (logp - old_logp).exp() * reward


def grpo_tail(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-min(rho A, clip(rho) A) + w k3."""
    gap = teacher_logp - logp
    return _clipped(logp, old_logp, advantages) + DISTILL_WEIGHT * (gap.exp() - gap - 1)


def _clipped(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def after_hidden(tail: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, ...]:
    hidden, weight, labels, loss_mask, *policies = arguments
    (logp,) = hidden_logps(hidden, weight, labels, loss_mask)
    return (torch.where(loss_mask, tail(logp, *policies, loss_mask), 0),)


def after_logp(*arguments: Tensor) -> tuple[Tensor, ...]:
    return (torch.where(arguments[-1], kdrl_tail(*arguments), 0),)


def divergence(kind: str, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, ...]:
    log_q, log_p = torch.log_softmax(wide(logits), -1), torch.log_softmax(wide(teacher_logits), -1)
    kl = partial(F.kl_div, reduction="none", log_target=True)  # kl(log_a, log_b) is of KL(b || a)
    if kind == "forward-kl":
        return (kl(log_q, log_p).sum(-1),)
    if kind == "reverse-kl":
        return (kl(log_p, log_q).sum(-1),)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (BETA * kl(log_m, log_p).sum(-1) + (1 - BETA) * kl(log_m, log_q).sum(-1),)


def linear_divergence(
    kind: str, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, loss_mask: Tensor
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight)
    return (torch.where(loss_mask, divergence(kind, F.linear(hidden, weight), teacher_logits)[0], 0),)


def topk_forward_kl(logits: Tensor, teacher_topk_logp: Tensor, teacher_topk_ids: Tensor) -> tuple[Tensor, ...]:
    """All tokens that are not among the K count as one outcome; 1 - Q as a difference, as trainers write it."""
    log_q = torch.log_softmax(wide(logits), -1).gather(-1, teacher_topk_ids)
    p, q = teacher_topk_logp.exp(), log_q.exp()
    tail, rest = 1 - p.sum(-1), 1 - q.sum(-1)
    return ((p * (teacher_topk_logp - log_q)).sum(-1) + tail * (tail.log() - rest.log()),)


def linear_topk_forward_kl(
    hidden: Tensor, weight: Tensor, teacher_topk_logp: Tensor, teacher_topk_ids: Tensor, loss_mask: Tensor
) -> tuple[Tensor, ...]:
    (value,) = topk_forward_kl(F.linear(hidden, weight), teacher_topk_logp, teacher_topk_ids)
    return (torch.where(loss_mask, value, 0),)


def mean_of(formula: Formula) -> Formula:
    """The formula's mean over the trained tokens, for paths of a scalar loss."""

    def mean(*arguments: Tensor) -> tuple[Tensor, ...]:
        mask = next(x for x in arguments if x.dtype == torch.bool)
        return (formula(*arguments)[0].sum() / mask.sum(),)

    return mean


# --- kdloss, by name of the contender -------------------------------------------------------------------------------


def ours_logits(case: Case) -> dict[str, Formula]:
    def kdloss_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        if case.entropy:
            return tuple(kdloss.token_logprobs_and_entropy(logits, labels))
        return (kdloss.token_logprobs(logits, labels),)

    return {"kdloss": kdloss_logits}


def ours_hidden(case: Case) -> dict[str, Formula]:
    def kdloss_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        if case.entropy:
            return tuple(kdloss.linear_token_logprobs_and_entropy(hidden, weight, labels, loss_mask=loss_mask))
        return (kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=loss_mask),)

    return {"kdloss": kdloss_hidden}


def ours_scalar(case: Case) -> dict[str, Formula]:
    """In one pass, which takes the gradients in the forward, and in two steps by autograd."""

    def token_loss(logp: Tensor, *inputs: Tensor) -> Tensor:
        old_logp, teacher_logp, advantages, mask = inputs
        if case.path == "kdrl":
            options: dict[str, Any] = {"distill_loss_weight": DISTILL_WEIGHT, "loss_mask": mask}
            return kdloss.kdrl_token_loss(logp, old_logp, teacher_logp, advantages, **options)
        surrogate = kdloss.clipped_surrogate(logp, old_logp, advantages, loss_mask=mask)
        return surrogate.loss + DISTILL_WEIGHT * kdloss.kl_k3(logp, teacher_logp, loss_mask=mask)

    def fused_loss(logp: Tensor, entropy: Tensor, *inputs: Tensor) -> Tensor:
        return token_loss(logp, *inputs) if inputs else -logp

    def fused(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, *policies: Tensor) -> Any:
        inputs = (*policies, loss_mask) if policies else ()
        return (kdloss.fused_linear_loss(hidden, weight, labels, fused_loss, *inputs, loss_mask=loss_mask).loss,)

    def two_steps(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, *policies: Tensor) -> Any:
        logp = kdloss.linear_token_logprobs(hidden, weight, labels, loss_mask=loss_mask)
        each = token_loss(logp, *policies, loss_mask) if policies else -logp
        return (kdloss.token_mean(each, loss_mask=loss_mask),)

    return {"kdloss": fused, "kdloss two steps": two_steps}


def ours_tail(case: Case) -> dict[str, Formula]:
    def kdrl_loss(logp: Tensor, *policies: Tensor) -> tuple[Tensor, ...]:
        *others, mask = policies
        return (kdloss.kdrl_loss(logp, *others, loss_mask=mask, distill_loss_weight=DISTILL_WEIGHT).loss,)

    return {"kdloss": kdrl_loss}


def ours_divergence(case: Case) -> dict[str, Formula]:
    kind = case.path.removeprefix("linear-")
    names = {"forward-kl": "forward_kl", "reverse-kl": "reverse_kl", "jsd": "generalized_jsd"}
    options = {"beta": BETA} if kind == "jsd" else {}
    function = getattr(kdloss, ("linear_" if case.width else "") + names[kind])

    def kdloss_divergence(*arguments: Tensor) -> tuple[Tensor, ...]:
        if not case.width:
            return (function(*arguments, **options),)
        *heads, mask = arguments
        return (kdloss.token_mean(function(*heads, loss_mask=mask, **options), loss_mask=mask),)

    return {"kdloss": kdloss_divergence}


def ours_topk(case: Case) -> dict[str, Formula]:
    def kdloss_topk(logits: Tensor, logp: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return (kdloss.topk_forward_kl(logits, logp, ids, tail="bucket"),)

    return {"kdloss": kdloss_topk}


def ours_linear_topk(case: Case) -> dict[str, Formula]:
    """Without the logits, and from logits that a user has computed."""

    def kdloss_linear_topk(hidden: Tensor, weight: Tensor, logp: Tensor, ids: Tensor, loss_mask: Tensor) -> Any:
        each = kdloss.linear_topk_forward_kl(hidden, weight, logp, ids, loss_mask=loss_mask, tail="bucket")
        return (kdloss.token_mean(each, loss_mask=loss_mask),)

    def from_logits(hidden: Tensor, weight: Tensor, logp: Tensor, ids: Tensor, loss_mask: Tensor) -> Any:
        each = kdloss.topk_forward_kl(F.linear(hidden, weight), logp, ids, tail="bucket")
        return (kdloss.token_mean(each, loss_mask=loss_mask),)

    return {"kdloss": kdloss_linear_topk, "kdloss from logits": from_logits}


OURS: dict[str, Callable[[Case], dict[str, Formula]]] = {
    "logits": ours_logits,
    "hidden": ours_hidden,
    "tail": ours_tail,
    "topk-forward-kl": ours_topk,
    "linear-topk-forward-kl": ours_linear_topk,
    **dict.fromkeys(("ce", "kdrl", "grpo"), ours_scalar),
    **{f"{prefix}{kind}": ours_divergence for kind in KINDS for prefix in ("", "linear-")},
}
