"""Measures kdloss beside its peers: parity first, then time, share of the ceiling and memory."""
