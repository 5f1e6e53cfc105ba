"""verl: policy losses and a distillation loss, registered under names that verl's configuration can use.

    actor_rollout_ref.actor.policy_loss.loss_mode=kdloss_ppo
    distillation.distillation_loss.loss_mode=kdloss_reverse_kl

verl loads them through the entry point that this package installs; `register()` does the same by hand.

Tensors are (B, R): responses only, right-padded. The denominators are verl's: those of the whole optimizer step where
verl knows them (`config.global_batch_info`), else those of the micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss import Surrogate
from kdloss._docs import documented

from ._layout import row_cu_seqlens
from ._lazy import Hook, require

# Docstring texts of the policy losses (`_docs.py`).
_POLICY_ARGS = {
    "old_log_prob": "log-probs under the policy at the start of the update, nats.",
    "log_prob": "log-probs under the student, nats. Differentiable.",
    "advantages": "per token, detached.",
    "response_mask": "nonzero where a token is trained on.",
    "loss_agg_mode": """"token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" or
        "seq-mean-token-mean".""",
    "config": "verl's actor configuration.",
    "rollout_is_weights": "per-token factors of the loss, verl's rollout correction. None: no factors.",
    "ValueError": "`loss_agg_mode` is unknown, or a count of the whole step is missing with dp_size > 1.",
}


def register() -> None:
    """Register the losses with verl: `kdloss_ppo`, `kdloss_gspo`, `kdloss_sapo`, `kdloss_cispo`, `kdloss_reverse_kl`.

    Raises:
        ImportError: verl is missing, or lacks what the adapter needs.
    """
    policy = _require(module="verl.trainer.ppo.core_algos")
    for name, loss in POLICY_LOSSES.items():
        policy.register_policy_loss(name)(loss)
    distillation = _require(module="verl.trainer.distillation.losses")
    if "kdloss_reverse_kl" not in distillation.DISTILLATION_LOSS_REGISTRY:
        settings = distillation.DistillationLossSettings(names=["kdloss_reverse_kl"], use_estimator=True)
        distillation.register_distillation_loss(settings)(reverse_kl)


@documented(_POLICY_ARGS)
def ppo(
    old_log_prob: Tensor,  # (B, R)
    log_prob: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R)
    response_mask: Tensor,  # (B, R)
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,  # (B, R)
) -> tuple[Tensor, dict[str, float]]:
    """`kdloss_ppo`: `clipped_surrogate` with `clip_ratio_low`, `clip_ratio_high` and `clip_ratio_c` of the config.

    Args:
        {old_log_prob}
        {log_prob}
        {advantages}
        {response_mask}
        {loss_agg_mode}
        {config}
        {rollout_is_weights}

    Returns:
        The loss, (), and verl's metrics `actor/pg_clipfrac`, `actor/pg_clipfrac_lower` and `actor/ppo_kl`.

    Expected gradient:
        That of `clipped_surrogate`; `loss_agg_mode` weights sequences as its name says.

    Raises:
        {ValueError}
    """
    low, high = _clips(config)
    surrogate = functools.partial(
        kdloss.clipped_surrogate, clip_low=low, clip_high=high, dual_clip=_option(config, "clip_ratio_c", 3.0)
    )
    return _policy_loss(
        surrogate, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


@documented(_POLICY_ARGS)
def gspo(
    old_log_prob: Tensor,  # (B, R)
    log_prob: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R)
    response_mask: Tensor,  # (B, R)
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,  # (B, R)
) -> tuple[Tensor, dict[str, float]]:
    """`kdloss_gspo`: `sequence_clipped_surrogate` with `clip_ratio_low` and `clip_ratio_high` of the config.

    The paper reduces it by "seq-mean-token-mean".

    Args:
        {old_log_prob}
        {log_prob}
        {advantages}
        {response_mask}
        {loss_agg_mode}
        {config}
        {rollout_is_weights}

    Returns:
        The loss, (), and verl's metrics `actor/pg_clipfrac`, `actor/pg_clipfrac_lower` and `actor/ppo_kl`.

    Expected gradient:
        That of `sequence_clipped_surrogate`; `loss_agg_mode` weights sequences as its name says.

    Raises:
        {ValueError}
    """
    low, high = _clips(config)
    surrogate = functools.partial(
        kdloss.sequence_clipped_surrogate, cu_seqlens=row_cu_seqlens(log_prob), clip_low=low, clip_high=high
    )
    return _policy_loss(
        surrogate, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


@documented(_POLICY_ARGS)
def sapo(
    old_log_prob: Tensor,  # (B, R)
    log_prob: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R)
    response_mask: Tensor,  # (B, R)
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,  # (B, R)
) -> tuple[Tensor, dict[str, float]]:
    """`kdloss_sapo`: `sapo_surrogate` with `tau_pos` and `tau_neg` of the config.

    verl's own "sapo" ignores `loss_agg_mode` and always reduces by "seq-mean-token-mean"; here `loss_agg_mode` applies.

    Args:
        {old_log_prob}
        {log_prob}
        {advantages}
        {response_mask}
        {loss_agg_mode}
        {config}
        {rollout_is_weights}

    Returns:
        The loss, (), and verl's metrics `actor/pg_clipfrac`, `actor/pg_clipfrac_lower` and `actor/ppo_kl`.

    Expected gradient:
        That of `sapo_surrogate`; `loss_agg_mode` weights sequences as its name says.

    Raises:
        {ValueError}
    """
    surrogate = functools.partial(
        kdloss.sapo_surrogate,
        tau_positive=_option(config, "tau_pos", 1.0),
        tau_negative=_option(config, "tau_neg", 1.05),
    )
    return _policy_loss(
        surrogate, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


@documented(_POLICY_ARGS)
def cispo(
    old_log_prob: Tensor,  # (B, R)
    log_prob: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R)
    response_mask: Tensor,  # (B, R)
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,  # (B, R)
) -> tuple[Tensor, dict[str, float]]:
    """`kdloss_cispo`: `cispo_surrogate` with `clip_ratio_low` and `clip_ratio_high` of the config.

    Args:
        {old_log_prob}
        {log_prob}
        {advantages}
        {response_mask}
        {loss_agg_mode}
        {config}
        {rollout_is_weights}

    Returns:
        The loss, (), and verl's metrics `actor/pg_clipfrac`, `actor/pg_clipfrac_lower` and `actor/ppo_kl`.

    Expected gradient:
        That of `cispo_surrogate`; `loss_agg_mode` weights sequences as its name says.

    Raises:
        {ValueError}
    """
    low, high = _clips(config)
    surrogate = functools.partial(kdloss.cispo_surrogate, clip_low=low, clip_high=high)
    return _policy_loss(
        surrogate, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, float]]]] = {
    "kdloss_ppo": ppo,
    "kdloss_gspo": gspo,
    "kdloss_sapo": sapo,
    "kdloss_cispo": cispo,
}


def reverse_kl(
    config: Any, distillation_config: Any, model_output: Mapping[str, Tensor], data: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """`kdloss_reverse_kl`: the reverse KL on the student's sampled tokens, for both values of `use_policy_gradient`.

    False: verl descends the returned loss. Its value is log q - log p, and its gradient is that of the
    importance-sampled surrogate -ρ sg(log p - log q), with q the student and p the teacher. The ratio ρ is against
    `rollout_log_probs` if the batch has them, else against `old_log_probs`, else 1.

    True: verl uses minus the value as the advantage of its PPO loss, as it does for "k1". The gradient is the same
    until a ratio is clipped.

    Args:
        config: verl's actor configuration; not used.
        distillation_config: `loss_max_clamp` of its `distillation_loss` bounds the reward log p - log q, in nats. The
            bound also limits the gradient; verl's own losses have no gradient where their clamp acts.
        model_output: `log_probs` of whole sequences at prediction positions, without padding.
        data: `teacher_logprobs` in the same layout; `response_mask`; the lengths by which verl extracts responses; and,
            if the batch has them, `rollout_log_probs`, `old_log_probs` and `temperature`.

    Returns:
        (B, R), differentiable in `log_probs`, 0 at masked tokens; and `distillation/abs_loss`, the metric of verl's own
        estimators.

    Expected gradient:
        grad KL(q || p) of every next-token distribution, at the prefixes that the sampling policy visits, for any such
        policy. `loss_max_clamp` biases it by design.

    Raises:
        ValueError: the sampling temperature is not 1; verl scores every teacher at 1.
        ImportError: verl is missing, or lacks what the adapter needs.
    """
    _check_temperature(data)
    cut = _require(module="verl.workers.utils.padding").no_padding_2_padding
    logp = cut(model_output["log_probs"], data)
    teacher_logp = cut(data["teacher_logprobs"], data).squeeze(-1)
    mask = _padded(data["response_mask"], False).bool()
    sampled = next((data[k] for k in ("rollout_log_probs", "old_log_probs") if data.get(k) is not None), None)
    old_logp = None if sampled is None else _padded(sampled, 0.0)
    clip = distillation_config.distillation_loss.loss_max_clamp

    surrogate = kdloss.kdrl_token_loss(
        logp,
        old_logp,
        teacher_logp,
        None,
        loss_mask=mask,
        rl_loss_weight=0.0,
        distill_loss_weight=1.0,
        kd_reward_clip=clip,
    )
    # One float32 rounding inside the bound: verl clamps to the bound, where the clamp of torch 2.14 has no gradient.
    inside = None if clip is None else clip * (1 - 2**-23)
    value = -kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=mask, clip=inside)
    metric = _require(module="verl.utils.metric")
    size = metric.Metric(metric.AggregationType.MEAN, kdloss.token_mean(value.abs(), loss_mask=mask))
    # an infinite loss is kept as it is, because inf - inf is NaN
    attached = torch.where(surrogate.isfinite(), value + (surrogate - surrogate.detach()), surrogate)
    return attached, {"distillation/abs_loss": size}


def aggregate(
    loss: Tensor,  # (B, R)
    response_mask: Tensor,  # (B, R) bool
    loss_agg_mode: str,
    *,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:  # ()
    """verl's `agg_loss` by this library's reductions: a sum over the micro-batch, divided by a count of the whole step.

    Args:
        loss: per-token loss.
        response_mask: True where a token is trained on.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" or
            "seq-mean-token-mean".
        dp_size: number of data-parallel ranks, over which verl's engines average gradients.
        batch_num_tokens, global_batch_size: trained tokens and sequences of the step. None: of the micro-batch.
        loss_scale_factor: the divisor of token sums under "seq-mean-token-sum-norm". None: R.

    Returns:
        (), differentiable in `loss`.

    Raises:
        ValueError: `loss_agg_mode` is unknown, or a count of the whole step is missing with dp_size > 1.
    """
    by_token = loss_agg_mode == "token-mean"
    count = batch_num_tokens if by_token else global_batch_size
    if count is None and dp_size > 1 and loss_agg_mode != "token-sum":
        name = "batch_num_tokens" if by_token else "global_batch_size"
        raise ValueError(f"{name} must be given where dp_size > 1 (it is {dp_size})")
    normalizer = None if count is None else count / dp_size
    mean = functools.partial(kdloss.token_mean, loss, loss_mask=response_mask)
    if by_token:
        return mean(normalizer=normalizer)
    if loss_agg_mode == "token-sum":
        return mean(normalizer=1 / dp_size)
    if loss_agg_mode == "seq-mean-token-mean":
        return kdloss.sequence_mean(
            loss.flatten(), loss_mask=response_mask.flatten(), cu_seqlens=row_cu_seqlens(loss), normalizer=normalizer
        )
    sequences = response_mask.any(-1).sum() if normalizer is None else normalizer
    if loss_agg_mode == "seq-mean-token-sum":
        return mean(normalizer=sequences)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return mean(normalizer=sequences * (loss_scale_factor or loss.shape[-1]))
    raise ValueError(
        "loss_agg_mode must be one of 'token-mean', 'token-sum', 'seq-mean-token-sum', 'seq-mean-token-sum-norm', "
        f"'seq-mean-token-mean', got {loss_agg_mode!r}"
    )


def _policy_loss(
    surrogate_of: Callable[..., Surrogate],
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:
    shape, mask = log_prob.shape, response_mask.bool()
    surrogate = surrogate_of(
        log_prob.flatten(),
        old_log_prob.flatten(),
        advantages.flatten(),
        loss_mask=mask.flatten(),
        weights=None if rollout_is_weights is None else rollout_is_weights.flatten(),
    )
    loss = aggregate(surrogate.loss.view(shape), mask, loss_agg_mode, **config.global_batch_info)
    with torch.no_grad():
        log_ratio = kdloss.kl_k1(log_prob, old_log_prob, loss_mask=mask)
        clipped, dual_clipped = (x.view(shape).float() for x in (surrogate.clipped, surrogate.dual_clipped))
        values = {
            "actor/pg_clipfrac": clipped,
            "actor/ppo_kl": -log_ratio,
            "actor/pg_clipfrac_lower": dual_clipped,
        }
        means = torch.stack([kdloss.token_mean(x, loss_mask=mask).to(loss.dtype) for x in values.values()])
    # Python numbers, as in verl: the only wait for the device
    return loss, dict(zip(values, means.tolist(), strict=True))


def _check_temperature(data: Mapping[str, Any]) -> None:
    # a TensorDict does not support `in`. A tensor (one temperature per sample) is not read: that waits for the device
    temperature = data["temperature"] if "temperature" in data.keys() else 1.0  # noqa: SIM118
    if not isinstance(temperature, Tensor) and temperature != 1:
        raise ValueError(
            f"actor_rollout_ref.rollout.temperature must be 1 with kdloss_reverse_kl, got {temperature}: verl scores "
            "its teacher at 1, and distributions at two temperatures differ"
        )


def _clips(config: Any) -> tuple[float, float]:
    """`clip_ratio_low` and `clip_ratio_high`; `clip_ratio` replaces one that is None."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def _option(config: Any, name: str, default: float) -> float:
    """A field that not all of verl's configurations have."""
    value: float = config.get(name, default)
    return value


def _padded(x: Tensor, fill: float) -> Tensor:
    return x.to_padded_tensor(fill) if x.is_nested else x


_HOOKS = {
    "verl.trainer.ppo.core_algos": {
        "register_policy_loss": Hook(),
        "get_policy_loss_fn": Hook(),
        "compute_policy_loss_vanilla": Hook(replaced_by=ppo),
    },
    "verl.trainer.distillation.losses": {
        "DISTILLATION_LOSS_REGISTRY": Hook(),
        "DistillationLossSettings": Hook(takes=("names", "use_estimator")),
        "register_distillation_loss": Hook(),
        "get_distillation_loss_fn": Hook(),
        "distillation_loss": Hook(keys=("old_log_probs", "response_mask")),
        "compute_distillation_loss_reverse_kl_estimator": Hook(
            replaced_by=reverse_kl, keys=("log_probs", "teacher_logprobs", "response_mask")
        ),
    },
    "verl.workers.utils.padding": {"no_padding_2_padding": Hook()},
    "verl.utils.metric": {"Metric": Hook(takes=("aggregation", "value")), "AggregationType.MEAN": Hook()},
}
_require = functools.cache(functools.partial(require, "verl", at_least="0.9.1", below="0.10", hooks=_HOOKS))
