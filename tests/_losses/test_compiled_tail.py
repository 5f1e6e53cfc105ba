"""Holds `kdrl_token_loss` with its reduction, compiled: one pass over the tokens forward, and one backward.

So they need no kernel of their own. The test counts what Inductor generates: loops on a CPU, kernels on a GPU, where a
sum over many tokens takes a second one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code

import kdloss
from triton_harness import DEVICE, normal

TOKENS = 4096
MASK = (torch.arange(TOKENS) % 3 != 0).to(DEVICE)


def by_hand(logp: Tensor, *others: Tensor, **options: Any) -> Tensor:
    loss = kdloss.kdrl_token_loss(logp, *others, loss_mask=MASK, distill_loss_weight=0.005, **options)
    return kdloss.token_mean(loss, loss_mask=MASK)


def whole(logp: Tensor, *others: Tensor, **options: Any) -> Tensor:
    return kdloss.kdrl_loss(logp, *others, loss_mask=MASK, distill_loss_weight=0.005, **options).loss


# every option that adds a term, so there is most to fuse
OPTIONS = {"dual_clip": 3.0, "kd_reward_clip": 2.0, "kd_max_ratio": 5.0}


@pytest.mark.parametrize(("loss", "options"), [(by_hand, OPTIONS), (whole, {})], ids=["token loss", "kdrl_loss"])
def test_forward_and_backward_are_a_kernel_each(loss: Callable[..., Tensor], options: dict[str, float]):
    others = [normal(TOKENS, seed=seed) - 2 for seed in (1, 2, 3)]
    leaf = (normal(TOKENS) - 2).requires_grad_()
    torch._dynamo.reset()
    total, codes = run_fw_bw_and_get_code(lambda: torch.compile(loss, fullgraph=True)(leaf, *others, **options))
    assert len(codes) == 2
    made = [len(re.findall(r"= async_compile\.(?:triton|cpp_pybinding)\(", code)) for code in codes]
    assert 0 not in made
    assert max(made) <= (2 if DEVICE == "cuda" else 1)
    plain = leaf.detach().clone().requires_grad_()
    expected = loss(plain, *others, **options)
    torch.testing.assert_close(total.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(expected, plain)[0], rtol=1e-5, atol=1e-8)
