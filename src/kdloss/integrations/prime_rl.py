"""prime-rl: a custom loss that joins the reverse KL to its reference model with PPO's clip.

    [trainer.loss]
    type = "custom"
    import_path = "kdloss.integrations.prime_rl.kdrl_loss"
    [trainer.loss.kwargs]
    distill_loss_weight = 0.1

It is called once a sequence, prompt included, on log-probs at the token's own position. All of its tensors are, and
nothing here looks at neighbours, so none is moved. The loss is a sum: the trainer divides by the tokens of the step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss._checks import value_checks_allowed

from ._lazy import require


def kdrl_loss(
    inputs: Any,
    *,
    rl_loss_weight: float = 1.0,
    distill_loss_weight: float = 0.005,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kd_discount: float = 0.0,
    kd_reward_clip: float | None = None,
    kd_max_ratio: float | None = None,
    direct_penalty: bool = False,
) -> Any:
    """`kdloss.kdrl_loss` on prime-rl's `LossInputs`: both ratios are against `inference_logprobs`.

    Args:
        inputs: one sequence. `ref_logprobs` are the teacher's, `loss_weights` multiply both terms.
        rl_loss_weight ... direct_penalty: as in `kdloss.kdrl_loss`. rl_loss_weight 0 reads no advantages.

    Returns:
        prime-rl's `LossOutputs`: the sum over the trained tokens, and their means of `reverse_kl`, `kd`, `rl`, `ratio`
        and `clipped` under "kdrl/".

    Expected gradient:
        That of `kdloss.kdrl_loss`, in a sum.

    Raises:
        ValueError: distill_loss_weight is not 0, and the sample has no `ref_logprobs`, or zeros at every trained token
            of which the sampler was not sure (a CPU tensor's; on a GPU, where looking would wait for the device, the
            loss is NaN).
        ImportError: prime-rl is missing, or of a version that the adapter was not proven with.
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
        cu_seqlens=torch.tensor([0, logp.shape[0]], device=logp.device) if kd_discount else None,
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
    """The log-probs, unless each is 0: prime-rl fills with zeros what no teacher scored beside what one did.

    Where the sampler was sure of every token as well, a teacher may be, to rounding: such zeros pass, and mean little.
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
