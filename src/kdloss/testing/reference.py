"""NumPy float64 oracles of the public functions, and `<name>_grad`, their analytic gradients, for tests.

Each oracle is written from its equation, token by token, and not from the torch code, so agreement of the two is
evidence. Names and parameters are the library's. Arguments are array-likes; results are float64, int64 or bool arrays.
`<name>_grad` is d(sum of loss) / d logp for a per-token loss, d out / d x for a scalar reduction, d loss / d logp for a
scalar loss, and the vector-Jacobian product with `upstream` elsewhere. The scalar losses skip the term of a weight 0
that is a Python number; an `np.ndarray` weight counts as a tensor.

Example:
    >>> from kdloss.testing import reference
    >>> logp, teacher_logp, loss_mask = [-1.0, -9.0], [-3.0, -9.0], [True, False]
    >>> reference.kl_k2(logp, teacher_logp, loss_mask=loss_mask).tolist()
    [2.0, 0.0]
    >>> reference.kl_k2_grad(logp, teacher_logp, loss_mask=loss_mask).tolist()
    [2.0, 0.0]
"""

from kdloss.testing._oracles.baselines import reverse_kl_baseline as reverse_kl_baseline
from kdloss.testing._oracles.divergences import (
    forward_kl as forward_kl,
    forward_kl_grad as forward_kl_grad,
    generalized_jsd as generalized_jsd,
    generalized_jsd_grad as generalized_jsd_grad,
    linear_forward_kl as linear_forward_kl,
    linear_forward_kl_grad as linear_forward_kl_grad,
    linear_generalized_jsd as linear_generalized_jsd,
    linear_generalized_jsd_grad as linear_generalized_jsd_grad,
    linear_reverse_kl as linear_reverse_kl,
    linear_reverse_kl_grad as linear_reverse_kl_grad,
    linear_skewed_forward_kl as linear_skewed_forward_kl,
    linear_skewed_forward_kl_grad as linear_skewed_forward_kl_grad,
    linear_skewed_reverse_kl as linear_skewed_reverse_kl,
    linear_skewed_reverse_kl_grad as linear_skewed_reverse_kl_grad,
    linear_total_variation as linear_total_variation,
    linear_total_variation_grad as linear_total_variation_grad,
    reverse_kl as reverse_kl,
    reverse_kl_grad as reverse_kl_grad,
    skewed_forward_kl as skewed_forward_kl,
    skewed_forward_kl_grad as skewed_forward_kl_grad,
    skewed_reverse_kl as skewed_reverse_kl,
    skewed_reverse_kl_grad as skewed_reverse_kl_grad,
    total_variation as total_variation,
    total_variation_grad as total_variation_grad,
)
from kdloss.testing._oracles.logprobs import (
    linear_token_logprobs as linear_token_logprobs,
    linear_token_logprobs_and_entropy as linear_token_logprobs_and_entropy,
    linear_token_logprobs_and_entropy_grad as linear_token_logprobs_and_entropy_grad,
    linear_token_logprobs_grad as linear_token_logprobs_grad,
    token_logprobs as token_logprobs,
    token_logprobs_and_entropy as token_logprobs_and_entropy,
    token_logprobs_and_entropy_grad as token_logprobs_and_entropy_grad,
    token_logprobs_grad as token_logprobs_grad,
)
from kdloss.testing._oracles.monitoring import (
    constant as constant,
    cosine as cosine,
    diagnostics as diagnostics,
    linear_floor as linear_floor,
    switch as switch,
    topk_diagnostics as topk_diagnostics,
)
from kdloss.testing._oracles.objectives import (
    distillation_loss as distillation_loss,
    distillation_loss_grad as distillation_loss_grad,
    grpo_loss as grpo_loss,
    grpo_loss_grad as grpo_loss_grad,
    kdrl_loss as kdrl_loss,
    kdrl_loss_grad as kdrl_loss_grad,
    kdrl_token_loss as kdrl_token_loss,
    kdrl_token_loss_grad as kdrl_token_loss_grad,
    sft_loss as sft_loss,
    sft_loss_grad as sft_loss_grad,
)
from kdloss.testing._oracles.packing import (
    broadcast_to_tokens as broadcast_to_tokens,
    broadcast_to_tokens_grad as broadcast_to_tokens_grad,
    cu_seqlens_from_lengths as cu_seqlens_from_lengths,
    next_token_labels as next_token_labels,
    pack as pack,
    pack_grad as pack_grad,
    response_mask as response_mask,
    segment_ids as segment_ids,
    segment_mean as segment_mean,
    segment_mean_grad as segment_mean_grad,
    segment_sum as segment_sum,
    segment_sum_grad as segment_sum_grad,
    to_prediction_positions as to_prediction_positions,
    to_prediction_positions_grad as to_prediction_positions_grad,
    to_token_positions as to_token_positions,
    to_token_positions_grad as to_token_positions_grad,
    unpack as unpack,
    unpack_grad as unpack_grad,
)
from kdloss.testing._oracles.reductions import (
    global_sequence_count as global_sequence_count,
    global_token_count as global_token_count,
    sequence_mean as sequence_mean,
    sequence_mean_grad as sequence_mean_grad,
    token_mean as token_mean,
    token_mean_grad as token_mean_grad,
)
from kdloss.testing._oracles.signals import (
    discounted_returns as discounted_returns,
    fold_kd_reward as fold_kd_reward,
    group_relative_advantages as group_relative_advantages,
    kl_k1 as kl_k1,
    kl_k1_grad as kl_k1_grad,
    kl_k2 as kl_k2,
    kl_k2_grad as kl_k2_grad,
    kl_k3 as kl_k3,
    kl_k3_grad as kl_k3_grad,
    leave_one_out_advantages as leave_one_out_advantages,
    masked_importance_weights as masked_importance_weights,
    reverse_kl_reward as reverse_kl_reward,
    sequence_importance_weights as sequence_importance_weights,
    truncated_importance_weights as truncated_importance_weights,
)
from kdloss.testing._oracles.surrogates import (
    cispo_surrogate as cispo_surrogate,
    cispo_surrogate_grad as cispo_surrogate_grad,
    clipped_surrogate as clipped_surrogate,
    clipped_surrogate_grad as clipped_surrogate_grad,
    importance_sampled_surrogate as importance_sampled_surrogate,
    importance_sampled_surrogate_grad as importance_sampled_surrogate_grad,
    sapo_surrogate as sapo_surrogate,
    sapo_surrogate_grad as sapo_surrogate_grad,
    sequence_clipped_surrogate as sequence_clipped_surrogate,
    sequence_clipped_surrogate_grad as sequence_clipped_surrogate_grad,
)
from kdloss.testing._oracles.token_signals import (
    align_responses as align_responses,
    align_responses_grad as align_responses_grad,
    forward_kl_reward as forward_kl_reward,
    gate_kd_reward as gate_kd_reward,
    informative_token_mask as informative_token_mask,
    jsd_reward as jsd_reward,
    modulate_advantages as modulate_advantages,
    prefix_weights as prefix_weights,
    squared_hellinger_reward as squared_hellinger_reward,
    stale_sequence_mask as stale_sequence_mask,
    top_entropy_mask as top_entropy_mask,
    total_variation_reward as total_variation_reward,
    trust_region_mask as trust_region_mask,
)
from kdloss.testing._oracles.topk import (
    linear_topk_forward_kl as linear_topk_forward_kl,
    linear_topk_forward_kl_grad as linear_topk_forward_kl_grad,
    linear_topk_generalized_jsd as linear_topk_generalized_jsd,
    linear_topk_generalized_jsd_grad as linear_topk_generalized_jsd_grad,
    linear_topk_reverse_kl as linear_topk_reverse_kl,
    linear_topk_reverse_kl_grad as linear_topk_reverse_kl_grad,
    topk_forward_kl as topk_forward_kl,
    topk_forward_kl_grad as topk_forward_kl_grad,
    topk_generalized_jsd as topk_generalized_jsd,
    topk_generalized_jsd_grad as topk_generalized_jsd_grad,
    topk_reverse_kl as topk_reverse_kl,
    topk_reverse_kl_grad as topk_reverse_kl_grad,
)
from kdloss.testing._oracles.topk_sampled import (
    linear_topk_sampled_reverse_kl as linear_topk_sampled_reverse_kl,
    linear_topk_sampled_reverse_kl_grad as linear_topk_sampled_reverse_kl_grad,
    topk_sampled_reverse_kl as topk_sampled_reverse_kl,
    topk_sampled_reverse_kl_grad as topk_sampled_reverse_kl_grad,
)
from kdloss.testing._oracles.types import (
    LinearGradients as LinearGradients,
    LogprobsAndEntropy as LogprobsAndEntropy,
    LossOutput as LossOutput,
    Surrogate as Surrogate,
)

__all__ = [name for name in dir() if not name.startswith("_")]  # `help` of this module lists them
