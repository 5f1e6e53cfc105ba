"""The methods: each a small function from a batch to the loss that is descended. All of them call public functions.

q is the student, p the teacher. Every method gets the same number of samples and updates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

import kdloss
from kdloss import schedules

from .task import IGNORED


@dataclass
class Batch:
    """Answers to `T / A` prompts, as one packed stream of A positions each. Entry t is for `labels[t]`."""

    logits: Tensor  # (T, V) of the student, with gradient
    labels: Tensor  # (T,) -100 after the end of an answer
    old_logp: Tensor | None  # (T,) under the student that sampled, where that is an older one
    teacher_logits: Tensor  # (T, V)
    rewards: Tensor  # (B,) 1.0 where the whole answer is right
    cu_seqlens: Tensor  # (B + 1,)
    group_size: int
    step: int
    updates: int

    @cached_property
    def loss_mask(self) -> Tensor:
        return self.labels != IGNORED

    @cached_property
    def logp(self) -> Tensor:
        return kdloss.token_logprobs(self.logits, self.labels)

    @cached_property
    def teacher_logp(self) -> Tensor:
        return kdloss.token_logprobs(self.teacher_logits, self.labels)

    @cached_property
    def advantages(self) -> Tensor:
        return self.per_token(kdloss.group_relative_advantages(self.rewards, group_size=self.group_size))

    def per_token(self, x: Tensor) -> Tensor:  # (B,) -> (T,)
        return kdloss.broadcast_to_tokens(x, cu_seqlens=self.cu_seqlens, total_tokens=self.labels.shape[0])

    def mean(self, x: Tensor) -> Tensor:  # (T,) -> ()
        return kdloss.token_mean(x, loss_mask=self.loss_mask)

    @cached_property
    def failed(self) -> Tensor:
        """(T,) bool: tokens of answers that the verifier rejects."""
        return self.per_token(self.rewards) == 0

    @cached_property
    def hopeless(self) -> Tensor:
        """(T,) bool: tokens of prompts none of whose answers is right, so that the reward says nothing."""
        best = self.rewards.view(-1, self.group_size).amax(1)
        return self.per_token(best.repeat_interleave(self.group_size)) == 0


Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Method:
    loss: Loss
    label: str
    teacher_text: float = 0.0  # share of the updates, from the start, that train on answers sampled by the teacher
    age: int = 0  # updates between sampling and training
    target: Literal["reverse KL", "forward KL", "JSD", "forward KL, teacher's text"] = "reverse KL"  # for exact.py


# --- one of the two signals alone ----------------------------------------------------------------------------------


def grpo(b: Batch) -> Tensor:
    return kdloss.grpo_loss(b.logp, b.old_logp, b.advantages, loss_mask=b.loss_mask).loss


def sft(b: Batch) -> Tensor:
    """On text of the teacher."""
    return kdloss.sft_loss(b.logp, loss_mask=b.loss_mask).loss


def full(b: Batch, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A divergence of whole distributions, on the student's own prefixes."""
    return b.mean(divergence(b.logits, b.teacher_logits))


def topk(b: Batch, divergence: Callable[[Tensor, Tensor, Tensor], Tensor], k: int = 4) -> Tensor:
    """The same from the teacher's K most probable tokens."""
    kept = b.teacher_logits.log_softmax(-1).topk(k)
    return b.mean(divergence(b.logits, kept.values, kept.indices))


def topk_sampled(b: Batch, k: int = 4) -> Tensor:
    """Exact on the teacher's K most probable tokens, and the sampled token for the rest."""
    kept = b.teacher_logits.log_softmax(-1).topk(k)
    teacher = (b.teacher_logp, kept.values, kept.indices)
    return b.mean(kdloss.topk_sampled_reverse_kl(b.logits, b.labels, *teacher, old_logp=b.old_logp))


def sampled(b: Batch, discount: float = 0.0, baseline: Literal["value", "optimal", "batch"] | None = None) -> Tensor:
    """Reverse KL from the sampled token alone."""
    kd_baseline = None
    if baseline == "batch":  # the mean reward of the batch, which this token is one of several hundred in
        reward = kdloss.reverse_kl_reward(b.logp, b.teacher_logp, loss_mask=b.loss_mask)
        kd_baseline = b.mean(reward).expand_as(reward)
    elif baseline is not None:
        kd_baseline = kdloss.reverse_kl_baseline(b.logits, b.teacher_logits, kind=baseline)
    return kdloss.distillation_loss(
        b.logp,
        b.old_logp,
        b.teacher_logp,
        loss_mask=b.loss_mask,
        kd_discount=discount,
        kd_baseline=kd_baseline,
        cu_seqlens=b.cu_seqlens,
    ).loss


# --- both ----------------------------------------------------------------------------------------------------------


def kdrl(
    b: Batch,
    weight: float,
    rl_weight: float = 1.0,
    mask: Literal["failed", "hopeless"] | None = None,
    direct_penalty: bool = False,
) -> Tensor:
    """GRPO + weight * sampled reverse KL. `mask`: the teacher for some of the answers only."""
    kd_mask = {"failed": b.failed, "hopeless": b.hopeless, None: None}[mask]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # direct_penalty warns that the teacher is not in its gradient
        return kdloss.kdrl_loss(
            b.logp,
            b.old_logp,
            b.teacher_logp,
            b.advantages,
            loss_mask=b.loss_mask,
            rl_loss_weight=rl_weight,
            distill_loss_weight=weight,
            kd_mask=kd_mask,
            direct_penalty=direct_penalty,
        ).loss


def annealed(b: Batch, start: float) -> Tensor:
    """The teacher's weight falls to 0 over the whole run."""
    return kdrl(b, schedules.cosine(b.step, start=start, end=0.0, total_steps=b.updates))


def linear(b: Batch, start: float, floor: float, share: float) -> Tensor:
    """KDRL's schedule: the teacher's weight falls to a floor in the first `share` of the updates."""
    slope = (start - floor) / (share * b.updates)
    return kdrl(b, schedules.linear_floor(b.step, start=start, slope=slope, floor=floor))


def switched(b: Batch, share: float) -> Tensor:
    """The teacher alone in the first `share` of the updates, then the reward alone."""
    at = round(share * b.updates)
    weight = schedules.switch(b.step, before=1.0, after=0.0, at=at)
    return kdrl(b, weight, rl_weight=1.0 - weight)


def gated(b: Batch, weight: float) -> Tensor:
    """The teacher raises only tokens of right answers, and lowers only tokens of wrong ones."""
    reward = kdloss.reverse_kl_reward(b.logp, b.teacher_logp, loss_mask=b.loss_mask)
    verdict = b.per_token(2 * b.rewards - 1)
    reward = kdloss.gate_kd_reward(reward, verdict, loss_mask=b.loss_mask)
    return grpo(b) + weight * b.mean(
        kdloss.importance_sampled_surrogate(b.logp, b.old_logp, reward, loss_mask=b.loss_mask).loss
    )


def full_and_grpo(
    b: Batch, divergence: Callable[[Tensor, Tensor], Tensor], weight: float, hopeless_only: bool = False
) -> Tensor:
    """GRPO + weight * a divergence of whole distributions, everywhere or where no answer of the group is right."""
    teacher = divergence(b.logits, b.teacher_logits)
    return grpo(b) + weight * b.mean(torch.where(b.hopeless, teacher, 0) if hopeless_only else teacher)


def sft_then_grpo(b: Batch, share: float) -> Tensor:
    return sft(b) if b.step < round(share * b.updates) else grpo(b)


# --- answers sampled some updates ago ------------------------------------------------------------------------------


def without_ratio(b: Batch) -> Tensor:
    """The reward of today's student; the gradient of answers as if it had sampled them."""
    return kdloss.distillation_loss(b.logp, None, b.teacher_logp, loss_mask=b.loss_mask).loss


def frozen(b: Batch, ratio: bool) -> Tensor:
    """The reward log p - log q was computed when the answer was sampled."""
    reward = kdloss.reverse_kl_reward(b.old_logp, b.teacher_logp, loss_mask=b.loss_mask)  # type: ignore[arg-type]
    old_logp = b.old_logp if ratio else None
    return b.mean(kdloss.importance_sampled_surrogate(b.logp, old_logp, reward, loss_mask=b.loss_mask).loss)


def folded(b: Batch, rl_weight: float) -> Tensor:
    """As trainers do whose loss takes advantages: the frozen reward is added to them, and their clip acts on both."""
    reward = kdloss.reverse_kl_reward(b.old_logp, b.teacher_logp, loss_mask=b.loss_mask)  # type: ignore[arg-type]
    sums = kdloss.fold_kd_reward(b.advantages, reward, rl_loss_weight=rl_weight, distill_loss_weight=1.0)
    return kdloss.grpo_loss(b.logp, b.old_logp, sums, loss_mask=b.loss_mask).loss


def grpo_without_ratio(b: Batch) -> Tensor:
    return kdloss.grpo_loss(b.logp, None, b.advantages, loss_mask=b.loss_mask).loss


def grpo_truncated(b: Batch) -> Tensor:
    """Importance weights, bounded at 2, in place of the clip."""
    weights = kdloss.truncated_importance_weights(b.logp, b.old_logp, loss_mask=b.loss_mask)  # type: ignore[arg-type]
    return kdloss.grpo_loss(b.logp, None, b.advantages, loss_mask=b.loss_mask, weights=weights).loss


# --- their names in the plan ---------------------------------------------------------------------------------------

_jsd = partial(kdloss.generalized_jsd, beta=0.5)

METHODS: dict[str, Method] = {
    "grpo": Method(grpo, "GRPO"),
    "sft": Method(sft, "SFT on teacher text", teacher_text=1.0, target="forward KL, teacher's text"),
    "full-forward": Method(partial(full, divergence=kdloss.forward_kl), "full forward KL", target="forward KL"),
    "full-reverse": Method(partial(full, divergence=kdloss.reverse_kl), "full reverse KL"),
    "full-jsd": Method(partial(full, divergence=_jsd), "full JSD", target="JSD"),
    "top4-sampled": Method(topk_sampled, "top-4 + sampled tail"),
    "sampled": Method(sampled, "sampled reverse KL"),
    "sampled-batch-mean": Method(partial(sampled, baseline="batch"), "sampled, batch mean as baseline"),
    "sampled-value": Method(partial(sampled, baseline="value"), "sampled, value baseline"),
    "sampled-optimal": Method(partial(sampled, baseline="optimal"), "sampled, optimal baseline"),
    "sampled-discount-.5": Method(partial(sampled, discount=0.5), "sampled, discount .5"),
    "sampled-discount-1": Method(partial(sampled, discount=1.0), "sampled, discount 1"),
    "literal-alone": Method(partial(kdrl, weight=1.0, rl_weight=0.0, direct_penalty=True), "literal penalty alone"),
    "kdrl-failed": Method(partial(kdrl, weight=0.3, mask="failed"), "KDRL .3, teacher on failed answers"),
    "kdrl-hopeless": Method(partial(kdrl, weight=0.3, mask="hopeless"), "KDRL .3, groups without a success"),
    "kdrl-gated": Method(partial(gated, weight=0.3), "KDRL .3, gated teacher"),
    "kdrl-annealed": Method(partial(annealed, start=1.0), "KDRL, cosine 1 to 0"),
    "kdrl-linear": Method(partial(linear, start=1.0, floor=0.03, share=0.2), "KDRL, linear 1 to .03 in a fifth"),
    "kdrl-switched": Method(partial(switched, share=0.5), "sampled reverse KL, then GRPO at half"),
    "reverse-and-grpo": Method(
        partial(full_and_grpo, divergence=kdloss.reverse_kl, weight=0.3), "full reverse KL .3 + GRPO"
    ),
    "forward-and-grpo": Method(
        partial(full_and_grpo, divergence=kdloss.forward_kl, weight=0.3), "full forward KL .3 + GRPO"
    ),
    "forward-hopeless-and-grpo": Method(
        partial(full_and_grpo, divergence=kdloss.forward_kl, weight=1.0, hopeless_only=True),
        "full forward KL in groups without a success + GRPO",
    ),
    "sft-then-grpo": Method(partial(sft_then_grpo, share=0.4), "SFT, then GRPO at 40 %", teacher_text=0.4),
}

for _tail in ("bucket", "renormalize", "truncate", "generalized"):
    for _name, _divergence in (("reverse", kdloss.topk_reverse_kl), ("forward", kdloss.topk_forward_kl)):
        METHODS[f"top4-{_name}-{_tail}"] = Method(
            partial(topk, divergence=partial(_divergence, tail=_tail)),
            f"top-4 {_name} KL, {_tail}",
            target="reverse KL" if _name == "reverse" else "forward KL",
        )
for _weight in (0.1, 0.3, 1.0, 3.0, 10.0):
    _shown = f"{_weight:g}".removeprefix("0")
    METHODS[f"kdrl-{_shown}"] = Method(partial(kdrl, weight=_weight), f"KDRL {_shown}")
    METHODS[f"literal-{_shown}"] = Method(
        partial(kdrl, weight=_weight, direct_penalty=True), f"literal joint form {_shown}"
    )
for _age in (1, 4, 8):
    for _name, _loss, _label in (
        ("ratio", sampled, "reward recomputed, ratio"),
        ("no-ratio", without_ratio, "reward recomputed, no ratio"),
        ("frozen-ratio", partial(frozen, ratio=True), "reward frozen, ratio"),
        ("folded", partial(folded, rl_weight=0.0), "reward folded into advantages"),
    ):
        METHODS[f"stale-{_age}-{_name}"] = Method(_loss, f"{_age} old: {_label}", age=_age)
METHODS |= {
    "stale-8-frozen-no-ratio": Method(partial(frozen, ratio=False), "8 old: reward frozen, no ratio", age=8),
    "stale-8-grpo-clip": Method(grpo, "8 old: GRPO, clip", age=8),
    "stale-8-grpo-no-ratio": Method(grpo_without_ratio, "8 old: GRPO, no ratio", age=8),
    "stale-8-grpo-truncated": Method(grpo_truncated, "8 old: GRPO, truncated weights", age=8),
    "stale-8-kdrl-1": Method(partial(kdrl, weight=1.0), "8 old: KDRL 1, clip", age=8),
    "stale-8-kdrl-folded": Method(partial(folded, rl_weight=1.0), "8 old: KDRL 1, folded", age=8),
}
