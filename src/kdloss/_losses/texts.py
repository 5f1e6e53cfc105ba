"""Argument texts of the losses, for docstrings."""

from __future__ import annotations

from kdloss._packing.texts import PACKING_ARGS

LOSS_ARGS = PACKING_ARGS | {
    "logp": "(T,) or any shape: log-probs of the tokens under the student, nats. Differentiable.",
    "old_logp": """the shape of `logp`: log-probs of the same tokens under the policy that sampled them, detached. None:
        on-policy, `logp.detach()`, so that every ratio is 1.""",
    "teacher_logp": """the shape of `logp`: log-probs of the same tokens under the teacher, at the same temperature,
        detached.""",
    "advantages": """the shape of `logp`: one advantage per token, detached. `broadcast_to_tokens` makes it from one per
        sequence.""",
    "loss_mask": """bool, the shape of `logp`, True at trained tokens. Values at other tokens, NaN included, reach
        neither the result nor a gradient.""",
    "clip_low": "distance of the lower bound of the ratio below 1, >= 0.",
    "clip_high": "distance of the upper bound of the ratio above 1, >= 0; 0.28 bounds the ratio at 1.28.",
    "dual_clip": "absolute bound of the ratio at negative advantages, > 1. None: no bound.",
    "weights": """the shape of `logp`: factors of the loss per token, detached, such as `truncated_importance_weights`.
        None: 1.""",
}

REWARD_ARGS = LOSS_ARGS | {
    "logp": "(T,) or any shape: log-probs of the tokens under the student, nats. Detached.",
    "clip": "symmetric bound of the reward, > 0. None: no bound.",
    "TypeError": "a log-prob is not a floating-point tensor, or `loss_mask` is not bool.",
    "ValueError": "shapes or devices differ, or `clip` is not > 0.",
}

MASK_ARGS = LOSS_ARGS | {
    "logp": REWARD_ARGS["logp"],
    "old_logp": """the shape of `logp`: log-probs of the same tokens under the policy that sampled them, detached. None:
        on-policy.""",
    "loss_mask": """bool, the shape of the first argument, True at trained tokens. Values at other tokens, NaN included,
        have no effect, and the result is False there.""",
}

JOINING_ARGS = PACKING_ARGS | {
    "kd_reward": "(T,) or any shape: the teacher's reward per token, such as `reverse_kl_reward`, nats. Detached.",
    "loss_mask": """bool, the shape of the first argument, True at trained tokens. Values at other tokens, NaN included,
        have no effect, and the result is 0 there.""",
    "TypeError": "a per-token tensor is not floating-point, or `loss_mask` is not bool.",
    "ValueError": "shapes or devices differ.",
}

OBJECTIVE_ARGS = LOSS_ARGS | {
    "prox_logp": """the shape of `logp`: log-probs under the policy at the start of this update (decoupled PPO),
        detached. The RL ratio is exp(logp - prox_logp). None: `old_logp`. Correct for the gap between the two with
        `weights`.""",
    "kd_mask": """bool, the shape of `logp`, True where the distillation reward applies. Elsewhere the reward and its
        part of `reverse_kl` are 0, whatever the value of `teacher_logp`; denominators do not change. None:
        everywhere.""",
    "kd_discount": """0 .. 1. Above 0 the reward is replaced by its `discounted_returns`, which needs `cu_seqlens`. Far
        from the teacher 1 leads to empty answers, which cost less than long ones; `check_batch` sees it.""",
    "kd_reward_clip": "symmetric bound of the reward in nats, > 0. None: no bound.",
    "kd_max_ratio": """bound of the distillation ratio, > 0: the loss becomes -sg(min(ratio_t, kd_max_ratio) * R_t) *
        logp_t, so that every token keeps a gradient. None: no bound.""",
    "kd_baseline": """the shape of `logp`, detached: taken off the reward after `kd_reward_clip`; 0 where `kd_mask` is
        False. It must depend on the prefix alone. Then the expected gradient stays, except where `kd_max_ratio` bounds
        the ratio, and a good baseline lowers its variance. `kd` holds it, `reverse_kl` does not. Not with a discount.
        None: 0.""",
    "reduction": """"token_mean" divides the sum over trained tokens by `normalizer`; "sequence_mean" divides the sum
        over sequences of their token means.""",
    "normalizer": """the denominator, a number or a 0-dim tensor, detached: tokens for "token_mean", sequences for
        "sequence_mean". None: the trained tokens, or the sequences that have one, of this call or of `group`.""",
    "rl_loss_weight": "Python number. 0 skips the RL term: pure distillation.",
    "distill_loss_weight": """Python number (0 skips the distillation term), or a detached tensor, 0-dim or the shape of
        `logp` (several teachers). Required; docs/weights.md says how to choose it. A value that was tuned for a penalty
        whose gradient ignores the teacher, such as 0.005, is too small here.""",
    "direct_penalty": """True: descend logp - teacher_logp itself instead of the surrogate, at every RL weight. The
        teacher is then in the value only and not in the gradient. For parity with trainers that do this; warns.""",
    "group": PACKING_ARGS["group"]
    + """ `loss` and the scalars beside it are this rank's shares: the shares of all ranks sum to the value of the whole
        sequences.""",
}

WEIGHT_ARGS = {
    "prox_logp": """(T,) or any shape: log-probs of the tokens under the policy at the start of the update, nats.""",
    "old_logp": "the shape of `prox_logp`: log-probs of the same tokens under the policy that sampled them, nats.",
    "loss_mask": """bool, the shape of `prox_logp`, True at trained tokens. At other tokens the policies count as equal
        (ratio 1), whatever the values.""",
}
