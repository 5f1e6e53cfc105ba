"""Adapters for common trainers, one file per trainer: `from kdloss.integrations.trl import KDRLTrainer`.

An adapter translates its trainer's layout, alignment, mask, denominator and metric names for the losses of `kdloss`; it
contains no loss of its own. Import adapters by name. The trainer itself is imported when the adapter is first used.
`transformers` checks a model instead: `check_packed`.
"""
