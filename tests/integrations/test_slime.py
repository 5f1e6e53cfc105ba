"""Tests the slime adapter against slime: logits (1, T, V), lists of responses, its own mean.

Its `policy_loss_function`, of main at 624b824, computed the values in tests/data/slime-624b824.json, including the
gradient of the logits; v0.3.1 gives the same values except for the dual clip.
Tolerance: rtol 1e-5 in float32, for a log-softmax over 11 entries and sums over ten tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss.integrations import slime
from trainer_values import cases, close

CASES = cases("slime-624b824")


@pytest.fixture(autouse=True)
def trainer(monkeypatch) -> SimpleNamespace:
    """The part of slime's loss file that the adapter uses, on one rank."""

    def scored(
        logits: Tensor, *, args: Any, unconcat_tokens: list[Tensor], total_lengths: list[int], **rest: Any
    ) -> tuple:
        assert logits.dtype == torch.float32
        assert rest.pop("with_entropy")
        logp, entropy, start = [], [], 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, rest["response_lengths"], strict=True):
            rows = logits[0, start + total - response - 1 : start + total - 1]
            out = kdloss.token_logprobs_and_entropy(rows, tokens[-response:], temperature=args.rollout_temperature)
            logp.append(out.logp)
            entropy.append(out.entropy)
            start += total
        return torch.empty(0), {"log_probs": logp, "entropy": entropy}

    module = SimpleNamespace(
        get_log_probs_and_entropy=scored,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
        slice_log_prob_with_cp=lambda x, total, response: x,
    )
    monkeypatch.setattr(slime, "_slime", lambda: module)
    return module


def given(case: dict[str, Any]) -> tuple[SimpleNamespace, dict[str, Any], Tensor, Any]:
    args = SimpleNamespace(**case["args"])
    batch = {k: v if k.endswith("lengths") else [torch.tensor(x) for x in v] for k, v in case["batch"].items()}
    masks, responses = batch["loss_masks"], batch["response_lengths"]

    def sum_of_sample_mean(x: Tensor) -> Tensor:
        parts = zip(x.split(responses), masks, strict=True)
        return sum((part * mask).sum() / (1 if case["per_token"] else mask.sum().clamp(min=1)) for part, mask in parts)

    return args, batch, torch.tensor(case["logits"], requires_grad=True), sum_of_sample_mean


def run(args: Any, batch: dict[str, Any], logits: Tensor, mean: Any, **options: Any) -> tuple[Tensor, Tensor, dict]:
    loss, reported = slime.kdrl_loss(args, batch, logits, mean, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0], reported


@pytest.mark.parametrize("case", CASES)
def test_slimes_own_policy_loss(case: dict[str, Any]) -> None:
    """On-policy, a teacher in the advantages and one as a term have the same gradient, at the weight --opd-kl-coef."""
    args, batch, logits, mean = given(case)
    weight, args.opd_kl_coef = args.opd_kl_coef if args.use_opd else 0.0, 0.0
    loss, gradient, reported = run(args, batch, logits, mean, distill_loss_weight=weight)
    close(loss, case["loss"], rtol=1e-5)
    close(gradient, case["gradient"], rtol=1e-5)
    if weight:
        assert abs(reported["ppo_kl"]) < 1e-6  # on-policy
    for name in ("loss", "entropy_loss") if weight else case["reported"]:
        close(reported[name], case["reported"][name], rtol=1e-5)
    assert all(not x.requires_grad for x in reported.values())


def joint_case() -> tuple[SimpleNamespace, dict[str, Any], Tensor, Any]:
    return given(CASES[0].values[0])


@pytest.mark.parametrize("options", [{}, {"kd_reward_clip": 0.3}, {"kd_max_ratio": 1.05}], ids=str)
@pytest.mark.parametrize("rl_loss_weight", [0.0, 0.6])
def test_off_policy_the_teacher_has_its_own_ratio(rl_loss_weight: float, options: dict[str, float]) -> None:
    args, batch, logits, mean = joint_case()
    weights = {"rl_loss_weight": rl_loss_weight, "distill_loss_weight": 0.4}
    loss, gradient, reported = run(args, batch, logits, mean, **weights, **options)
    joined = {k: torch.cat(v) for k, v in batch.items() if not k.endswith("lengths") and k != "rollout_mask_sums"}
    ends = torch.tensor(batch["total_lengths"]).cumsum(0).tolist()
    rows = [torch.arange(e - n - 1, e - 1) for e, n in zip(ends, batch["response_lengths"], strict=True)]
    labels = torch.cat([t[-n:] for t, n in zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True)])
    logp = kdloss.token_logprobs(logits[0, torch.cat(rows)], labels)
    out = kdloss.kdrl_loss(
        logp,
        joined["rollout_log_probs"],
        joined["teacher_log_probs"],
        joined["advantages"],
        loss_mask=joined["loss_masks"].bool(),
        prox_logp=joined["log_probs"],
        clip_high=0.28,
        reduction="sequence_mean",
        cu_seqlens=torch.tensor([0, 4, 6, 9]),
        normalizer=1,
        **weights,
        **options,
    )
    close(loss, out.loss.detach(), rtol=1e-5)
    close(gradient, torch.autograd.grad(out.loss, logits)[0], rtol=1e-5)
    close(reported["opd_reverse_kl"], out.reverse_kl, rtol=1e-5)
    assert reported.keys() == {
        "loss",
        "pg_loss",
        "pg_clipfrac",
        "ppo_kl",
        "entropy_loss",
        "kd_loss",
        "opd_reverse_kl",
        "train_rollout_logprob_abs_diff",
    }


def test_masks_take_tokens_out_of_the_rl_term_and_out_of_no_denominator() -> None:
    args, batch, logits, mean = joint_case()
    args.use_tis, args.tis_clip_low, args.tis_clip = True, 0.5, 1.5
    weights = {"rl_loss_weight": 0.6, "distill_loss_weight": 0.4}
    masked = {"trust_region": 0.02, "stale_sequences": 0.0, "top_entropy": 0.8, "kd_baseline": -0.4}
    loss, gradient, reported = run(args, batch, logits, mean, **weights, **masked)
    joined = {k: torch.cat(v) for k, v in batch.items() if not k.endswith("lengths") and k != "rollout_mask_sums"}
    ends = torch.tensor(batch["total_lengths"]).cumsum(0).tolist()
    rows = [torch.arange(e - n - 1, e - 1) for e, n in zip(ends, batch["response_lengths"], strict=True)]
    labels = torch.cat([t[-n:] for t, n in zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True)])
    logp, entropy = kdloss.token_logprobs_and_entropy(logits[0, torch.cat(rows)], labels)
    mask, old_logp, advantages = joined["loss_masks"].bool(), joined["rollout_log_probs"], joined["advantages"]
    streams, cu_seqlens = (logp, old_logp, advantages), torch.tensor([0, 4, 6, 9])
    near = kdloss.trust_region_mask(*streams, loss_mask=mask, max_divergence=0.02)
    fresh = kdloss.stale_sequence_mask(*streams, loss_mask=mask, cu_seqlens=cu_seqlens, max_divergence=0)
    kept = near & fresh & kdloss.top_entropy_mask(entropy, loss_mask=mask, fraction=0.8)
    assert 0 < kept.sum() < (near & fresh).sum() < mask.sum()
    assert (near & fresh).sum() < near.sum() < mask.sum()
    raw = (joined["log_probs"] - old_logp).exp()
    out = kdloss.kdrl_loss(
        logp,
        old_logp,
        joined["teacher_log_probs"],
        advantages,
        loss_mask=mask,
        prox_logp=joined["log_probs"],
        clip_high=0.28,
        weights=raw.clamp(args.tis_clip_low, args.tis_clip) * kept,
        kd_baseline=torch.full_like(old_logp, -0.4),
        reduction="sequence_mean",
        cu_seqlens=cu_seqlens,
        normalizer=1,
        **weights,
    )
    close(loss, out.loss.detach(), rtol=1e-5)
    close(gradient, torch.autograd.grad(out.loss, logits)[0], rtol=1e-5)
    close(reported["opd_reverse_kl"], out.reverse_kl, rtol=1e-5)


def test_the_mask_of_stale_sequences_needs_whole_responses(trainer: SimpleNamespace) -> None:
    args, batch, logits, mean = joint_case()
    score = trainer.get_log_probs_and_entropy
    part = slice(1, None)
    trainer.get_log_probs_and_entropy = lambda *x, **y: (
        None,
        {k: [row[part] for row in v] for k, v in score(*x, **y)[1].items()},
    )
    trainer.slice_log_prob_with_cp = lambda x, total, response: x[part]
    sliced = {k: [x[part] for x in batch[k]] for k in batch if k.endswith("log_probs") or k == "advantages"}
    with pytest.raises(ValueError, match=r"stale_sequences must be None under context parallelism.*6 tokens .* with 9"):
        slime.kdrl_loss(args, batch | sliced, logits, mean, distill_loss_weight=0.4, stale_sequences=0.1)
    slime.kdrl_loss(args, batch | sliced, logits, torch.sum, distill_loss_weight=0.4, trust_region=0.1)


def test_context_parallel_ranks_sum_to_the_batch(trainer: SimpleNamespace) -> None:
    """Each rank has a part of every response. slime has already sliced the streams; the adapter slices the masks."""
    args, batch, logits, mean = joint_case()
    whole = run(args, batch, logits, mean, distill_loss_weight=0.4)
    score, total = trainer.get_log_probs_and_entropy, torch.zeros_like(whole[1])
    for part in (slice(0, 1), slice(1, None)):

        def scored(*positional: Any, part: slice = part, **named: Any) -> tuple[None, dict[str, list[Tensor]]]:
            return None, {k: [x[part] for x in v] for k, v in score(*positional, **named)[1].items()}

        def cut(x: Tensor, _total: int, _response: int, part: slice = part) -> Tensor:
            return x[part]

        trainer.get_log_probs_and_entropy, trainer.slice_log_prob_with_cp = scored, cut
        local = {k: [x[part] for x in batch[k]] for k in batch if k.endswith("log_probs") or k == "advantages"}
        lengths = [len(x) for x in local["advantages"]]

        def local_mean(x: Tensor, part: slice = part, lengths: list[int] = lengths) -> Tensor:
            rows = zip(x.split(lengths), batch["loss_masks"], strict=True)
            return sum((row * mask[part]).sum() / mask.sum() for row, mask in rows)

        total += run(args, batch | local, logits, local_mean, distill_loss_weight=0.4)[1]
    close(total, whole[1], rtol=1e-5)


def test_a_rank_without_tokens_has_a_gradient_of_zero(trainer: SimpleNamespace) -> None:
    args, batch, logits, _ = joint_case()
    nothing = {"log_probs": [logits.new_zeros(0)], "entropy": [logits.new_zeros(0)]}
    trainer.get_log_probs_and_entropy = lambda *_, **__: (None, nothing)
    trainer.slice_log_prob_with_cp = lambda x, total, response: x[:0]
    for name in ("log_probs", "rollout_log_probs", "teacher_log_probs", "advantages"):
        batch[name] = [x[:0] for x in batch[name]]
    loss, gradient, _ = run(args, batch, logits, lambda x: x.sum(), distill_loss_weight=0.005)
    assert loss == 0
    assert (gradient == 0).all()


def test_without_log_probs_nothing_was_updated_yet() -> None:
    args, batch, logits, mean = joint_case()
    del batch["log_probs"], batch["rollout_log_probs"]
    _, _, reported = run(args, batch, logits, mean, distill_loss_weight=0.5)
    assert reported["ppo_kl"] == 0
    assert reported["pg_clipfrac"] == 0


@pytest.mark.parametrize(
    ("changed", "message", "advised"),
    [
        (
            {"use_opd": True, "opd_kl_coef": 1.0},
            "--opd-kl-coef must be 0 .*, got 1.0.*count twice",
            {"opd_kl_coef": 0.0},
        ),
        ({"advantage_estimator": "gspo"}, "use grpo, or --loss-type policy_loss", {"advantage_estimator": "grpo"}),
        ({"use_kl_loss": True, "kl_loss_coef": 0.01}, "use --kl-coef", {"use_kl_loss": False, "kl_coef": 0.01}),
        ({"use_opsm": True}, "--use-opsm is not part of this loss: unset it", {"use_opsm": False}),
        ({"custom_tis_function_path": "a.b"}, "--custom-tis-function-path is", {"custom_tis_function_path": None}),
    ],
)
def test_options_that_would_change_the_loss_unseen(
    changed: dict[str, Any], message: str, advised: dict[str, Any]
) -> None:
    args, batch, logits, mean = joint_case()
    with pytest.raises(ValueError, match=message):
        run(SimpleNamespace(**vars(args) | changed), batch, logits, mean, distill_loss_weight=0.005)
    advised = SimpleNamespace(**vars(args) | changed | advised)
    assert run(advised, batch, logits, mean, distill_loss_weight=0.005)[0].isfinite()


def test_a_batch_without_a_teacher_is_refused() -> None:
    args, batch, logits, mean = joint_case()
    del batch["teacher_log_probs"]
    with pytest.raises(
        ValueError, match=r"no teacher_log_probs: set --use-opd with --opd-type.*or distill_loss_weight=0"
    ):
        run(args, batch, logits, mean, distill_loss_weight=0.005)
    assert run(args, batch, logits, mean, distill_loss_weight=0.0)[0].isfinite()


def test_without_slime_the_error_says_what_is_supported(monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ImportError, match=r"slime>=0\.3\.1,<0\.4"):
        slime.kdrl_loss(*joint_case(), distill_loss_weight=0.005)


@pytest.mark.parametrize(("name", "flag"), [("rollout_temperature", "temperature"), ("rollout_top_p", "top-p")])
def test_a_server_scores_at_temperature_one_and_the_whole_vocabulary(name: str, flag: str) -> None:
    args, batch, logits, mean = joint_case()
    warm = SimpleNamespace(**vars(args) | {name: 0.7})
    for kind in ("sglang", None):  # None: a reward function set the log-probs, without --use-opd
        warm.opd_type = kind
        with pytest.raises(ValueError, match=rf"--rollout-{flag} must be 1 with --opd-type sglang, got 0\.7"):
            run(warm, batch, logits, mean, distill_loss_weight=0.005)
    warm.opd_type = "megatron"
    assert run(warm, batch, logits, mean, distill_loss_weight=0.005)[0].isfinite()


@pytest.mark.parametrize("changed", [{"use_rollout_logprobs": True}, {"use_tis": True, "tis_clip": 2.0}], ids=str)
def test_what_reads_the_sampler_needs_it(changed: dict[str, Any]) -> None:
    """slime raises here, too; a ratio of 1 instead would go unnoticed."""
    args, batch, logits, mean = joint_case()
    del batch["rollout_log_probs"]
    args = SimpleNamespace(**vars(args) | {"tis_clip_low": 0.0} | changed)
    with pytest.raises(ValueError, match="no rollout_log_probs, which --use-rollout-logprobs and --use-tis read"):
        run(args, batch, logits, mean, distill_loss_weight=0.005)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    args, batch, logits, mean = joint_case()
    batch["advantages"] = [x * torch.nan for x in batch["advantages"]]
    loss, gradient, _ = run(args, batch, logits, mean, rl_loss_weight=0.0, distill_loss_weight=0.005)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_masked_tokens_leave_no_trace() -> None:
    args, batch, logits, mean = joint_case()
    clean = run(args, batch, logits, mean, distill_loss_weight=0.005)
    masked = [mask == 0 for mask in batch["loss_masks"]]
    assert any(x.any() for x in masked)
    for name in ("teacher_log_probs", "advantages"):
        batch[name] = [x.masked_fill(m, torch.nan) for x, m in zip(batch[name], masked, strict=True)]
    dirty = run(args, batch, logits, mean, distill_loss_weight=0.005)
    close(dirty[0], clean[0], rtol=1e-6)
    close(dirty[1], clean[1], rtol=1e-6)
