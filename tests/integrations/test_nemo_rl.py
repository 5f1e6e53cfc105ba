"""Tests the NeMo-RL adapter against NeMo-RL 0.7.0: log-probs shifted against the data, sums over global counts.

Its `ClippedPGLossFn` computed the values in tests/data/nemo-rl-0.7.0.json. rtol 1e-7: its means add 1e-8 to the
denominator.
"""

from __future__ import annotations

import importlib
import pickle
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss.integrations import nemo_rl
from kdloss.integrations.nemo_rl import KDRLLossFn
from reader import blocks
from trainer_values import cases, close

INTERFACES = SimpleNamespace(
    LossType=Enum("LossType", ["TOKEN_LEVEL", "SEQUENCE_LEVEL"]),
    LossInputType=Enum("LossInputType", ["LOGIT", "LOGPROB"]),
    MetricNormalizer=Enum("MetricNormalizer", ["TOKENS", "SEQUENCES", "NONE"]),
)


@pytest.fixture(autouse=True)
def trainer(monkeypatch) -> None:
    monkeypatch.setattr(nemo_rl, "_require", lambda module: INTERFACES)


def batch(*, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Own positions: entry s of the data belongs to token s, entry s of the passed log-probs to token s + 1."""
    generator = torch.Generator().manual_seed(seed)

    def logp(*shape: int) -> Tensor:
        return -torch.rand(*shape, generator=generator, dtype=torch.float64) * 2

    data = {
        "prev_logprobs": logp(3, 6),
        "generation_logprobs": logp(3, 6),
        "teacher_logprobs": logp(3, 6),
        "advantages": torch.randn(3, 6, generator=generator, dtype=torch.float64),
        "token_mask": ((torch.arange(6) >= 2) & (torch.arange(6) < torch.tensor([6, 4, 5])[:, None])).float(),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
    }
    return logp(3, 5).requires_grad_(), data


COUNTS = {"global_valid_seqs": torch.tensor(4.0), "global_valid_toks": torch.tensor(12.0)}


@pytest.mark.parametrize("case", cases("nemo-rl-0.7.0"))
def test_nemo_rls_own_clipped_loss(case: dict[str, Any]) -> None:
    config = {"reference_policy_kl_penalty": 0.0, **case["settings"]}
    logp = torch.tensor(case["logprobs"], dtype=torch.float64, requires_grad=True)
    data = {name: torch.tensor(x, dtype=torch.float64) for name, x in case["data"].items()}
    counts = {name: torch.tensor(x, dtype=torch.float64) for name, x in case["counts"].items()}
    loss_fn = KDRLLossFn.from_config(config, distill_loss_weight=0.0)
    loss, metrics = loss_fn(next_token_logprobs=logp, data=data, **counts)
    close(loss, case["loss"], rtol=1e-7)
    close(torch.autograd.grad(loss, logp)[0], case["gradient"], rtol=1e-7)
    assert {"token_mult_prob_error", "gen_kl_error"} <= metrics.keys()  # its loops print these for every loss
    for name in metrics.keys() & case["metrics"].keys():
        # theirs is computed after the bound
        if name != "sampling_importance_ratio" or loss_fn.max_importance_weight is None:
            assert metrics[name] == pytest.approx(case["metrics"][name], rel=1e-6), name


@pytest.mark.parametrize("by_token", [True, False])
def test_the_teacher_joins(by_token: bool) -> None:
    logp, data = batch()
    options = {"rl_loss_weight": 0.6, "distill_loss_weight": 0.3, "kd_max_ratio": 1.2, "dual_clip": 3.0}
    loss, metrics = KDRLLossFn(token_level_loss=by_token, **options)(logp, data, **COUNTS)
    # row by row, trained tokens only: tokens 2 .. of the first two rows, at the position before each
    rows = [(0, slice(2, 6)), (1, slice(2, 4))]
    own = {name: torch.cat([x[row, s] for row, s in rows]) for name, x in data.items() if x.ndim > 1}
    mine = torch.cat([logp[row, slice(s.start - 1, s.stop - 1)] for row, s in rows])
    expected = kdloss.kdrl_loss(
        mine,
        own["generation_logprobs"],
        own["teacher_logprobs"],
        own["advantages"],
        loss_mask=torch.ones(6, dtype=torch.bool),
        prox_logp=own["prev_logprobs"],
        reduction="token_mean" if by_token else "sequence_mean",
        cu_seqlens=torch.tensor([0, 4, 6]),
        normalizer=12.0 if by_token else 4.0,
        **options,
    )
    torch.testing.assert_close(loss, expected.loss)
    gradients = [torch.autograd.grad(x, logp)[0] for x in (loss, expected.loss)]
    torch.testing.assert_close(*gradients)
    assert metrics["reverse_kl"] == pytest.approx(float(expected.reverse_kl))
    assert metrics["num_valid_samples"] == 2


@pytest.mark.parametrize("by_token", [True, False])
def test_masks_take_tokens_out_of_the_rl_term_and_out_of_no_denominator(by_token: bool) -> None:
    logp, data = batch()
    data["advantages"] = data["advantages"] - 0.5
    options = {"rl_loss_weight": 0.6, "distill_loss_weight": 0.3, "token_level_loss": by_token}
    masked = {"trust_region": 0.1, "stale_sequences": 0.0, "kd_baseline": -0.4, "max_importance_weight": 2.0}
    loss, metrics = KDRLLossFn(**options, **masked)(logp, data, **COUNTS)
    mask = (data["token_mask"] * data["sample_mask"][:, None])[:, 1:].bool().flatten()
    names = ("prev_logprobs", "generation_logprobs", "teacher_logprobs", "advantages")
    prox_logp, old_logp, teacher_logp, advantages = (data[name][:, 1:].flatten() for name in names)
    streams, rows = (logp.flatten(), old_logp, advantages), torch.tensor([0, 5, 10, 15])
    near = kdloss.trust_region_mask(*streams, loss_mask=mask, max_divergence=0.1)
    kept = near & kdloss.stale_sequence_mask(*streams, loss_mask=mask, cu_seqlens=rows, max_divergence=0)
    assert 0 < kept.sum() < near.sum() < mask.sum()
    weights = kdloss.truncated_importance_weights(prox_logp, old_logp, loss_mask=mask, max_weight=2.0)
    expected = kdloss.kdrl_loss(
        logp.flatten(),
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=mask,
        rl_loss_weight=0.6,
        distill_loss_weight=0.3,
        prox_logp=prox_logp,
        weights=weights * kept,
        kd_baseline=torch.full_like(old_logp, -0.4),
        reduction="token_mean" if by_token else "sequence_mean",
        cu_seqlens=rows,
        normalizer=12.0 if by_token else 4.0,
    )
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (loss, expected.loss)))
    assert metrics["reverse_kl"] == pytest.approx(float(expected.reverse_kl))
    assert metrics["num_valid_samples"] == 2
    distilled = KDRLLossFn(**(options | {"rl_loss_weight": 0.0}), **masked)(logp, data, **COUNTS)[0]
    torch.testing.assert_close(distilled, 0.3 * expected.kd)


@pytest.mark.parametrize("by_token", [True, False])
def test_micro_batches_sum_to_the_batch(by_token: bool) -> None:
    logp, data = batch()
    loss_fn = KDRLLossFn(
        token_level_loss=by_token, distill_loss_weight=0.3, trust_region=0.2, stale_sequences=0.1, kd_baseline=-0.4
    )
    whole, metrics = loss_fn(logp, data, **COUNTS)
    parts = [loss_fn(logp[i : i + 1], {k: x[i : i + 1] for k, x in data.items()}, **COUNTS) for i in range(3)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    summed = {name: sum(m[name] for _, m in parts) for name in metrics}
    assert summed == pytest.approx(metrics)


def test_weights_that_change_count_from_the_next_call_on() -> None:
    logp, data = batch()
    changed, expected = KDRLLossFn(distill_loss_weight=0.0), KDRLLossFn(rl_loss_weight=0.7, distill_loss_weight=0.3)
    changed(logp, data, **COUNTS)
    changed.rl_loss_weight, changed.distill_loss_weight = 0.7, 0.3
    torch.testing.assert_close(changed(logp, data, **COUNTS)[0], expected(logp, data, **COUNTS)[0])


def test_it_says_what_it_is() -> None:
    for by_token, kind in ((True, "TOKEN_LEVEL"), (False, "SEQUENCE_LEVEL")):
        loss_fn = KDRLLossFn(distill_loss_weight=0.005, token_level_loss=by_token)
        assert loss_fn.loss_type is INTERFACES.LossType[kind]
        assert loss_fn.input_type is INTERFACES.LossInputType.LOGPROB
        logp, data = batch()
        _, metrics = loss_fn(logp, data, **COUNTS)
        assert metrics.keys() == loss_fn.metric_normalizations.keys()
        like_loss = INTERFACES.MetricNormalizer["TOKENS" if by_token else "SEQUENCES"]
        assert loss_fn.metric_normalizations["loss"] is like_loss
    shipped = pickle.loads(pickle.dumps(loss_fn))  # as Ray sends it to the workers
    assert shipped(logp, data, **COUNTS)[1] == metrics


def test_a_configuration_is_a_mapping_or_an_object() -> None:
    """The config is a dict in 0.6 and an object in 0.7. Without a bound the weights are plain prev/generation."""
    config = {"ratio_clip_min": 0.1, "token_level_loss": False, "use_importance_sampling_correction": True}
    logp, data = batch()
    weight = {"distill_loss_weight": 0.005}
    by_hand = KDRLLossFn(clip_low=0.1, clip_high=0.3, token_level_loss=False, max_importance_weight=1e9, **weight)
    for given in (config, SimpleNamespace(**config)):
        loss_fn = KDRLLossFn.from_config(given, clip_high=0.3, use_fused_linear_logprobs=True, **weight)
        assert loss_fn(logp, data, **COUNTS)[1] == by_hand(logp, data, **COUNTS)[1]
        assert loss_fn.use_fused_linear_logprobs
        assert not by_hand.use_fused_linear_logprobs


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"disable_ppo_ratio": True}, "disable_ppo_ratio is not part of this loss"),
        ({"force_on_policy_ratio": True}, "force_on_policy_ratio is not part of this loss"),
        ({"positive_example_nll_weight": 0.1}, "positive_example_nll_weight is not part of this loss, got 0.1"),
        ({"sequence_level_importance_ratios": True}, "ClippedPGLossFn with the teacher in the advantages"),
        ({"use_cispo": True}, "use_cispo is not part of this loss"),
        ({"reference_policy_kl_penalty": 0.01}, r"reference_policy_kl_penalty .* got 0\.01: set it to 0, or use_kl_in"),
        ({"truncated_importance_sampling_type": "icepop"}, "must be 'tis' without .*_min, got 'icepop' with None"),
        ({"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio_min": 0.5}, "with 0.5"),
    ],
    ids=str,
)
def test_a_setting_that_it_does_not_have_is_refused(setting: dict[str, Any], message: str) -> None:
    corrected = {"use_importance_sampling_correction": True, "truncated_importance_sampling_ratio": 2.0}
    with pytest.raises(ValueError, match=message):
        KDRLLossFn.from_config(corrected | setting, distill_loss_weight=0.005)
    in_reward = {"reference_policy_kl_penalty": 0.01, "use_kl_in_reward": True}
    assert KDRLLossFn.from_config(in_reward, distill_loss_weight=0.005).max_importance_weight is None


def test_placeholders_are_no_log_probs() -> None:
    """NeMo-RL writes zeros for prev_logprobs if its configuration forces the ratio to 1."""
    logp, data = batch()
    joint, distill = (KDRLLossFn(rl_loss_weight=rl, distill_loss_weight=0.005) for rl in (1.0, 0.0))
    data["prev_logprobs"] = torch.zeros_like(data["generation_logprobs"])
    with pytest.raises(ValueError, match=r"prev_logprobs are 0 at every trained token.*force_on_policy_ratio"):
        joint(logp, data, **COUNTS)
    assert distill(logp, data, **COUNTS)[0].isfinite()  # reads no prev_logprobs
    data["generation_logprobs"] = torch.full_like(data["generation_logprobs"], -1e-3)
    assert joint(logp, data, **COUNTS)[0].isfinite()  # a forced answer: 0 up to rounding


def test_a_nemo_rl_that_asks_for_no_normalizers_gets_none(monkeypatch) -> None:
    """`MetricNormalizer` was added after 0.7.0."""
    older = SimpleNamespace(LossType=INTERFACES.LossType, LossInputType=INTERFACES.LossInputType)
    monkeypatch.setattr(nemo_rl, "_require", lambda module: older)
    assert KDRLLossFn(distill_loss_weight=0.005).metric_normalizations == {}
    assert KDRLLossFn(distill_loss_weight=0.005).loss_type is INTERFACES.LossType.TOKEN_LEVEL


def test_data_without_a_teacher_is_refused() -> None:
    logp, data = batch()
    data["other"] = data.pop("teacher_logprobs")
    with pytest.raises(ValueError, match=r"no 'teacher_logprobs': put teacher_policy.get_logprobs\(data\)"):
        KDRLLossFn(distill_loss_weight=0.005)(logp, data, **COUNTS)
    assert KDRLLossFn(teacher_key="other", distill_loss_weight=0.005)(logp, data, **COUNTS)[0].isfinite()
    assert KDRLLossFn(distill_loss_weight=0.0)(logp, data, **COUNTS)[0].isfinite()


def test_what_is_not_trained_leaves_no_trace() -> None:
    logp, data = batch()
    masks = {"trust_region": 0.2, "stale_sequences": 0.1}
    loss_fn = KDRLLossFn(max_importance_weight=2.0, distill_loss_weight=0.005, **masks)
    clean = loss_fn(logp, data, **COUNTS)
    untrained = (data["token_mask"] * data["sample_mask"][:, None]) == 0
    for name in ("prev_logprobs", "generation_logprobs", "teacher_logprobs", "advantages"):
        data[name] = data[name].masked_fill(untrained, torch.nan)
    dirty = loss_fn(logp, data, **COUNTS)
    assert dirty[1] == clean[1]
    gradients = [torch.autograd.grad(x[0], logp)[0] for x in (clean, dirty)]
    torch.testing.assert_close(*gradients)


def test_without_nemo_rl_the_error_says_what_is_supported(monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ImportError, match=r"nemo-rl>=0\.6,<0\.8"):
        _ = KDRLLossFn(distill_loss_weight=0.005).loss_type


def test_the_pages_check_reports_once_in_each_worker(tmp_path, monkeypatch, capsys) -> None:
    """NeMo-RL pickles the loss for every step, so each step calls another copy."""
    page = Path(__file__).parents[2] / "docs" / "integrations" / "nemo_rl.md"
    (code,) = (block.code for block in blocks(page.read_text("utf-8")) if "class CheckedLossFn" in block.code)
    (tmp_path / "checked_loss.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    loss_fn = importlib.import_module("checked_loss").CheckedLossFn(distill_loss_weight=1.0)
    logp, data = batch()
    data["generation_logprobs"][:, 1:] = logp.detach()
    for _ in range(2):
        pickle.loads(pickle.dumps(loss_fn))(logp, data, **COUNTS)
    assert capsys.readouterr().out.count("check_batch:") == 1
