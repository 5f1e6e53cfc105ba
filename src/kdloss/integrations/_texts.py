"""Docstring texts (`_docs.py`) of the options that adapters pass to `kdloss.kdrl_loss`."""

from kdloss._losses.texts import OBJECTIVE_ARGS

# Adapters take numbers for the weights, and have the sequences from the trainer.
KDRL_ARGS = OBJECTIVE_ARGS | {
    "distill_loss_weight": """factor of the distillation term, a Python number, required. 0 skips the term.
        docs/weights.md says how to choose it.""",
    "kd_discount": """0 .. 1. Above 0, the distillation reward of a token is replaced by the discounted sum of the
        rewards from that token to the end of its sequence.""",
}
