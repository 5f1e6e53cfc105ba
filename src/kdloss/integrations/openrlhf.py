"""OpenRLHF: `KDRLPolicyLoss` replaces its `PolicyLoss` and adds a teacher.

    from kdloss.integrations.openrlhf import attach
    attach(trainer, teacher=lambda experience: experience.teacher_log_probs, distill_loss_weight=1.0)

OpenRLHF passes no teacher to its loss, so `attach` sets one before each step of an `ActorPPOTrainer`. Tensors are
(B, A), responses only. The denominators are OpenRLHF's, over the whole optimizer step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdloss
from kdloss._checks import distill_loss_weight_required
from kdloss._docs import documented

from ._layout import row_cu_seqlens, sequence_means
from ._texts import KDRL_ARGS


def attach(trainer: Any, *, teacher: Callable[[Any], Tensor | None], **options: Any) -> None:
    """Replace `trainer.actor_loss_fn`, keeping its settings, and set the teacher from every experience.

    Args:
        trainer: OpenRLHF's `ActorPPOTrainer`, the `trainer` of a `PolicyModelActor`.
        teacher: takes an `Experience` and returns the teacher's log-probs (B, A) of its actions, or None.
        options: keyword arguments of `KDRLPolicyLoss`: `distill_loss_weight`, which is required, `rl_loss_weight`,
            `kd_reward_clip`, `kd_max_ratio`.

    Raises:
        TypeError: distill_loss_weight is missing, or the trainer's loss is not the `PolicyLoss` of OpenRLHF 0.11.2 or
            later.
        ValueError: its settings are not supported.
    """
    loss = KDRLPolicyLoss(trainer.actor_loss_fn, **options)
    step = trainer.training_step

    @functools.wraps(step)
    def training_step(experience: Any, *args: Any, **kwargs: Any) -> Any:
        loss.teacher_log_probs = teacher(experience)
        return step(experience, *args, **kwargs)

    trainer.actor_loss_fn, trainer.training_step = loss, training_step


class PolicyLossOutput(NamedTuple):
    """The five results that OpenRLHF unpacks. Only `loss` carries gradient.

    Attributes:
        loss: () the number to descend.
        clip_ratio: () fraction of tokens at which the clip acts.
        ppo_kl: () mean of old_log_probs - log_probs, nats.
        vllm_kl: () mean of rollout_log_probs - old_log_probs, nats. None without a mismatch correction.
        is_filter_ratio: () fraction that the mismatch correction drops or clamps. None without one.
    """

    loss: Tensor
    clip_ratio: Tensor
    ppo_kl: Tensor
    vllm_kl: Tensor | None
    is_filter_ratio: Tensor | None


@documented(KDRL_ARGS)
class KDRLPolicyLoss(torch.nn.Module):
    """rl_loss_weight * OpenRLHF's policy loss + distill_loss_weight * reverse KL.

    Args:
        policy_loss: OpenRLHF's `PolicyLoss`, whose settings are kept.
        {rl_loss_weight}
        {distill_loss_weight}
        {kd_reward_clip}
        {kd_max_ratio}

    Expected gradient:
        That of `kdloss.kdrl_loss`. OpenRLHF's per-sample mean weights sequences by 1/|o|.

    Raises:
        TypeError: distill_loss_weight is missing, or `policy_loss` comes from an OpenRLHF before 0.11.2.
        ValueError: its type is neither "ppo" nor "gspo", or its correction is gated by a divergence.
    """

    @distill_loss_weight_required
    def __init__(
        self,
        policy_loss: Any,
        *,
        rl_loss_weight: float = 1.0,
        distill_loss_weight: float,
        kd_reward_clip: float | None = None,
        kd_max_ratio: float | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(policy_loss, "is_correction_level"):
            raise TypeError(
                "policy_loss must be the PolicyLoss of OpenRLHF >= 0.11.2, whose trainer unpacks five results, got "
                f"{type(policy_loss).__name__} without is_correction_level"
            )
        if policy_loss.policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type must be 'ppo' or 'gspo', got {policy_loss.policy_loss_type!r}")
        if policy_loss.is_correction_level != "off" and policy_loss.is_correction_gating != "ratio":
            raise ValueError(
                f"is_correction_gating={policy_loss.is_correction_gating!r} is not part of this loss: use 'ratio', or "
                "is_correction_level='off'"
            )
        self.settings = policy_loss
        self.rl_loss_weight, self.distill_loss_weight = rl_loss_weight, distill_loss_weight
        self.token_loss = functools.partial(
            kdloss.kdrl_token_loss,
            rl_loss_weight=0.0,  # the RL term is OpenRLHF's own
            distill_loss_weight=1.0,
            kd_reward_clip=kd_reward_clip,
            kd_max_ratio=kd_max_ratio,
        )
        self.teacher_log_probs: Tensor | None = None
        """(B, A), set before each call. The call resets it, so an old teacher cannot be used with a new batch."""

    def forward(
        self,
        log_probs: Tensor,  # (B, A)
        old_log_probs: Tensor,  # (B, A)
        advantages: Tensor,  # (B, A)
        action_mask: Tensor,  # (B, A)
        rollout_log_probs: Tensor | None = None,  # (B, A)
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> PolicyLossOutput:
        """The loss, as OpenRLHF calls it.

        The distillation ratio is against `rollout_log_probs` if they are given, else against `old_log_probs`.

        Args:
            log_probs: under the student, nats. Differentiable.
            old_log_probs: under the policy at the start of the update.
            advantages: per token.
            action_mask: nonzero where a token is trained on.
            rollout_log_probs: under the policy that sampled. Required with a mismatch correction.
            dp_size: number of data-parallel ranks, over which OpenRLHF averages gradients.
            batch_num_tokens: trained tokens of the whole step, for the mean over tokens. None: of this micro-batch.
            global_batch_size: sequences of the whole step, for the mean over sequences. None: of this micro-batch.

        Returns:
            `PolicyLossOutput`.

        Raises:
            ValueError: `rollout_log_probs` or the teacher's log-probs are needed and missing.
        """
        teacher_log_probs, self.teacher_log_probs = self.teacher_log_probs, None
        loss_mask = action_mask.bool().flatten()
        cu_seqlens = row_cu_seqlens(log_probs)
        logp, prox_logp, advantages = log_probs.flatten(), old_log_probs.flatten(), advantages.flatten()
        sampled = None if rollout_log_probs is None else rollout_log_probs.flatten()
        corrected = self.settings.is_correction_level != "off"
        if corrected and sampled is None:
            raise ValueError("rollout_log_probs must be given where is_correction_level is not 'off'")
        if self.settings.token_level_loss:
            count = batch_num_tokens
            reduce = functools.partial(kdloss.token_mean, loss_mask=loss_mask)
        else:
            count = global_batch_size
            reduce = functools.partial(kdloss.sequence_mean, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
        normalizer = None if count is None else count / dp_size

        weights, filtered = None, None
        if self.settings.policy_loss_type == "gspo":
            reference = sampled if corrected else prox_logp
            assert reference is not None
            log_ratio = kdloss.kl_k1(logp, reference, loss_mask=loss_mask)
            policy = sequence_means(log_ratio, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
            against = torch.zeros_like(policy)
        else:
            policy, against = logp, prox_logp
            if corrected:
                weights, filtered = self._correction(prox_logp, sampled, loss_mask, cu_seqlens, log_probs.shape)
        surrogate = kdloss.clipped_surrogate(
            policy,
            against,
            advantages,
            loss_mask=loss_mask,
            clip_low=self.settings.clip_eps_low,
            clip_high=self.settings.clip_eps_high,
            dual_clip=self.settings.dual_clip,
            weights=weights,
        )
        loss = 0 * torch.where(loss_mask, logp, 0).sum()
        if self.rl_loss_weight != 0:
            loss = self.rl_loss_weight * reduce(surrogate.loss, normalizer=normalizer)
        if self.distill_loss_weight != 0:
            if teacher_log_probs is None:
                raise ValueError(
                    "teacher_log_probs must be set before every call where distill_loss_weight is not 0 (it is "
                    f"{self.distill_loss_weight}), as attach does; the teacher gave none for this experience"
                )
            old_logp = prox_logp if sampled is None else sampled
            token_loss = self.token_loss(logp, old_logp, teacher_log_probs.flatten(), None, loss_mask=loss_mask)
            loss = loss + self.distill_loss_weight * reduce(token_loss, normalizer=normalizer)

        mean = functools.partial(kdloss.token_mean, loss_mask=loss_mask)
        vllm_kl = None
        if filtered is not None and sampled is not None:
            vllm_kl = -mean(kdloss.kl_k1(prox_logp, sampled, loss_mask=loss_mask))
        ppo_kl = -mean(kdloss.kl_k1(logp.detach(), prox_logp, loss_mask=loss_mask))
        return PolicyLossOutput(loss, mean(surrogate.clipped.to(loss.dtype)), ppo_kl, vllm_kl, filtered)

    def _correction(
        self, prox_logp: Tensor, sampled: Tensor | None, loss_mask: Tensor, cu_seqlens: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """OpenRLHF's mismatch correction by the ratio: (T,) weights, and () the fraction that it changes."""
        assert sampled is not None
        low, high = self.settings.is_correction_threshold
        raw = kdloss.truncated_importance_weights(prox_logp, sampled, loss_mask=loss_mask, max_weight=torch.inf)
        if self.settings.is_correction_level == "seq":
            of_sequence = kdloss.sequence_importance_weights(
                prox_logp,
                sampled,
                loss_mask=loss_mask,
                cu_seqlens=cu_seqlens,
                aggregate="mean",
                action="mask",
                min_weight=low,
                max_weight=high,
            )
            kept = of_sequence > 0
            rows = kept.view(shape).all(-1)
            return torch.where(kept, raw, 0), 1 - rows.to(raw.dtype).mean()
        outside = (raw < low) | (raw > high)
        fraction = kdloss.token_mean(outside.to(raw.dtype), loss_mask=loss_mask)
        if self.settings.is_correction_mode == "clip":
            return raw.clamp(low, high), fraction
        return torch.where(outside, 0, raw), fraction
