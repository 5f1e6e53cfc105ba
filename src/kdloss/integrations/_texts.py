"""Docstring texts (`_docs.py`) of the options that adapters pass to `kdloss.kdrl_loss` and to masks."""

from kdloss._losses.texts import OBJECTIVE_ARGS

# Adapters take numbers for the weights, and have the sequences from the trainer.
KDRL_ARGS = OBJECTIVE_ARGS | {
    "distill_loss_weight": """factor of the distillation term, a Python number, required. 0 skips the term.
        docs/weights.md says how to choose it.""",
    "kd_discount": """0 .. 1. Above 0, the distillation reward of a token is replaced by the discounted sum of the
        rewards from that token to the end of its sequence.""",
    "kd_baseline": """a number, taken off the distillation reward log p - log q after `kd_reward_clip`, such as minus
        the reverse KL of the step before. It must not depend on the tokens that it is taken off. Then the expected
        gradient stays, except where `kd_max_ratio` bounds the ratio. The reported value of the term holds it; the
        reverse KL does not. None: 0.""",
    "trust_region": """`max_divergence` of `kdloss.trust_region_mask` ("tv"), against the policy that sampled. The RL
        term of a token that it drops is 0. Denominators and the distillation term do not change. None: off.""",
    "stale_sequences": """`max_divergence` of `kdloss.stale_sequence_mask`, against the policy that sampled, in nats a
        token. The RL term of a token that it drops is 0. Denominators and the distillation term do not change. None:
        off.""",
}
