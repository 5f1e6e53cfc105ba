"""Rows whose e^z is summed without their maximum taken off, beside rows where that would overflow or vanish."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdloss

V = 257  # prime
# per row: where e^z is safe, near both ends of that, beyond them, and far off
OFFSETS = torch.tensor([0.0, 3.0, -30.0, 50.0, 61.0, -17.0, 90.0, -110.0, 1000.0, -1000.0])
N = len(OFFSETS)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_holes(logits: Tensor) -> Tensor:
    """-inf in the first columns of every other row, and in all columns but two of the last row."""
    logits[::2, :3] = -math.inf
    logits[-1, 2:] = -math.inf
    return logits


LABELS = torch.arange(N)[:, None] * 20 + 3  # never at -inf, except in the last row
LABELS[-1] = 1
IDS = torch.rand(N, V, generator=torch.Generator().manual_seed(5)).topk(4).indices
TEACHER_LOGP = random(N, 6, seed=3).log_softmax(-1)[:, :4]


def logp_and_entropy(logits: Tensor, rows: slice) -> Tensor:
    out = kdloss.token_logprobs_and_entropy(logits, LABELS[rows])
    return out.logp.sum(-1) + 0.5 * out.entropy


def logp(logits: Tensor, rows: slice) -> Tensor:
    return kdloss.token_logprobs(logits, LABELS[rows]).sum(-1)


def of_teacher(divergence: Callable[..., Tensor], **options: float) -> Callable[[Tensor, slice], Tensor]:
    teacher = random(N, V, seed=2) * 2 + OFFSETS.flip(0)[:, None]

    def evaluate(logits: Tensor, rows: slice) -> Tensor:
        return divergence(logits, teacher[rows].to(logits.dtype), **options)

    return evaluate


def topk(divergence: Callable[..., Tensor]) -> Callable[[Tensor, slice], Tensor]:
    return lambda logits, rows: divergence(logits, TEACHER_LOGP[rows].to(logits.dtype), IDS[rows], tail="bucket")


FUNCTIONS: dict[str, Callable[[Tensor, slice], Tensor]] = {
    "logp": logp,
    "logp and entropy": logp_and_entropy,
    "forward_kl": of_teacher(kdloss.forward_kl),
    "reverse_kl": of_teacher(kdloss.reverse_kl),
    "generalized_jsd": of_teacher(kdloss.generalized_jsd, beta=0.3),
    "total_variation": of_teacher(kdloss.total_variation),
    "skewed_forward_kl": of_teacher(kdloss.skewed_forward_kl, alpha=0.1),
    "skewed_reverse_kl": of_teacher(kdloss.skewed_reverse_kl, alpha=0.1),
    "topk_forward_kl": topk(kdloss.topk_forward_kl),
    "topk_reverse_kl": topk(kdloss.topk_reverse_kl),
}
HOLES = [name for name in FUNCTIONS if name != "forward_kl" and not name.startswith("topk")]  # +inf, or nothing kept


def outcome(name: str, logits: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(values, gradient of each value)."""
    leaf = logits[rows].clone().requires_grad_()
    value = FUNCTIONS[name](leaf, rows)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def logits_of(dtype: torch.dtype, *, holes: bool) -> Tensor:
    logits = random(N, V, seed=1) * 2 + OFFSETS[:, None]
    return (with_holes(logits) if holes else logits).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_does_not_depend_on_the_rows_beside_it(name, dtype):
    """Bit by bit, values and gradients, whatever path its neighbours take."""
    logits = logits_of(dtype, holes=name in HOLES)
    values, gradients = outcome(name, logits)
    for t in range(N):
        value, gradient = outcome(name, logits, slice(t, t + 1))
        torch.testing.assert_close(value, values[t : t + 1], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradient, gradients[t : t + 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_offset_against_float64(name):
    """float32, where the two sides have offsets that differ by up to 2000: a few roundings of what is summed.

    Differences of logits are rounded at the difference of the offsets, and the rest of a top-k at its own offset.
    """
    logits = logits_of(torch.float32, holes=name in HOLES)
    values, gradients = outcome(name, logits)
    exact_values, exact_gradients = outcome(name, logits.double())
    if name.startswith("topk"):
        rounded = OFFSETS.abs()
    else:
        rounded = torch.zeros(N) if name.startswith("logp") else (OFFSETS - OFFSETS.flip(0)).abs()
    size = torch.finfo(torch.float32).eps * (8 + exact_values.abs() + rounded)
    assert ((values.double() - exact_values).abs() <= size).all()
    assert ((gradients.double() - exact_gradients).abs() <= size[:, None]).all()
