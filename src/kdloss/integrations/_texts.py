"""Docstring texts (`_docs.py`) of the options that adapters pass to `kdloss.kdrl_loss`."""

KDRL_ARGS = {
    "rl_loss_weight": "factor of the RL term, a Python number. 0 skips the term.",
    "distill_loss_weight": """factor of the distillation term, a Python number. 0 skips the term. The default is KDRL's,
        which was tuned for a penalty whose gradient ignores the teacher; expect to retune it.""",
    "clip_low": "the RL ratio is clipped below at 1 - clip_low, >= 0.",
    "clip_high": "the RL ratio is clipped above at 1 + clip_high, >= 0.",
    "dual_clip": "upper bound of the RL ratio for negative advantages, > 1. None: no bound.",
    "kd_discount": """0 .. 1. Above 0, the distillation reward of a token is replaced by the discounted sum of the
        rewards from that token to the end of its sequence.""",
    "kd_reward_clip": "symmetric bound of the distillation reward teacher_logp - logp, in nats, > 0. None: no bound.",
    "kd_max_ratio": "upper bound of the distillation ratio, > 0. None: no bound.",
    "direct_penalty": """True: descend logp - teacher_logp itself instead of the importance-sampled surrogate. The
        teacher is then in the value only and not in the gradient. For parity with trainers that do this; warns.""",
}
