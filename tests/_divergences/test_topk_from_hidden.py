"""Top-k divergences from hidden states: those of the logits that they stand for, chunk by chunk, with a small rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss._divergences import topk_hidden_op
from kdloss._logprobs import from_hidden

T, V, D, K = 40, 23, 6, 4
FORMS: dict[str, dict[str, float]] = {"forward_kl": {}, "reverse_kl": {}, "generalized_jsd": {"beta": 0.3}}
TAILS = ("bucket", "renormalize", "truncate", "generalized")
EVERY = [(name, tail) for name in FORMS for tail in TAILS if (name, tail) != ("generalized_jsd", "generalized")]
MASK = torch.arange(T) % 5 != 2


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def teacher() -> tuple[Tensor, Tensor]:
    """Log-probs and ids; one trained row is padding alone, and garbage is where nothing is read."""
    logp = (2 * normal(T, V, seed=7)).log_softmax(-1)
    ids = torch.rand(T, V, generator=torch.Generator().manual_seed(8)).argsort(-1)[:, :K]
    kept = logp.gather(-1, ids)
    ids[1, 2:], ids[3] = -1, -1
    return torch.where((ids >= 0) & MASK[:, None], kept, math.nan), ids


@pytest.mark.parametrize(("name", "tail"), EVERY)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0, "logit_scale": -1.3, "temperature": torch.linspace(0.5, 2, T)}]
)
@pytest.mark.parametrize("kept_bytes", [0, 1 << 20], ids=["computed again", "kept"])
def test_they_are_those_of_the_logits(name, tail, options, kept_bytes, monkeypatch):
    """Values and all three gradients, in tiles of 16 rows and 5 columns, with two rows of padding in the head."""
    for part, size in {"_TILE_ENTRIES": 0, "_TILE_ROWS": 16, "_TILE_COLUMNS": 5}.items():
        monkeypatch.setattr(topk_hidden_op, part, size)
    monkeypatch.setattr(from_hidden, "KEPT_BYTES", kept_bytes)
    hidden, weight, bias = normal(T, D), normal(V + 2, D, seed=1), normal(V + 2, seed=2)
    upstream = normal(T, seed=3) * (torch.arange(T) % 3 != 0)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    given: dict[str, Any] = {"tail": tail, **FORMS[name]}

    x = options.get("logit_scale", 1.0) * (hidden.nan_to_num() @ weight[:V].T + bias[:V])
    logits = x if "softcap" not in options else 2.0 * torch.tanh(x / 2.0)
    logp, ids = teacher()
    of_logits = getattr(kdloss, f"topk_{name}")
    temperature = options.get("temperature", 1.0)
    exact = of_logits(logits, logp, ids.masked_fill(~MASK[:, None], -1), temperature=temperature, **given)
    expected = torch.autograd.grad(exact, leaves, upstream)

    spoiled = torch.where(MASK[:, None], hidden, math.nan).detach().requires_grad_()
    function = getattr(kdloss, f"linear_topk_{name}")
    found = function(spoiled, weight, logp, ids, loss_mask=MASK, bias=bias, vocab_size=V, **options, **given)
    gradients = torch.autograd.grad(found, [spoiled, weight, bias], upstream)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-13)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_a_small_rest_keeps_its_digits(name):
    """A student's rest of 1e-9, of which 1 minus the kept mass holds nothing in float32."""
    weight = torch.cat([torch.zeros(K, D), torch.full((V - K, D), -24.0 / D)])  # the kept ids are the first K
    hidden, ids = torch.ones(3, D) * torch.tensor([[1.0], [0.9], [0.8]]), torch.arange(K).expand(3, K)
    logp = torch.full((3, K), math.log(0.2475))

    def outcome(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        mask = torch.ones(3, dtype=torch.bool)
        options: dict[str, Any] = {"loss_mask": mask, "tail": "bucket", **FORMS[name]}
        value = getattr(kdloss, f"linear_topk_{name}")(leaf, weight.to(dtype), logp.to(dtype), ids, **options)
        return value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()

    for found, exact in zip(outcome(torch.float32), outcome(torch.float64), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_no_trained_token_is_a_gradient_of_zero():
    hidden, weight = normal(T, D).fill_(math.nan).requires_grad_(), normal(V, D, seed=1).requires_grad_()
    logp, ids = teacher()
    nothing = torch.zeros(T, dtype=torch.bool)
    value = kdloss.linear_topk_forward_kl(hidden, weight, logp, ids, loss_mask=nothing, tail="bucket")
    assert value.eq(0).all()
    assert all(x.eq(0).all() for x in torch.autograd.grad(value.sum(), [hidden, weight]))
