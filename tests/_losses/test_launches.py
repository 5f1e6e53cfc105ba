"""Holds how many kernels the functions of per-token tensors launch eagerly on a GPU, and that none waits for it.

Counted on meta tensors, forward and backward: see `launches.py`. The bounds are what was measured, so one launch more
fails. A launch takes the host a few microseconds, however many tokens there are.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from cases import TABLE, T
from contract import call, expected_warnings, fields, has_gradient, public_function
from launches import Launches

TOKENS = 32768  # `discounted_returns` scans these in 15 rounds of two launches
BOUNDS = {
    "kdrl_loss": {
        "base": 48,
        "on_policy": 48,
        "sequence_mean": 80,
        "kd_discount": 106,
        "kd_discount with a mask": 108,
        "kd_discount is 1": 138,
        "normalizer is a number": 46,
        "normalizer is an integer tensor": 61,
        "normalizer is a float tensor": 60,
        "prox_logp": 49,
        "dual_clip": 51,
        "weights": 53,
        "kd_mask": 49,
        "kd_reward_clip": 49,
        "kd_max_ratio": 51,
        "distill_loss_weight is a tensor": 56,
        "no RL": 23,
        "no distillation": 30,
        "direct_penalty": 42,
        "all at once": 63,
    },
    "kdrl_token_loss": {
        "base": 38,
        "prox_logp": 39,
        "dual_clip": 41,
        "weights": 43,
        "distill_loss_weight is a tensor": 44,
        "all at once": 53,
    },
    "distillation_loss": {
        "base": 23,
        "sequence_mean": 50,
        "kd_discount": 81,
        "normalizer is a float tensor": 32,
        "kd_mask": 24,
        "kd_max_ratio": 26,
    },
    "grpo_loss": {
        "base": 30,
        "sequence_mean": 55,
        "normalizer is a float tensor": 38,
        "prox_logp": 31,
        "dual_clip": 33,
        "weights": 35,
    },
    "sft_loss": {"base": 15, "normalizer is a float tensor": 23},
    "importance_sampled_surrogate": {"base": 16, "weights": 20, "max_ratio": 23},
    "clipped_surrogate": {"base": 24, "weights": 28, "dual_clip": 31},
    "sequence_clipped_surrogate": {"base": 62, "weights": 66},
    "cispo_surrogate": {"base": 20, "clip_low": 20},
    "sapo_surrogate": {"base": 31},
    "diagnostics": {"base": 29, "teacher_logp": 38, "entropy": 38},
    "group_relative_advantages": {"base": 20, "ids": 39, "unscaled": 29},
    "leave_one_out_advantages": {"base": 15, "ids": 31},
    "fold_kd_reward": {"base": 3, "weight_tensor": 6},
    "kl_k1": {"base": 6},
    "kl_k2": {"base": 12},
    "kl_k3": {"base": 13},
    "reverse_kl_reward": {"base": 3, "clip": 4},
    "forward_kl_reward": {"base": 4, "clip": 5},
    "jsd_reward": {"base": 16},
    "squared_hellinger_reward": {"base": 6},
    "total_variation_reward": {"base": 5},
    "discounted_returns": {"base": 58, "none": 10},
    "truncated_importance_weights": {"base": 5},
    "masked_importance_weights": {"base": 9},
    "sequence_importance_weights": {"base": 25, "mean": 33, "mask": 29},
    "trust_region_mask": {"base": 18, "kl": 33},
    "stale_sequence_mask": {"base": 38},
    "top_entropy_mask": {"base": 130},
    "informative_token_mask": {"base": 284},
    "gate_kd_reward": {"base": 10},
    "modulate_advantages": {"base": 13},
    "prefix_weights": {"base": 89},
    "align_responses": {"base": 54},
    "token_mean": {"base": 10, "normalizer is a number": 8, "normalizer is a float tensor": 18},
    "sequence_mean": {"base": 35, "normalizer is a float tensor": 43},
    "global_token_count": {"base": 1},
    "global_sequence_count": {"base": 22},
    "segment_ids": {"base": 10},
    "segment_sum": {"base": 26},
    "segment_mean": {"base": 35},
    "broadcast_to_tokens": {"base": 24},
    "cu_seqlens_from_lengths": {"base": 3},
    "next_token_labels": {"base": 17},
    "response_mask": {"base": 19},
    "to_prediction_positions": {"base": 31},
    "to_token_positions": {"base": 30},
    "pack": {"base": 36, "left": 20},
    "unpack": {"base": 36, "left": 23},
}


def on_device(x: object) -> object:
    """A tensor of the shape that `x` has in a stream of `TOKENS` tokens, in float32 if it is floating."""
    if not isinstance(x, Tensor):
        return x
    shape = [TOKENS if size == T else size for size in x.shape]
    return torch.empty(shape, dtype=torch.float32 if x.dtype == torch.float64 else x.dtype, device="meta")


def launches(name: str, variant: str) -> Launches:
    """Of a call of `cases.py`, forward and backward."""
    entry = TABLE[name]
    arguments = {key: on_device(x) for key, x in entry.variants[variant].items()}
    if "total_tokens" in arguments:
        arguments["total_tokens"] = TOKENS
    differentiable = has_gradient(entry, arguments)
    for key in entry.differentiable if differentiable else ():
        arguments[key].requires_grad_()
    with expected_warnings(arguments), Launches() as counted:
        found = fields(call(public_function(name), arguments))
        if differentiable:
            result = found[entry.attached[0]]
            result.backward(torch.empty_like(result))
    return counted


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name, row in BOUNDS.items() for variant in row])
def test_launches(name: str, variant: str) -> None:
    counted = launches(name, variant)
    assert not counted.syncs
    assert counted.total == BOUNDS[name][variant], counted.counts


def test_every_function_of_per_token_tensors_has_bounds() -> None:
    """Not those of logits and hidden states, whose time is in the vocabulary, and not those that return no tensors."""
    wide = {name for name in TABLE if {"logits", "hidden"} & {*inspect.signature(public_function(name)).parameters}}
    assert {*BOUNDS} == {name for name, entry in TABLE.items() if entry.gradient != "number"} - wide


def test_an_operator_of_the_library_counts_as_what_it_launches() -> None:
    scanned = launches("discounted_returns", "base")
    assert scanned.counts["addcmul"] == 15
    assert scanned.total - launches("discounted_returns", "none").total > 2 * 15


def test_what_waits_for_the_device_is_found() -> None:
    with Launches() as counted:
        if torch.ones(3).sum() > 2:
            torch.ones(3)[torch.tensor([True, False, True])]
    assert set(counted.syncs) == {"_local_scalar_dense", "index"}
