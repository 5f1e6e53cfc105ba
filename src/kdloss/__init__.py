"""Losses for on-policy distillation of language models, alone or joined with RL, on packed variable-length sequences.

Every per-token tensor is at prediction positions: entry t speaks of the token after position t. Tensors are
positional, everything else is keyword-only, and every public function states its expected gradient.
"""

from . import config as config, schedules as schedules
from ._distributed.collectives import global_token_count as global_token_count
from ._distributed.vocab_shard import VocabShard as VocabShard
from ._divergences.baseline import reverse_kl_baseline as reverse_kl_baseline
from ._divergences.from_hidden import (
    linear_forward_kl as linear_forward_kl,
    linear_generalized_jsd as linear_generalized_jsd,
    linear_reverse_kl as linear_reverse_kl,
    linear_skewed_forward_kl as linear_skewed_forward_kl,
    linear_skewed_reverse_kl as linear_skewed_reverse_kl,
    linear_total_variation as linear_total_variation,
)
from ._divergences.from_logits import (
    forward_kl as forward_kl,
    generalized_jsd as generalized_jsd,
    reverse_kl as reverse_kl,
    skewed_forward_kl as skewed_forward_kl,
    skewed_reverse_kl as skewed_reverse_kl,
    total_variation as total_variation,
)
from ._divergences.topk import (
    topk_forward_kl as topk_forward_kl,
    topk_generalized_jsd as topk_generalized_jsd,
    topk_reverse_kl as topk_reverse_kl,
)
from ._divergences.topk_diagnostics import topk_diagnostics as topk_diagnostics
from ._divergences.topk_from_hidden import (
    linear_topk_forward_kl as linear_topk_forward_kl,
    linear_topk_generalized_jsd as linear_topk_generalized_jsd,
    linear_topk_reverse_kl as linear_topk_reverse_kl,
)
from ._divergences.topk_sampled import (
    linear_topk_sampled_reverse_kl as linear_topk_sampled_reverse_kl,
    topk_sampled_reverse_kl as topk_sampled_reverse_kl,
)
from ._logprobs.from_hidden import (
    linear_token_logprobs as linear_token_logprobs,
    linear_token_logprobs_and_entropy as linear_token_logprobs_and_entropy,
)
from ._logprobs.from_logits import (
    LogprobsAndEntropy as LogprobsAndEntropy,
    token_logprobs as token_logprobs,
    token_logprobs_and_entropy as token_logprobs_and_entropy,
)
from ._logprobs.fused import FusedLoss as FusedLoss, fused_linear_loss as fused_linear_loss
from ._losses.advantages import (
    fold_kd_reward as fold_kd_reward,
    group_relative_advantages as group_relative_advantages,
    leave_one_out_advantages as leave_one_out_advantages,
)
from ._losses.alignment import Alignment as Alignment, check_alignment as check_alignment
from ._losses.check_batch import BatchReport as BatchReport, check_batch as check_batch
from ._losses.diagnostics import diagnostics as diagnostics
from ._losses.estimators import (
    discounted_returns as discounted_returns,
    kl_k1 as kl_k1,
    kl_k2 as kl_k2,
    kl_k3 as kl_k3,
    reverse_kl_reward as reverse_kl_reward,
)
from ._losses.joining import (
    align_responses as align_responses,
    gate_kd_reward as gate_kd_reward,
    modulate_advantages as modulate_advantages,
    prefix_weights as prefix_weights,
)
from ._losses.objectives import (
    LossOutput as LossOutput,
    distillation_loss as distillation_loss,
    grpo_loss as grpo_loss,
    kdrl_loss as kdrl_loss,
    kdrl_token_loss as kdrl_token_loss,
    sft_loss as sft_loss,
)
from ._losses.rewards import (
    forward_kl_reward as forward_kl_reward,
    jsd_reward as jsd_reward,
    squared_hellinger_reward as squared_hellinger_reward,
    total_variation_reward as total_variation_reward,
)
from ._losses.surrogates import (
    Surrogate as Surrogate,
    cispo_surrogate as cispo_surrogate,
    clipped_surrogate as clipped_surrogate,
    importance_sampled_surrogate as importance_sampled_surrogate,
    sapo_surrogate as sapo_surrogate,
    sequence_clipped_surrogate as sequence_clipped_surrogate,
)
from ._losses.token_masks import (
    informative_token_mask as informative_token_mask,
    stale_sequence_mask as stale_sequence_mask,
    top_entropy_mask as top_entropy_mask,
    trust_region_mask as trust_region_mask,
)
from ._losses.weights import (
    masked_importance_weights as masked_importance_weights,
    sequence_importance_weights as sequence_importance_weights,
    truncated_importance_weights as truncated_importance_weights,
)
from ._packing.layout import (
    broadcast_to_tokens as broadcast_to_tokens,
    cu_seqlens_from_lengths as cu_seqlens_from_lengths,
    next_token_labels as next_token_labels,
    pack as pack,
    response_mask as response_mask,
    segment_ids as segment_ids,
    segment_mean as segment_mean,
    segment_sum as segment_sum,
    to_prediction_positions as to_prediction_positions,
    to_token_positions as to_token_positions,
    unpack as unpack,
)
from ._packing.reductions import (
    global_sequence_count as global_sequence_count,
    sequence_mean as sequence_mean,
    token_mean as token_mean,
)
from ._softmax.output_head import OutputHead as OutputHead, output_head as output_head
from .config import KDRLConfig as KDRLConfig

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "BatchReport",
    "FusedLoss",
    "KDRLConfig",
    "LogprobsAndEntropy",
    "LossOutput",
    "OutputHead",
    "Surrogate",
    "VocabShard",
    "align_responses",
    "broadcast_to_tokens",
    "check_alignment",
    "check_batch",
    "cispo_surrogate",
    "clipped_surrogate",
    "config",
    "cu_seqlens_from_lengths",
    "diagnostics",
    "discounted_returns",
    "distillation_loss",
    "fold_kd_reward",
    "forward_kl",
    "forward_kl_reward",
    "fused_linear_loss",
    "gate_kd_reward",
    "generalized_jsd",
    "global_sequence_count",
    "global_token_count",
    "group_relative_advantages",
    "grpo_loss",
    "importance_sampled_surrogate",
    "informative_token_mask",
    "jsd_reward",
    "kdrl_loss",
    "kdrl_token_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out_advantages",
    "linear_forward_kl",
    "linear_generalized_jsd",
    "linear_reverse_kl",
    "linear_skewed_forward_kl",
    "linear_skewed_reverse_kl",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "linear_topk_forward_kl",
    "linear_topk_generalized_jsd",
    "linear_topk_reverse_kl",
    "linear_topk_sampled_reverse_kl",
    "linear_total_variation",
    "masked_importance_weights",
    "modulate_advantages",
    "next_token_labels",
    "output_head",
    "pack",
    "prefix_weights",
    "response_mask",
    "reverse_kl",
    "reverse_kl_baseline",
    "reverse_kl_reward",
    "sapo_surrogate",
    "schedules",
    "segment_ids",
    "segment_mean",
    "segment_sum",
    "sequence_clipped_surrogate",
    "sequence_importance_weights",
    "sequence_mean",
    "sft_loss",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "squared_hellinger_reward",
    "stale_sequence_mask",
    "to_prediction_positions",
    "to_token_positions",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_mean",
    "top_entropy_mask",
    "topk_diagnostics",
    "topk_forward_kl",
    "topk_generalized_jsd",
    "topk_reverse_kl",
    "topk_sampled_reverse_kl",
    "total_variation",
    "total_variation_reward",
    "truncated_importance_weights",
    "trust_region_mask",
    "unpack",
]
