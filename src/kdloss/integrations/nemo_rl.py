"""NeMo-RL: `KDRLLossFn`, a loss function of its protocol, for `policy.train(data, loss_fn=KDRLLossFn(...))`.

Its `next_token_logprobs` are (B, S - 1) at prediction positions, while the data is (B, S) at the tokens' own: entry t
of the former meets entry t + 1 of the latter. Micro-batches are summed, so denominators are those of the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import kdloss

from ._layout import row_cu_seqlens
from ._lazy import require

_require = functools.cache(functools.partial(require, "nemo-rl", at_least="0.6", below="0.8"))


class KDRLLossFn:
    """`kdloss.kdrl_loss` on NeMo-RL's batches.

    The RL ratio is against `prev_logprobs`, the distillation ratio against `generation_logprobs`, which sampled.

    Args:
        rl_loss_weight ... kd_max_ratio: as in `kdloss.kdrl_loss`.
        token_level_loss: mean over tokens, of `global_valid_toks`; else over sequences, of `global_valid_seqs`.
        max_importance_weight: bound of the weights prev/generation of the RL term, NeMo-RL's
            `truncated_importance_sampling_ratio` of type "tis". None: no weights.
        teacher_key: where the data holds the teacher's log-probs, (B, S), as `policy.get_logprobs` gives them.

    Expected gradient:
        That of `kdloss.kdrl_loss`, reduced by tokens or sequences.
    """

    def __init__(
        self,
        *,
        rl_loss_weight: float = 1.0,
        distill_loss_weight: float = 0.005,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        kd_reward_clip: float | None = None,
        kd_max_ratio: float | None = None,
        token_level_loss: bool = True,
        max_importance_weight: float | None = None,
        teacher_key: str = "teacher_logprobs",
    ) -> None:
        self.distill_loss_weight = distill_loss_weight
        self.loss = functools.partial(
            kdloss.kdrl_loss,
            rl_loss_weight=rl_loss_weight,
            distill_loss_weight=distill_loss_weight,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            kd_reward_clip=kd_reward_clip,
            kd_max_ratio=kd_max_ratio,
            reduction="token_mean" if token_level_loss else "sequence_mean",
        )
        self.token_level_loss = token_level_loss
        self.max_importance_weight, self.teacher_key = max_importance_weight, teacher_key

    @property
    def loss_type(self) -> Any:
        """What NeMo-RL counts for the denominator."""
        types = _require(module="nemo_rl.algorithms.loss.interfaces").LossType
        return types.TOKEN_LEVEL if self.token_level_loss else types.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """What NeMo-RL passes in: log-probs of the next tokens."""
        return _require(module="nemo_rl.algorithms.loss.interfaces").LossInputType.LOGPROB

    @property
    def metric_normalizations(self) -> dict[str, Any]:
        """Which global count each metric was divided by."""
        kinds = _require(module="nemo_rl.algorithms.loss.interfaces").MetricNormalizer
        like_loss = kinds.TOKENS if self.token_level_loss else kinds.SEQUENCES
        per_token = ("probs_ratio", "clip_fraction", "token_mult_prob_error", "sampling_importance_ratio")
        return {
            **dict.fromkeys(("loss", "rl_loss", "kd_loss", "reverse_kl"), like_loss),
            **dict.fromkeys(per_token, kinds.TOKENS),
            "num_valid_samples": kinds.NONE,
        }

    def __call__(
        self,
        next_token_logprobs: Tensor,  # (B, S - 1)
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """NeMo-RL's call.

        Raises:
            ValueError: the data has no teacher and distill_loss_weight is not 0.
        """
        logp = next_token_logprobs.flatten()
        loss_mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool().flatten()
        prox_logp, old_logp, advantages = (
            data[name][:, 1:].flatten() for name in ("prev_logprobs", "generation_logprobs", "advantages")
        )
        teacher_logp = data.get(self.teacher_key)
        if teacher_logp is None and self.distill_loss_weight != 0:
            raise ValueError(
                f"the data has no {self.teacher_key!r}: put teacher_policy.get_logprobs(data)['logprobs'] there, name "
                "another teacher_key, or set distill_loss_weight to 0"
            )
        weights = None
        if self.max_importance_weight is not None:
            weights = kdloss.truncated_importance_weights(
                prox_logp, old_logp, loss_mask=loss_mask, max_weight=self.max_importance_weight
            )
        out = self.loss(
            logp,
            old_logp,
            None if teacher_logp is None else teacher_logp[:, 1:].flatten(),
            advantages,
            loss_mask=loss_mask,
            prox_logp=prox_logp,
            weights=weights,
            cu_seqlens=row_cu_seqlens(next_token_logprobs),
            normalizer=global_valid_toks if self.token_level_loss else global_valid_seqs,
        )
        mean = functools.partial(kdloss.token_mean, loss_mask=loss_mask, normalizer=global_valid_toks)
        mismatch = kdloss.kl_k1(prox_logp, old_logp, loss_mask=loss_mask)
        metrics = {
            "loss": out.loss,
            "rl_loss": out.rl,
            "kd_loss": out.kd,
            "reverse_kl": out.reverse_kl,
            "probs_ratio": mean(out.ratio),
            "clip_fraction": mean(out.clipped.to(out.ratio.dtype)),
            "token_mult_prob_error": mean(mismatch.abs().exp()),
            "sampling_importance_ratio": mean(mismatch.exp()),
            "num_valid_samples": data["sample_mask"].sum(),
        }
        return out.loss, {name: x.item() for name, x in metrics.items()}
