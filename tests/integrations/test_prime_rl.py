"""Tests the prime-rl adapter against prime-rl 0.8.0: one sequence per call, own positions, a sum, its weights.

Its `compute_loss` computed the values in tests/data/prime-rl-0.8.0.json. rtol 1e-12: the same few float64 operations.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss.integrations import prime_rl
from trainer_values import cases, close

OPEN = {"clip_low": 1.0, "clip_high": 1e9}  # the stored cases have no trust region


@pytest.fixture(autouse=True)
def trainer(monkeypatch) -> None:
    module = SimpleNamespace(LossOutputs=lambda *, loss, metrics: SimpleNamespace(loss=loss, metrics=metrics))
    monkeypatch.setattr(prime_rl, "_prime_rl", lambda: module)


def inputs(*, length: int = 9, prompt: int = 3, seed: int = 0, **changed: Any) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def logp() -> Tensor:
        return -torch.rand(length, generator=generator, dtype=torch.float64) * 3

    fields = {
        "trainer_logprobs": logp().requires_grad_(),
        "inference_logprobs": logp(),
        "ref_logprobs": logp(),
        "advantages": torch.randn(length, generator=generator, dtype=torch.float64),
        "loss_mask": torch.arange(length) >= prompt,
        "loss_weights": None,
    }
    return SimpleNamespace(**{**fields, **changed})


@pytest.mark.parametrize("case", cases("prime-rl-0.8.0"))
def test_prime_rls_own_compute_loss(case: dict[str, Any]) -> None:
    given = {name: [torch.tensor(x, dtype=torch.float64) for x in rows] for name, rows in case["inputs"].items()}
    loss, gradients = torch.zeros((), dtype=torch.float64), []
    for i, mask in enumerate(case["inputs"]["loss_mask"]):
        logp, loss_mask, weights = given["trainer"][i].requires_grad_(), torch.tensor(mask), given["weights"][i]
        sample = SimpleNamespace(
            trainer_logprobs=logp,
            inference_logprobs=given["inference"][i],
            ref_logprobs=given["ref"][i],
            advantages=given["advantages"][i],
            loss_mask=loss_mask,
            loss_weights=weights,
        )
        terms = {"rl_loss_weight": float(case["rl"]), "distill_loss_weight": float(case["ref_kl"])}
        part = prime_rl.kdrl_loss(sample, **terms, **OPEN).loss
        if case["ref_kl"]:  # prime-rl's penalty on the drift from the sampling policy, which can't be turned off
            drift = kdloss.kl_k1(logp, given["inference"][i], loss_mask=loss_mask).square()
            part = part + 1e-3 * (weights * drift).sum()
        part = part / case["scale"]
        gradients.append(torch.autograd.grad(part, logp)[0])
        loss = loss + part.detach()
    close(loss, case["loss"], rtol=1e-12)
    for gradient, expected in zip(gradients, case["gradient"], strict=True):
        close(gradient, expected, rtol=1e-12)


def test_sums_over_sequences_are_the_batch() -> None:
    """The trainer sums the losses and divides by its global count, which gives `kdrl_loss` of the packed stream."""
    samples = [inputs(length=n, prompt=p, seed=n) for n, p in [(9, 3), (5, 1), (7, 6)]]
    mask = torch.cat([x.loss_mask for x in samples])
    outputs = [prime_rl.kdrl_loss(x, distill_loss_weight=0.3, dual_clip=3.0, kd_discount=0.9) for x in samples]
    total = sum(x.loss for x in outputs) / mask.sum()
    whole = kdloss.kdrl_loss(
        torch.cat([x.trainer_logprobs for x in samples]),
        torch.cat([x.inference_logprobs for x in samples]),
        torch.cat([x.ref_logprobs for x in samples]),
        torch.cat([x.advantages for x in samples]),
        loss_mask=mask,
        distill_loss_weight=0.3,
        dual_clip=3.0,
        kd_discount=0.9,
        cu_seqlens=torch.tensor([0, 9, 14, 21]),
    )
    torch.testing.assert_close(total, whole.loss)
    logps = [x.trainer_logprobs for x in samples]
    for mine, theirs in zip(torch.autograd.grad(total, logps), torch.autograd.grad(whole.loss, logps), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_masks_take_tokens_out_of_the_rl_term_and_out_of_no_denominator() -> None:
    loss_weights = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    sample = inputs(loss_weights=loss_weights, advantages=torch.linspace(-2, 1, 9, dtype=torch.float64))
    streams = sample.trainer_logprobs, sample.inference_logprobs, sample.advantages
    options = {"loss_mask": sample.loss_mask}
    near = kdloss.trust_region_mask(*streams, max_divergence=0.1, **options)
    kept = near & kdloss.stale_sequence_mask(*streams, max_divergence=0, cu_seqlens=torch.tensor([0, 9]), **options)
    assert 0 < kept.sum() < near.sum() < sample.loss_mask.sum()
    for rl in (0.7, 0.0):
        masked = {"trust_region": 0.1, "stale_sequences": 0.0, "kd_baseline": -0.4}
        out = prime_rl.kdrl_loss(sample, rl_loss_weight=rl, distill_loss_weight=0.3, **masked)
        expected = kdloss.kdrl_loss(
            streams[0],
            streams[1],
            sample.ref_logprobs,
            streams[2],
            rl_loss_weight=rl,
            distill_loss_weight=0.3 * loss_weights,
            weights=loss_weights * kept,
            kd_baseline=torch.full((9,), -0.4, dtype=torch.float64),
            normalizer=1.0,
            **options,
        )
        torch.testing.assert_close(out.loss, expected.loss)
        mine, theirs = (torch.autograd.grad(x.loss, streams[0])[0] for x in (out, expected))
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(out.metrics["kdrl/reverse_kl"], expected.reverse_kl / sample.loss_mask.sum())
    with pytest.raises(ValueError, match="kd_baseline"):
        prime_rl.kdrl_loss(sample, distill_loss_weight=0.3, kd_baseline=-0.4, kd_discount=0.9)
    sample.advantages = None
    assert prime_rl.kdrl_loss(sample, rl_loss_weight=0.0, distill_loss_weight=0.3, trust_region=0.1).loss.isfinite()


def test_metrics_are_means_over_the_trained_tokens() -> None:
    sample = inputs()
    output = prime_rl.kdrl_loss(sample, distill_loss_weight=0.5)
    trained = sample.loss_mask
    reverse_kl = (sample.trainer_logprobs.detach() - sample.ref_logprobs)[trained].mean()
    ratio = (sample.trainer_logprobs.detach() - sample.inference_logprobs)[trained].exp()
    assert output.metrics.keys() == {f"kdrl/{x}" for x in ("reverse_kl", "kd", "rl", "ratio", "clipped")}
    torch.testing.assert_close(output.metrics["kdrl/reverse_kl"], reverse_kl)
    torch.testing.assert_close(output.metrics["kdrl/ratio"], ratio.mean())
    joined = output.metrics["kdrl/rl"] + 0.5 * output.metrics["kdrl/kd"]
    torch.testing.assert_close(joined * trained.sum(), output.loss.detach())
    assert all(x.ndim == 0 and not x.requires_grad for x in output.metrics.values())


def test_a_weight_of_zero_takes_the_token_out() -> None:
    weights = torch.ones(9, dtype=torch.float64).index_fill(0, torch.tensor([4]), 0)
    sample = inputs(loss_weights=weights)
    without = inputs(loss_mask=sample.loss_mask & (weights != 0))
    a, b = (prime_rl.kdrl_loss(x, distill_loss_weight=0.5).loss for x in (sample, without))
    torch.testing.assert_close(a, b)


def test_a_sample_that_no_teacher_scored_is_refused() -> None:
    sample = inputs(ref_logprobs=None)
    with pytest.raises(ValueError, match=r"no ref_logprobs.*assign_reference_logprobs.*set distill_loss_weight to 0"):
        prime_rl.kdrl_loss(sample, distill_loss_weight=0.005)
    out = prime_rl.kdrl_loss(sample, distill_loss_weight=0.0)
    assert out.loss.isfinite()
    empty = inputs(loss_mask=torch.zeros(9, dtype=torch.bool))
    gradient = torch.autograd.grad(prime_rl.kdrl_loss(empty, distill_loss_weight=0.005).loss, empty.trainer_logprobs)[0]
    assert (gradient == 0).all()


def test_without_prime_rl_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ImportError, match=r"prime-rl>=0\.8,<0\.9"):
        prime_rl.kdrl_loss(inputs(), distill_loss_weight=0.005)


def test_zeros_are_no_teacher() -> None:
    """prime-rl's packer writes zeros for a sample without a teacher next to one that has a teacher."""
    sample = inputs(ref_logprobs=torch.zeros(9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"0 at every trained token.*no teacher scored where it is packed"):
        prime_rl.kdrl_loss(sample, distill_loss_weight=0.005)
    sure = inputs(ref_logprobs=sample.ref_logprobs, inference_logprobs=torch.full((9,), -1e-5, dtype=torch.float64))
    # a forced answer: such a teacher is 0 up to rounding
    assert prime_rl.kdrl_loss(sure, distill_loss_weight=0.005).loss.isfinite()
    assert prime_rl.kdrl_loss(sample, distill_loss_weight=0.0).loss.isfinite()
