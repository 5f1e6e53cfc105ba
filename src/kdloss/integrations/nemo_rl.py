"""NeMo-RL: `KDRLLossFn`, a loss function of its protocol, for `policy.train(data, loss_fn=KDRLLossFn(...))`.

`next_token_logprobs` are (B, S - 1) at prediction positions. The data is (B, S) at the tokens' own positions, so entry
t of the former belongs to entry t + 1 of the latter. NeMo-RL sums micro-batches, so denominators are those of the
global batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss._checks import distill_loss_weight_required
from kdloss._docs import documented

from ._layout import per_token, rl_weights, row_cu_seqlens
from ._lazy import require
from ._texts import KDRL_ARGS

_require = functools.cache(functools.partial(require, "nemo-rl", at_least="0.6", below="0.8"))

_NOT_HERE = (
    "disable_ppo_ratio",
    "force_on_policy_ratio",
    "positive_example_nll_weight",
    "sequence_level_importance_ratios",
    "use_cispo",
)


@documented(KDRL_ARGS)
class KDRLLossFn:
    """`kdloss.kdrl_loss` on NeMo-RL's batches.

    The RL ratio is against `prev_logprobs`. The distillation ratio is against `generation_logprobs`, the policy that
    sampled.

    Args:
        {rl_loss_weight}
        {distill_loss_weight}
        {clip_low}
        {clip_high}
        {dual_clip}
        {kd_reward_clip}
        {kd_max_ratio}
        {kd_baseline}
        {trust_region}
        {stale_sequences}
        token_level_loss: True: mean over tokens, with denominator `global_valid_toks`. False: mean over sequences, with
            denominator `global_valid_seqs`.
        max_importance_weight: bound of the weights prev/generation of the RL term; NeMo-RL's
            `truncated_importance_sampling_ratio` of type "tis". None: no weights.
        teacher_key: key of the teacher's log-probs in the data, (B, S), as `policy.get_logprobs` returns them.
        use_fused_linear_logprobs: the value in NeMo-RL's `policy.megatron_cfg`; its workers read it, this class does
            not.

    Expected gradient:
        That of `kdloss.kdrl_loss`, reduced by tokens or by sequences.

    Raises:
        TypeError: distill_loss_weight is missing.
    """

    @distill_loss_weight_required
    def __init__(
        self,
        *,
        rl_loss_weight: float = 1.0,
        distill_loss_weight: float,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        kd_reward_clip: float | None = None,
        kd_max_ratio: float | None = None,
        kd_baseline: float | None = None,
        trust_region: float | None = None,
        stale_sequences: float | None = None,
        token_level_loss: bool = True,
        max_importance_weight: float | None = None,
        teacher_key: str = "teacher_logprobs",
        use_fused_linear_logprobs: bool = False,
    ) -> None:
        self.rl_loss_weight, self.distill_loss_weight = rl_loss_weight, distill_loss_weight
        self.loss = functools.partial(
            kdloss.kdrl_loss,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            kd_reward_clip=kd_reward_clip,
            kd_max_ratio=kd_max_ratio,
            reduction="token_mean" if token_level_loss else "sequence_mean",
        )
        self.kd_baseline, self.trust_region, self.stale_sequences = kd_baseline, trust_region, stale_sequences
        self.token_level_loss = token_level_loss
        self.max_importance_weight, self.teacher_key = max_importance_weight, teacher_key
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    @classmethod
    def from_config(cls, loss_config: Any, **options: Any) -> KDRLLossFn:
        """The replacement of `ClippedPGLossFn(loss_config)`, with the settings of the config.

        Args:
            loss_config: NeMo-RL's `master_config.loss_fn`: a mapping in 0.6, an object in later versions.
            options: keyword arguments of `KDRLLossFn`, which override the config; `distill_loss_weight` must be one.

        Returns:
            The `KDRLLossFn`.

        Raises:
            TypeError: distill_loss_weight is missing.
            ValueError: the config sets an option that this loss does not support.
        """

        def setting(name: str, default: Any = None) -> Any:
            if isinstance(loss_config, Mapping):
                return loss_config.get(name, default)
            return getattr(loss_config, name, default)

        for name in _NOT_HERE:
            if setting(name):
                raise ValueError(
                    f"{name} is not part of this loss, got {setting(name)}: unset it, or use NeMo-RL's ClippedPGLossFn "
                    "with the teacher in the advantages (kdloss.fold_kd_reward)"
                )
        if setting("reference_policy_kl_penalty", 0.0) != 0 and not setting("use_kl_in_reward"):
            raise ValueError(
                "reference_policy_kl_penalty is not part of this loss, got "
                f"{setting('reference_policy_kl_penalty')}: set it to 0, or use_kl_in_reward to True"
            )
        taken = {
            "clip_low": setting("ratio_clip_min", 0.2),
            "clip_high": setting("ratio_clip_max", 0.2),
            "dual_clip": setting("ratio_clip_c"),
            "token_level_loss": setting("token_level_loss", True),
        }
        if setting("use_importance_sampling_correction"):
            bound, kind = setting("truncated_importance_sampling_ratio"), setting("truncated_importance_sampling_type")
            if bound is not None and (kind != "tis" or setting("truncated_importance_sampling_ratio_min")):
                raise ValueError(
                    "truncated_importance_sampling_type must be 'tis' without truncated_importance_sampling_ratio_min, "
                    f"got {kind!r} with {setting('truncated_importance_sampling_ratio_min')}"
                )
            taken["max_importance_weight"] = math.inf if bound is None else bound
        return cls(**{**taken, **options})

    @property
    def loss_type(self) -> Any:
        """NeMo-RL's name for the denominator: tokens or sequences."""
        types = _require(module="nemo_rl.algorithms.loss.interfaces").LossType
        return types.TOKEN_LEVEL if self.token_level_loss else types.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """The input that NeMo-RL passes: log-probs of the next tokens."""
        return _require(module="nemo_rl.algorithms.loss.interfaces").LossInputType.LOGPROB

    @property
    def metric_normalizations(self) -> dict[str, Any]:
        """The global count that each metric was divided by; empty up to NeMo-RL 0.7.0, which does not ask for it."""
        kinds = getattr(_require(module="nemo_rl.algorithms.loss.interfaces"), "MetricNormalizer", None)
        if kinds is None:
            return {}
        like_loss = kinds.TOKENS if self.token_level_loss else kinds.SEQUENCES
        ratios = ("probs_ratio", "clip_fraction", "sampling_importance_ratio")
        mismatch = ("token_mult_prob_error", "gen_kl_error")
        return {
            **dict.fromkeys(("loss", "rl_loss", "kd_loss", "reverse_kl"), like_loss),
            **dict.fromkeys(ratios + mismatch, kinds.TOKENS),
            "num_valid_samples": kinds.NONE,
        }

    def __call__(
        self,
        next_token_logprobs: Tensor,  # (B, S - 1)
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, as NeMo-RL calls it.

        Args:
            next_token_logprobs: under the student, nats. Differentiable.
            data: `prev_logprobs`, `generation_logprobs`, `advantages`, `token_mask`, all (B, S); `sample_mask`, (B,);
                and the teacher's log-probs under `teacher_key`.
            global_valid_seqs: sequences of the global batch.
            global_valid_toks: trained tokens of the global batch.

        Returns:
            The loss, (), and the metrics as Python numbers; this waits for the device.

        Raises:
            ValueError: the data has no teacher and distill_loss_weight is not 0, or `prev_logprobs` are the zeros that
                NeMo-RL fills in under force_on_policy_ratio.
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
        if self.rl_loss_weight != 0 and _placeholder(prox_logp, old_logp, loss_mask):
            raise ValueError(
                "prev_logprobs are 0 at every trained token, which NeMo-RL writes instead of computing them where "
                "loss_fn.force_on_policy_ratio is True: set it to False"
            )
        weights, cu_seqlens = None, row_cu_seqlens(next_token_logprobs)
        if self.max_importance_weight is not None:
            weights = kdloss.truncated_importance_weights(
                prox_logp, old_logp, loss_mask=loss_mask, max_weight=self.max_importance_weight
            )
        if self.rl_loss_weight != 0:
            weights = rl_weights(
                weights,
                logp,
                old_logp,
                advantages,
                loss_mask=loss_mask,
                cu_seqlens=cu_seqlens,
                trust_region=self.trust_region,
                stale_sequences=self.stale_sequences,
            )
        out = self.loss(
            logp,
            old_logp,
            None if teacher_logp is None else teacher_logp[:, 1:].flatten(),
            advantages,
            loss_mask=loss_mask,
            rl_loss_weight=self.rl_loss_weight,
            distill_loss_weight=self.distill_loss_weight,
            prox_logp=prox_logp,
            weights=weights,
            kd_baseline=per_token(self.kd_baseline, logp),
            cu_seqlens=cu_seqlens,
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
            "gen_kl_error": mean(kdloss.kl_k3(old_logp, prox_logp, loss_mask=loss_mask)),  # grpo_train prints it
            "sampling_importance_ratio": mean(mismatch.exp()),
            "num_valid_samples": data["sample_mask"].sum(),
        }
        return out.loss, {name: x.item() for name, x in metrics.items()}


def _placeholder(prox_logp: Tensor, old_logp: Tensor, loss_mask: Tensor) -> Tensor:
    """() bool: all are 0 although the sampler was not certain of its tokens, so they are placeholders."""
    unsure = torch.where(loss_mask, old_logp, 0) < -0.1
    return unsure.any() & (torch.where(loss_mask, prox_logp, 0) == 0).all()
