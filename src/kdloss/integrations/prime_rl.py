"""prime-rl: a custom loss that combines PPO's clip with the reverse KL to the reference model.

    [trainer.loss]
    type = "custom"
    import_path = "kdloss.integrations.prime_rl.kdrl_loss"
    [trainer.loss.kwargs]
    distill_loss_weight = 1.0

prime-rl calls it once per sequence, prompt included. All tensors are at the token's own position; nothing here depends
on neighbouring positions, so no tensor is shifted. The loss is a sum; the trainer divides by the tokens of the step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss._checks import distill_loss_weight_required, value_checks_allowed
from kdloss._docs import documented

from ._layout import per_token, rl_weights
from ._lazy import require
from ._texts import KDRL_ARGS


@distill_loss_weight_required
@documented(KDRL_ARGS)
def kdrl_loss(
    inputs: Any,
    *,
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    kd_baseline: float | None = None,
    direct_penalty: bool = False,
    trust_region: float | None = None,
    stale_sequences: float | None = None,
) -> Any:
    """`kdloss.kdrl_loss` on prime-rl's `LossInputs`: both ratios are against `inference_logprobs`.

    Args:
        inputs: one sequence. `ref_logprobs` are the teacher's log-probs; `loss_weights` multiply both terms;
            `advantages` are not read if rl_loss_weight is 0.
        {rl_loss_weight}
        {distill_loss_weight}
        {clip_low}
        {clip_high}
        {dual_clip}
        {kd_discount}
        {kd_reward_clip}
        {kd_max_ratio}
        {kd_baseline}
        {direct_penalty}
        {trust_region}
        {stale_sequences}

    Returns:
        prime-rl's `LossOutputs`: the loss summed over the trained tokens, and their means of `reverse_kl`, `kd`, `rl`,
        `ratio` and `clipped`, under "kdrl/".

    Expected gradient:
        That of `kdloss.kdrl_loss`, as a sum over the trained tokens.

    Raises:
        TypeError: distill_loss_weight is missing.
        ValueError: distill_loss_weight is not 0, and the sample has no `ref_logprobs`, or only zeros at its trained
            tokens although the sampler was not certain of all of them. Zeros raise on the CPU only: elsewhere the check
            would wait for the device, and the loss is NaN.
        ImportError: prime-rl is missing, or has a version that the adapter was not tested with.
    """
    if inputs.ref_logprobs is None and distill_loss_weight != 0:
        raise ValueError(
            "the sample has no ref_logprobs: let the algorithm score it (assign_reference_logprobs, as prime-rl's opd "
            "does) and still route it to the rl component, or set distill_loss_weight to 0 (it is "
            f"{distill_loss_weight})"
        )
    teacher_logp = inputs.ref_logprobs
    if distill_loss_weight != 0:
        teacher_logp = _scored(teacher_logp, inputs.inference_logprobs, inputs.loss_mask)
    logp, loss_mask, weights = inputs.trainer_logprobs, inputs.loss_mask, inputs.loss_weights
    kd_weight = distill_loss_weight if weights is None or distill_loss_weight == 0 else distill_loss_weight * weights
    cu_seqlens = None
    if kd_discount or stale_sequences is not None:
        cu_seqlens = torch.tensor([0, logp.shape[0]], device=logp.device)
    if rl_loss_weight != 0:
        weights = rl_weights(
            weights,
            logp,
            inputs.inference_logprobs,
            inputs.advantages,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            trust_region=trust_region,
            stale_sequences=stale_sequences,
        )
    out = kdloss.kdrl_loss(
        logp,
        inputs.inference_logprobs,
        teacher_logp,
        inputs.advantages,
        loss_mask=loss_mask,
        rl_loss_weight=rl_loss_weight,
        distill_loss_weight=kd_weight,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        kd_discount=kd_discount,
        kd_reward_clip=kd_reward_clip,
        kd_max_ratio=kd_max_ratio,
        kd_baseline=per_token(kd_baseline, logp),
        cu_seqlens=cu_seqlens,
        normalizer=1.0,
        direct_penalty=direct_penalty,
    )
    count = loss_mask.sum().clamp(min=1)
    mean = functools.partial(kdloss.token_mean, loss_mask=loss_mask)
    metrics = {
        "kdrl/reverse_kl": out.reverse_kl / count,
        "kdrl/kd": out.kd / count,
        "kdrl/rl": out.rl / count,
        "kdrl/ratio": mean(out.ratio),
        "kdrl/clipped": mean(out.clipped.to(out.ratio.dtype)),
    }
    return _prime_rl().LossOutputs(loss=out.loss, metrics=metrics)


def _scored(teacher_logp: Tensor, old_logp: Tensor, loss_mask: Tensor) -> Tensor:
    """`teacher_logp`, or an error or NaN if all are 0: prime-rl packs zeros for samples that no teacher scored.

    If the sampler was certain of every token, a teacher may be, too, up to rounding. Such zeros pass and hardly matter.
    """
    unsure = loss_mask & (old_logp < -0.01)
    unscored = unsure.any() & ~(loss_mask & (teacher_logp != 0)).any()
    if value_checks_allowed(unscored) and unscored:
        raise ValueError(
            "ref_logprobs are 0 at every trained token, a teacher of probability 1: prime-rl writes zeros for a sample "
            "that no teacher scored where it is packed beside one that was; score every sample of the batch"
        )
    return torch.where(unscored, torch.nan, teacher_logp)


@functools.cache
def _prime_rl() -> Any:
    return require("prime-rl", at_least="0.8", below="0.9", module="prime_rl.trainer.rl.loss")
