"""What the NumPy oracles refuse: an oracle that takes a wrong shape by broadcasting would prove nothing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from kdloss.testing import reference

T, V = 4, 5
LOGP, MASK, CU = np.full(T, -1.0), np.ones(T, dtype=bool), np.array([0, 2, 4])
LOGITS, LABELS, IDS = np.zeros((T, V)), np.zeros(T, dtype=int), np.arange(T)
LOSS = {"logp": LOGP, "old_logp": None, "teacher_logp": LOGP, "loss_mask": MASK}
HIDDEN = {"hidden": np.zeros((T, 3)), "weight": np.zeros((V, 3)), "labels": LABELS}

REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "kl_k1",
        {"logp": LOGP, "teacher_logp": LOGP[1:], "loss_mask": MASK},
        ValueError,
        "must have shape (4,), got (3,)",
    ),
    ("kl_k1", {"logp": LOGP, "teacher_logp": LOGP, "loss_mask": MASK * 1}, TypeError, "loss_mask must be bool"),
    ("kl_k1", {"logp": LOGP, "teacher_logp": LOGP, "loss_mask": MASK[1:]}, ValueError, "loss_mask must have shape"),
    ("segment_ids", {"cu_seqlens": [0, 3, 2]}, ValueError, "cu_seqlens must rise from 0"),
    ("segment_ids", {"cu_seqlens": [0.0, 4.0]}, TypeError, "cu_seqlens must hold integers"),
    ("cu_seqlens_from_lengths", {"lengths": [2, -1]}, ValueError, "lengths must not be negative"),
    ("broadcast_to_tokens", {"x": [1.0, 2.0, 3.0], "cu_seqlens": CU}, ValueError, "x must have shape (2,)"),
    ("pack", {"padded": LOGITS, "lengths": [1, 2], "cu_seqlens": CU}, ValueError, "exactly one of lengths"),
    ("pack", {"padded": LOGITS, "lengths": [V + 1] * T}, ValueError, "lengths must be in [0, 5]"),
    ("pack", {"padded": LOGITS, "cu_seqlens": CU}, ValueError, "padded must have 2 rows"),
    ("pack", {"padded": LOGITS[:2], "cu_seqlens": CU, "total_tokens": 9}, ValueError, "total_tokens must be"),
    ("unpack", {"packed": LOGP, "cu_seqlens": CU}, ValueError, "length must be given without mask"),
    ("unpack", {"packed": LOGP[1:], "cu_seqlens": CU, "length": 2}, ValueError, "packed must have 4 tokens, got 3"),
    ("group_relative_advantages", {"rewards": [1.0, 0.0]}, ValueError, "exactly one of group_size and group_ids"),
    ("group_relative_advantages", {"rewards": [1.0, 0.0, 1.0], "group_size": 2}, ValueError, "group_size must divide"),
    ("forward_kl", {"logits": LOGITS, "teacher_logits": LOGITS[:, 1:]}, ValueError, "or pass vocab_size"),
    ("token_logprobs", {"logits": LOGITS, "labels": LABELS[1:]}, ValueError, "labels must have shape"),
    ("token_logprobs", {"logits": LOGITS, "labels": LABELS + V}, ValueError, "labels must be in [0, 5)"),
    (
        "linear_token_logprobs",
        HIDDEN | {"max_trained_tokens": 1},
        ValueError,
        "must bound the trained tokens, 4",
    ),
    ("distillation_loss", LOSS | {"kd_discount": 1.0}, ValueError, "kd_discount needs cu_seqlens"),
    (
        "distillation_loss",
        LOSS | {"kd_discount": 1.0, "kd_baseline": LOGP},
        ValueError,
        "takes no kd_baseline",
    ),
    ("distillation_loss", LOSS | {"reduction": "mean"}, ValueError, 'reduction must be "token_mean"'),
    ("distillation_loss", LOSS | {"reduction": "sequence_mean"}, ValueError, "needs cu_seqlens"),
    (
        "kdrl_loss",
        LOSS | {"advantages": LOGP, "distill_loss_weight": 1.0, "direct_penalty": True, "kd_reward_clip": 1.0},
        ValueError,
        "direct_penalty takes no kd_discount",
    ),
    (
        "sequence_importance_weights",
        {
            "prox_logp": LOGP,
            "old_logp": LOGP,
            "loss_mask": MASK,
            "cu_seqlens": CU,
            "max_weight": 2.0,
            "aggregate": "max",
            "action": "mask",
        },
        ValueError,
        'aggregate must be "sum" or "mean"',
    ),
]


@pytest.mark.parametrize(("name", "arguments", "error", "said"), REFUSED, ids=[f"{x[0]}: {x[3]}" for x in REFUSED])
def test_an_oracle_refuses(name, arguments, error, said):
    with pytest.raises(error, match=re.escape(said)):
        getattr(reference, name)(**arguments)
