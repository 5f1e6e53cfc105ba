"""Adapters for the trainers that people run, one file a trainer: `from kdloss.integrations.trl import KDRLTrainer`.

An adapter brings layout, alignment, mask, denominator and metric names of its trainer to the losses of `kdloss`, and
holds no loss of its own. It is imported by name, and its trainer is imported when the adapter is used.
"""
