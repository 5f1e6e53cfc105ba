"""Helpers of `on_policy_distillation.py`, one idea a file; to be read as config, task, models, rollout, loop."""
