"""slime: a custom loss that adds the teacher as a term of its own to PPO's clip, instead of inside the advantages.

    --loss-type custom_loss --custom-loss-function-path my_losses.kdrl_loss
    --use-opd --opd-type megatron --opd-teacher-load ... --opd-kl-coef 0

slime passes no options to a custom loss, so `my_losses.py` is a module of your own that binds them:

    kdrl_loss = functools.partial(kdloss.integrations.slime.kdrl_loss, distill_loss_weight=1.0)

Log-probs come from slime's own function, which handles its context and tensor parallelism. The mean is slime's
`sum_of_sample_mean`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss._checks import distill_loss_weight_required
from kdloss._docs import documented

from ._layout import per_token, rl_weights
from ._lazy import require
from ._texts import KDRL_ARGS


@distill_loss_weight_required
@documented(KDRL_ARGS)
def kdrl_loss(
    args: Any,
    batch: Mapping[str, Any],
    logits: Tensor,  # (1, T, V)
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    *,
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: float | None = None,
    trust_region: float | None = None,
    stale_sequences: float | None = None,
    top_entropy: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's policy loss plus distill_loss_weight * reverse KL to `teacher_log_probs`.

    The RL ratio is against `log_probs` (`rollout_log_probs` under --use-rollout-logprobs). The distillation ratio is
    against `rollout_log_probs` where the batch has them, else against the policy of the RL ratio.

    Args:
        args: slime's. Used are `eps_clip`, `eps_clip_high`, `eps_clip_c`, `entropy_coef`, `use_rollout_logprobs`,
            `use_tis`, `tis_clip` and `tis_clip_low`; other options that this loss does not support raise.
        batch: slime's. Per-token entries are lists with one tensor per sample, responses only: `advantages`,
            `loss_masks`, `log_probs` and, where they apply, `rollout_log_probs` and `teacher_log_probs`.
        logits: (1, T, V) float32 of the student. Differentiable.
        sum_of_sample_mean: slime's reduction, which applies the mask.
        {rl_loss_weight}
        {distill_loss_weight}
        {kd_reward_clip}
        {kd_max_ratio}
        {kd_baseline}
        {trust_region}
        {stale_sequences}
        top_entropy: `fraction` of `kdloss.top_entropy_mask`, of the trained tokens of this rank's micro-batch. The RL
            term of a token that it drops is 0. Denominators and the distillation term do not change. None: off.

    Returns:
        The loss, (), and the detached values that slime reports under its own names, plus `kd_loss` and
        `opd_reverse_kl`.

    Expected gradient:
        That of `kdloss.kdrl_loss`, minus `entropy_coef` times the gradient of the entropy. slime's mean weights samples
        by 1/|o|, unless --calculate-per-token-loss is set.

    Raises:
        TypeError: distill_loss_weight is missing.
        ValueError: the batch lacks log-probs that are needed, an option of slime's would count the teacher twice or is
            not part of this loss, or `stale_sequences` is given under context parallelism.
        ImportError: slime is missing, or has a version that the adapter was not tested with.
    """
    _check_options(args, batch, distill_loss_weight)
    slime = _slime()
    scored = slime.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **slime.get_rollout_top_p_logprob_kwargs(args, batch),
    )[1]
    logp, entropy = torch.cat(scored["log_probs"]), torch.cat(scored["entropy"])
    sampled = _joined(batch, "rollout_log_probs")
    prox_logp = sampled if args.use_rollout_logprobs else _joined(batch, "log_probs")
    if prox_logp is None:  # in slime, no log_probs means that nothing was updated yet
        prox_logp = logp.detach()
    old_logp = prox_logp if sampled is None else sampled
    lengths = (batch["loss_masks"], batch["total_lengths"], batch["response_lengths"])
    loss_mask = torch.cat([slime.slice_log_prob_with_cp(*x) for x in zip(*lengths, strict=True)]).bool()
    raw = kdloss.truncated_importance_weights(prox_logp, old_logp, loss_mask=loss_mask, max_weight=torch.inf)
    weights = raw.clamp(args.tis_clip_low, args.tis_clip) if args.use_tis else None

    advantages = torch.cat(batch["advantages"])
    masked = rl_weights(
        weights,
        logp,
        old_logp,
        advantages,
        loss_mask=loss_mask,
        cu_seqlens=None if stale_sequences is None else _whole_responses(batch, logp),
        trust_region=trust_region,
        stale_sequences=stale_sequences,
    )
    if top_entropy is not None:
        kept = kdloss.top_entropy_mask(entropy, loss_mask=loss_mask, fraction=top_entropy)
        masked = kept.to(logp.dtype) if masked is None else torch.where(kept, masked, 0)
    surrogate = kdloss.clipped_surrogate(
        logp,
        prox_logp,
        advantages,
        loss_mask=loss_mask,
        clip_low=args.eps_clip,
        clip_high=args.eps_clip_high,
        dual_clip=args.eps_clip_c,
        weights=masked,
    )
    pg_loss, entropy_loss = sum_of_sample_mean(surrogate.loss), sum_of_sample_mean(entropy)
    loss = -args.entropy_coef * entropy_loss
    if rl_loss_weight != 0:
        loss = loss + rl_loss_weight * pg_loss
    reported = {
        "pg_loss": pg_loss,
        "entropy_loss": entropy_loss,
        "pg_clipfrac": sum_of_sample_mean(surrogate.clipped.float()),
        "ppo_kl": -sum_of_sample_mean(kdloss.kl_k1(logp, prox_logp, loss_mask=loss_mask)),
    }
    if sampled is not None:
        scored_logp = logp.detach() if args.use_rollout_logprobs else prox_logp
        difference = kdloss.kl_k1(scored_logp, sampled, loss_mask=loss_mask).abs()
        reported["train_rollout_logprob_abs_diff"] = sum_of_sample_mean(difference)
    if weights is not None:
        streams = {
            "ois": surrogate.ratio,
            "tis": raw,
            "tis_clipfrac": (weights != raw).float(),
            "tis_abs": (raw - 1).abs(),
        }
        reported |= {name: sum_of_sample_mean(x) for name, x in streams.items()}
    if distill_loss_weight != 0:
        teacher_logp = torch.cat(batch["teacher_log_probs"]).to(logp.device)
        kd = kdloss.kdrl_token_loss(
            logp,
            old_logp,
            teacher_logp,
            None,
            loss_mask=loss_mask,
            rl_loss_weight=0.0,
            distill_loss_weight=1.0,
            kd_reward_clip=kd_reward_clip,
            kd_max_ratio=kd_max_ratio,
            kd_baseline=per_token(kd_baseline, logp),
        )
        kd_loss = sum_of_sample_mean(kd)
        loss = loss + distill_loss_weight * kd_loss
        reverse_kl = kdloss.kl_k1(logp, teacher_logp, loss_mask=loss_mask)
        reported |= {"kd_loss": kd_loss, "opd_reverse_kl": sum_of_sample_mean(reverse_kl)}
    if logp.numel() == 0:  # a rank without response tokens still has to run its backward
        loss = loss + 0 * logits.sum()
    return loss, {name: x.detach().clone() for name, x in {"loss": loss, **reported}.items()}


@functools.cache
def _slime() -> Any:
    return require("slime", at_least="0.3.1", below="0.4", module="slime.backends.megatron_utils.loss")


def _joined(batch: Mapping[str, Any], name: str) -> Tensor | None:
    return torch.cat(batch[name]) if batch.get(name) else None


def _whole_responses(batch: Mapping[str, Any], logp: Tensor) -> Tensor:
    """`cu_seqlens` of the responses."""
    lengths = batch["response_lengths"]
    if sum(lengths) != logp.shape[0]:
        raise ValueError(
            f"stale_sequences must be None under context parallelism: this rank holds {logp.shape[0]} tokens of "
            f"responses with {sum(lengths)}, and the mask reads the mean of a whole response"
        )
    return kdloss.cu_seqlens_from_lengths(torch.tensor(lengths, device=logp.device))


def _check_options(args: Any, batch: Mapping[str, Any], distill_loss_weight: float) -> None:
    """Raise for options that would silently change the loss."""
    option = functools.partial(getattr, args)
    if distill_loss_weight != 0 and not batch.get("teacher_log_probs"):
        raise ValueError(
            "the batch has no teacher_log_probs: set --use-opd with --opd-type megatron and --opd-teacher-load, or "
            "with --opd-type sglang, --custom-rm-path and --custom-reward-post-process-path, of functions that keep "
            "the task reward (slime's own set it to 0), or distill_loss_weight=0"
        )
    if option("use_opd", False) and option("opd_kl_coef", 0.0) != 0:
        raise ValueError(
            f"--opd-kl-coef must be 0 with this loss, got {args.opd_kl_coef}: the advantages hold the teacher already, "
            "so it would count twice; the weight is distill_loss_weight"
        )
    if distill_loss_weight != 0 and option("opd_type", None) != "megatron":
        for name in ("rollout_temperature", "rollout_top_p"):
            if option(name, 1.0) != 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be 1 with --opd-type sglang, got {option(name)}: a server scores "
                    "at 1, over the whole vocabulary, but slime scores the student like the rollout; use --opd-type "
                    "megatron"
                )
    if (option("use_rollout_logprobs", False) or option("use_tis", False)) and not batch.get("rollout_log_probs"):
        raise ValueError(
            "the batch has no rollout_log_probs, which --use-rollout-logprobs and --use-tis read: let the rollout "
            "return them, or unset both"
        )
    if option("advantage_estimator", "grpo") in ("gspo", "cispo"):
        raise ValueError(
            f"--advantage-estimator {args.advantage_estimator} has its own ratio, and this loss has PPO's: use "
            "grpo, or --loss-type policy_loss with --opd-kl-coef"
        )
    if option("use_kl_loss", False) and option("kl_loss_coef", 0.0) != 0:
        raise ValueError(
            "--use-kl-loss is not part of this loss: use --kl-coef, which puts the penalty in the advantages"
        )
    for name in ("use_opsm", "custom_tis_function_path", "custom_pg_loss_reducer_function_path"):
        if option(name, None):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is not part of this loss: unset it, or use --loss-type policy_loss")
