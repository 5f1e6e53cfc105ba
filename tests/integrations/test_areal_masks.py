"""Tests AReaL's rejection against a NumPy oracle, token by token, and where in the loss its masks and weights act."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import kdloss
from kdloss.integrations import areal
from kdloss.integrations._areal_masks import reject

# "clamp" applies to ratios only, as in AReaL. The drawn metrics fall below, between and above each pair of bounds.
CONFIGS = [
    SimpleNamespace(level=level, action=action, metric=metric, agg=agg, upper=upper, lower=lower)
    for level, action, (metric, upper, lowers) in itertools.product(
        ("token", "sequence"),
        ("mask", "clamp"),
        [
            ("ratio", 1.2, (None, 0.9)),
            ("kl_k1", 0.1, (None, -0.1)),
            ("kl_k2", 0.05, (None, 0.01)),
            ("kl_k3", 0.05, (None, 0.01)),
        ],
    )
    for agg, lower in itertools.product(("sum", "mean", "max") if level == "sequence" else ("mean",), lowers)
    if action == "mask" or metric == "ratio"
]


def oracle(prox: Any, old: Any, trained: Any, lengths: list[int], config: SimpleNamespace) -> tuple[Any, Any, float]:
    """(kept, weights, fraction) by AReaL's rules, one token after another."""
    metric_of = {
        "ratio": lambda d: d,  # the logarithm of the ratio, which is what is aggregated
        "kl_k1": lambda d: d,
        "kl_k2": lambda d: d * d / 2,
        "kl_k3": lambda d: np.exp(-d) - 1 + d,
    }[config.metric]
    aggregate = {"sum": sum, "max": max, "mean": lambda x: sum(x) / len(x)}[config.agg]
    kept, weights = np.zeros(len(prox), bool), np.zeros(len(prox))
    changed, at = 0, 0
    for n in lengths:
        positions = [t for t in range(at, at + n) if trained[t]]
        at += n
        gaps = [prox[t] - old[t] for t in positions]
        for t, gap in zip(positions, gaps, strict=True):
            whole = config.level == "sequence"
            metric = aggregate([metric_of(x) for x in gaps]) if whole else metric_of(gap)
            metric = np.exp(metric) if config.metric == "ratio" else metric
            inside = metric <= config.upper and (config.lower is None or metric >= config.lower)
            weight = np.exp(sum(gaps) / len(gaps)) if whole and config.metric == "ratio" else np.exp(gap)
            bounded = weight
            if config.action == "clamp" and not inside:
                bounded = min(max(weight, config.lower or 0.0), config.upper)
            kept[t] = inside or config.action == "clamp"
            weights[t] = bounded if kept[t] else 0.0
            changed += not kept[t] or bounded != weight
    return kept, weights, changed / max(int(sum(trained)), 1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.level}-{c.action}-{c.metric}-{c.agg}-{c.lower}")
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_rejection_is_areals(config: SimpleNamespace, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    old = -rng.exponential(1.0, total)
    prox = old + 0.3 * rng.standard_normal(total)
    trained = rng.random(total) < 0.7
    kept, weights, fraction = oracle(prox, old, trained, lengths, config)
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]))
    found = reject(torch.tensor(prox), torch.tensor(old), torch.tensor(trained), config, lambda: cu_seqlens)
    np.testing.assert_array_equal(found.kept.numpy(), kept)
    np.testing.assert_allclose(found.weights.numpy(), weights, rtol=1e-12)
    assert float(found.fraction) == pytest.approx(fraction, rel=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("action", ["mask", "clamp"])
def test_rejection_weights_the_rl_term_and_leaves_the_teacher_every_trained_token(
    level: str, action: str, monkeypatch
) -> None:
    tracker = SimpleNamespace(denominator=lambda **x: None, stat=lambda **x: None, scalar=lambda **x: None)
    trainer = SimpleNamespace(
        stats_tracker=tracker,
        infer_token_denominator=lambda data, like: like,
        _log_proximal_approximation_stats=lambda **x: None,
    )
    monkeypatch.setattr(areal, "_areal", lambda: trainer)
    rng, lengths = np.random.default_rng(3), [5, 8, 4]
    old, advantages, teacher = -rng.exponential(1.0, 17), rng.standard_normal(17), -rng.exponential(1.0, 17)
    prox = old + 0.3 * rng.standard_normal(17)
    trained = np.arange(17) % 5 != 4
    # with sequences on both sides of the lower bound, too
    config = SimpleNamespace(level=level, action=action, metric="ratio", agg="mean", upper=1.05, lower=0.98)
    kept, weights, fraction = oracle(prox, old, trained, lengths, config)
    assert 0 < fraction < 1
    batch = {"logprobs": old, "prox_logp": prox, "advantages": advantages, "teacher_logp": teacher}
    batch = {name: torch.tensor(x) for name, x in batch.items()}
    batch["loss_mask"] = torch.tensor(trained).float()
    batch["cu_seqlens"] = torch.tensor([0, 5, 13, 17], dtype=torch.int32)
    logp = torch.tensor(prox + 0.1 * rng.standard_normal(17), requires_grad=True)
    loss = areal.grpo_loss_fn(
        logp, -logp.detach(), batch | {"distill_loss_weight": 0.5}, 0.2, 0.28, None, rejection_sampling=config
    )
    surrogate = kdloss.clipped_surrogate(
        logp,
        batch["prox_logp"],
        batch["advantages"],
        loss_mask=torch.tensor(kept),
        clip_high=0.28,
        weights=torch.tensor(weights),
    )
    kd = kdloss.distillation_loss(logp, batch["logprobs"], batch["teacher_logp"], loss_mask=torch.tensor(trained)).loss
    expected = surrogate.loss.sum() / trained.sum() + 0.5 * kd
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, logp)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert ((gradients[0] != 0).numpy() == trained).all()  # a rejected token has the teacher's gradient only
