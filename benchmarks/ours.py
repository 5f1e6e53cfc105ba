"""kdloss's functions in the form of each path (see `peers.py`); by name, so that one that is not there is absent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import kdloss

from .contenders import Function
from .peers import AbsentError

DISTILL_WEIGHT = 0.1


def public(name: str) -> Any:
    """A public function of kdloss, or `AbsentError`."""
    found = getattr(kdloss, name, None)
    if found is None:
        raise AbsentError(f"kdloss has no {name} yet")
    return found


def logits(*, entropy: bool) -> Function:
    both, one = public("token_logprobs_and_entropy"), public("token_logprobs")

    def kdloss_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(both(logits, labels)) if entropy else (one(logits, labels),)

    return kdloss_logits


def hidden(*, entropy: bool) -> Function:
    both, one = public("linear_token_logprobs_and_entropy"), public("linear_token_logprobs")

    def kdloss_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        if entropy:
            return tuple(both(hidden, weight, labels, loss_mask=loss_mask))
        return (one(hidden, weight, labels, loss_mask=loss_mask),)

    return kdloss_hidden


def two_step() -> Function:
    """`linear_token_logprobs`, then `kdrl_loss`: gradients by autograd."""
    linear, kdrl = public("linear_token_logprobs"), public("kdrl_loss")

    def kdloss_two_step(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        old_logp: Tensor,
        teacher_logp: Tensor,
        advantages: Tensor,
    ) -> tuple[Tensor, ...]:
        logp = linear(hidden, weight, labels, loss_mask=loss_mask)
        options = {"loss_mask": loss_mask, "distill_loss_weight": DISTILL_WEIGHT}
        return (kdrl(logp, old_logp, teacher_logp, advantages, **options).loss,)

    return kdloss_two_step


def fused() -> Function:
    """The same loss with its gradients taken in the forward."""
    fused_loss, token_loss = public("fused_linear_loss"), public("kdrl_token_loss")

    def per_token(logp: Tensor, entropy: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor) -> Tensor:
        out: Tensor = token_loss(logp, old_logp, teacher_logp, advantages, distill_loss_weight=DISTILL_WEIGHT)
        return out

    def kdloss_fused(
        hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor, *token_inputs: Tensor
    ) -> tuple[Tensor, ...]:
        return (fused_loss(hidden, weight, labels, per_token, *token_inputs, loss_mask=loss_mask).loss,)

    return kdloss_fused


def ce_two_step() -> Function:
    linear, sft = public("linear_token_logprobs"), public("sft_loss")

    def kdloss_ce(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        return (sft(linear(hidden, weight, labels, loss_mask=loss_mask), loss_mask=loss_mask).loss,)

    return kdloss_ce


def ce_fused() -> Function:
    fused_loss = public("fused_linear_loss")

    def nll(logp: Tensor, entropy: Tensor) -> Tensor:
        return -logp

    def kdloss_ce_fused(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
        return (fused_loss(hidden, weight, labels, nll, loss_mask=loss_mask).loss,)

    return kdloss_ce_fused


def tail() -> Function:
    """Everything after the gather."""
    kdrl = public("kdrl_loss")

    def kdloss_tail(
        logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ...]:
        options = {"loss_mask": loss_mask, "distill_loss_weight": DISTILL_WEIGHT}
        return (kdrl(logp, old_logp, teacher_logp, advantages, **options).loss,)

    return kdloss_tail
