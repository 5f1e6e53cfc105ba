"""Tests the verl adapter against verl 0.9.1: its registries, layouts, denominators and metric names.

verl itself is not installed here (tests/trainers/verl has it). Denominators are compared with float64 loops.
"""

from __future__ import annotations

import importlib.metadata
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss.integrations import verl
from kdloss.testing import SequenceTree, expected_gradient

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


class Config(SimpleNamespace):
    """Like verl's configurations: a dataclass with the `get` of a mapping."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def actor_config(**fields: Any) -> Config:
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28, "tau_pos": 1.0, "tau_neg": 1.05}
    return Config(**{**defaults, "global_batch_info": {}, **fields})


@pytest.fixture(autouse=True)
def trainer(monkeypatch) -> SimpleNamespace:
    """The four modules of verl that the adapter imports."""
    policy: dict[str, Any] = {}
    distillation: dict[str, tuple[Any, Any]] = {}

    def register_policy_loss(name: str) -> Any:
        return lambda function: policy.setdefault(name, function)

    def register_distillation_loss(settings: Any) -> Any:
        def decorate(function: Any) -> Any:
            for name in settings.names:
                assert name not in distillation, "verl refuses a name that it has"
                distillation[name] = (function, settings)
            return function

        return decorate

    def no_padding_2_padding(x: Tensor, data: dict[str, Any]) -> Tensor:
        """The responses cut out of whole sequences, from the prediction position of their first token on."""
        x = x.values() if x.is_nested else x
        ends = torch.tensor(data["lengths"]).cumsum(0).tolist()
        longest = max(data["responses"])
        rows = [x[end - n - 1 : end - 1] for end, n in zip(ends, data["responses"], strict=True)]
        return torch.stack([torch.cat([row, row.new_zeros(longest - len(row), *row.shape[1:])]) for row in rows])

    modules = {
        "verl.trainer.ppo.core_algos": SimpleNamespace(register_policy_loss=register_policy_loss),
        "verl.trainer.distillation.losses": SimpleNamespace(
            DISTILLATION_LOSS_REGISTRY=distillation,
            DistillationLossSettings=SimpleNamespace,
            register_distillation_loss=register_distillation_loss,
        ),
        "verl.workers.utils.padding": SimpleNamespace(no_padding_2_padding=no_padding_2_padding),
        "verl.utils.metric": SimpleNamespace(
            Metric=lambda aggregation, value: (aggregation, value), AggregationType=SimpleNamespace(MEAN="mean")
        ),
    }
    monkeypatch.setattr(verl, "_require", lambda module: modules[module])
    return SimpleNamespace(policy=policy, distillation=distillation)


def policy_inputs(rows: int = 4, length: int = 6, *, seed: int = 0) -> dict[str, Tensor]:
    """As in `ppo_loss`: responses only, right-padded; one row is fully masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, length, generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.1
    lengths = torch.tensor([6, 2, 0, 4])
    return {
        "old_log_prob": old,
        "log_prob": (old + 0.3 * normal()).requires_grad_(),
        "advantages": normal(),
        "response_mask": torch.arange(length) < lengths[:, None],
    }


def loop(x: Tensor, mask: Tensor, mode: str, *, dp_size: int, tokens: float, sequences: float, scale: float) -> float:
    per_row = [row[keep].tolist() for row, keep in zip(x.detach(), mask, strict=True)]
    total = math.fsum(v for row in per_row for v in row)
    return {
        "token-mean": total / tokens,
        "token-sum": total,
        "seq-mean-token-sum": total / sequences,
        "seq-mean-token-sum-norm": total / sequences / scale,
        "seq-mean-token-mean": math.fsum(math.fsum(row) / len(row) for row in per_row if row) / sequences,
    }[mode] * dp_size


@pytest.mark.parametrize("mode", MODES)
def test_denominators(mode: str) -> None:
    inputs = policy_inputs()
    x, mask = inputs["log_prob"], inputs["response_mask"]
    local = verl.aggregate(x, mask, mode).item()
    assert local == pytest.approx(loop(x, mask, mode, dp_size=1, tokens=12, sequences=3, scale=6), rel=1e-12)
    info = {"dp_size": 4, "batch_num_tokens": torch.tensor(50), "global_batch_size": 16, "loss_scale_factor": 9}
    step = verl.aggregate(x, mask, mode, **info).item()
    assert step == pytest.approx(loop(x, mask, mode, dp_size=4, tokens=50, sequences=16, scale=9), rel=1e-12)
    nothing = verl.aggregate(x, torch.zeros_like(mask), mode)
    assert nothing == 0
    assert torch.autograd.grad(nothing, x)[0].abs().max() == 0
    if mode != "token-sum":
        with pytest.raises(ValueError, match=r"must be given where dp_size > 1 \(it is 2\)"):
            verl.aggregate(x, mask, mode, dp_size=2)


def test_an_unknown_aggregation_mode_is_named() -> None:
    inputs = policy_inputs()
    with pytest.raises(ValueError, match=r"must be one of 'token-mean', .*got 'seq-mean'"):
        verl.ppo(**inputs, loss_agg_mode="seq-mean", config=actor_config())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", verl.POLICY_LOSSES)
def test_micro_batches_sum_to_the_step(name: str, mode: str) -> None:
    """Each row on a rank of its own, averaged as verl's engines average, equals the whole batch on one rank."""
    inputs = policy_inputs()
    mask = inputs["response_mask"]
    step = {"batch_num_tokens": mask.sum(), "global_batch_size": mask.any(1).sum(), "loss_scale_factor": 6}
    loss, _ = verl.POLICY_LOSSES[name](**inputs, loss_agg_mode=mode, config=actor_config())
    config = actor_config(global_batch_info={"dp_size": 4, **step})
    parts = [
        verl.POLICY_LOSSES[name](**{k: x[i : i + 1] for k, x in inputs.items()}, loss_agg_mode=mode, config=config)[0]
        for i in range(4)
    ]
    together = sum(parts) / 4
    torch.testing.assert_close(together, loss)
    gradients = [torch.autograd.grad(x, inputs["log_prob"])[0] for x in (together, loss)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", verl.POLICY_LOSSES)
def test_policy_losses_are_the_librarys(name: str, weighted: bool) -> None:
    inputs = policy_inputs()
    weights = torch.rand(4, 6, dtype=torch.float64) if weighted else None
    bounds = {"clip_low": 0.2, "clip_high": 0.28}
    surrogate, options = {
        "kdloss_ppo": (kdloss.clipped_surrogate, bounds | {"dual_clip": 3.0}),
        "kdloss_gspo": (kdloss.sequence_clipped_surrogate, bounds | {"cu_seqlens": torch.arange(0, 25, 6)}),
        "kdloss_sapo": (kdloss.sapo_surrogate, {"tau_positive": 0.7, "tau_negative": 1.3}),
        "kdloss_cispo": (kdloss.cispo_surrogate, bounds),
    }[name]
    flat = [inputs[k].flatten() for k in ("log_prob", "old_log_prob", "advantages")]
    mask = inputs["response_mask"].flatten()
    flat_weights = None if weights is None else weights.flatten()
    expected = surrogate(*flat, loss_mask=mask, weights=flat_weights, **options)
    config = actor_config(tau_pos=0.7, tau_neg=1.3)
    loss, metrics = verl.POLICY_LOSSES[name](
        **inputs, loss_agg_mode="token-mean", config=config, rollout_is_weights=weights
    )
    mean = kdloss.token_mean(expected.loss, loss_mask=mask)
    torch.testing.assert_close(loss, mean)
    gradients = [torch.autograd.grad(x, inputs["log_prob"])[0] for x in (loss, mean)]
    torch.testing.assert_close(*gradients)
    assert metrics.keys() == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(expected.clipped.sum() / mask.sum()))
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(expected.dual_clipped.sum() / mask.sum()))
    assert metrics["actor/ppo_kl"] == pytest.approx(float((flat[1] - flat[0].detach())[mask].mean()))


def distillation_inputs(clip: float | None = None, *, old: str | None = "rollout_log_probs", seed: int = 0) -> tuple:
    """As in verl's worker: student and teacher as whole sequences without padding, responses padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths, responses = [5, 9, 4], [3, 6, 1]
    logp = -torch.rand(sum(lengths), generator=generator, dtype=torch.float64) * 3
    teacher = -torch.rand(sum(lengths), 1, generator=generator, dtype=torch.float64) * 3
    mask = torch.arange(6) < torch.tensor(responses)[:, None]
    mask[1, 2] = False  # a tool's output
    data: dict[str, Any] = {
        "lengths": lengths,
        "responses": responses,
        "response_mask": mask.int(),
        "teacher_logprobs": torch.nested.nested_tensor(list(teacher.split(lengths)), layout=torch.jagged),
    }
    if old is not None:
        data[old] = -torch.rand(3, 6, generator=generator, dtype=torch.float64) * 3
    config = Config(distillation_loss=Config(loss_max_clamp=clip))
    return config, {"log_probs": logp.requires_grad_()}, data


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("old", ["rollout_log_probs", "old_log_probs", None])
def test_the_distillation_loss_reports_the_kl_and_descends_the_surrogate(old: str | None, clip: float | None) -> None:
    distillation_config, output, data = distillation_inputs(clip, old=old)
    loss, metrics = verl.reverse_kl(
        config=actor_config(), distillation_config=distillation_config, model_output=output, data=data
    )
    assert loss.shape == (3, 6)
    mask = data["response_mask"].bool()
    index = torch.tensor([[1, 2, 3, 0, 0, 0], [7, 8, 9, 10, 11, 12], [16, 0, 0, 0, 0, 0]])
    logp = output["log_probs"][index]
    teacher = data["teacher_logprobs"].values().squeeze(-1)[index]
    value = torch.where(mask, logp.detach() - teacher, 0)
    value = value if clip is None else value.clamp(-clip, clip)
    torch.testing.assert_close(loss.detach(), value)
    if clip is not None:  # at the bound itself, the clamp of torch 2.14 has no gradient
        assert loss.abs().max() < clip < value.abs().max() + 1e-6
    out = kdloss.distillation_loss(
        logp, None if old is None else data[old], teacher, loss_mask=mask, kd_reward_clip=clip
    ).loss
    # what verl does when use_policy_gradient is false: its clamp must not stop the gradient
    clamped = loss if clip is None else loss.clamp(-clip, clip)
    descended = verl.aggregate(clamped, mask, "token-mean")
    gradients = [torch.autograd.grad(x, output["log_probs"])[0] for x in (descended, out)]
    torch.testing.assert_close(*gradients)
    aggregation, size = metrics["distillation/abs_loss"]
    assert (aggregation, float(size)) == ("mean", pytest.approx(float(value[mask].abs().mean())))


def test_its_expected_gradient_is_the_reverse_kls_off_policy() -> None:
    """Enumerates every outcome: one prompt token, then the response."""
    tree = SequenceTree(vocab_size=3, max_length=2)

    def loss(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        if len(cu_seqlens) > 2:
            return logp.sum()  # never descended: this call only checks whether the loss is per token
        config = Config(distillation_loss=Config(loss_max_clamp=None))
        last = torch.zeros(1, dtype=logp.dtype)  # the last token predicts nothing
        output = {"log_probs": torch.cat([logp, last])}
        data = {
            "lengths": [logp.shape[0] + 1],
            "responses": [logp.shape[0]],
            "response_mask": loss_mask[None],
            "rollout_log_probs": old_logp[None],
            "teacher_logprobs": torch.cat([teacher_logp, last])[:, None],
        }
        per_token, _ = verl.reverse_kl(None, config, output, data)
        return per_token.sum()

    right = expected_gradient(kdloss.distillation_loss, tree, normalizer=1, under="behaviour")
    torch.testing.assert_close(expected_gradient(loss, tree, under="behaviour")[0], right[0])


def test_register_is_complete_and_may_run_twice(trainer: SimpleNamespace) -> None:
    verl.register()
    verl.register()
    assert trainer.policy == verl.POLICY_LOSSES
    function, settings = trainer.distillation["kdloss_reverse_kl"]
    assert function is verl.reverse_kl
    assert settings.use_estimator is True


@pytest.mark.slow
def test_verl_finds_the_plugin_and_nothing_else_is_touched_by_it() -> None:
    (entry,) = [x for x in importlib.metadata.entry_points(group="verl.plugins") if x.name == "kdloss"]
    assert entry.value == "kdloss.integrations._verl_plugin"
    code = "import sys, kdloss.integrations._verl_plugin; assert 'verl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_verl_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ImportError, match=r"pip install 'verl>=0\.9\.1,<0\.10'"):
        verl.register()


def test_a_token_that_the_teacher_excludes_has_an_infinite_loss() -> None:
    config, output, data = distillation_inputs()
    data["teacher_logprobs"].values()[1] = -torch.inf
    loss, _ = verl.reverse_kl(None, config, output, data)
    assert loss[0, 0] == torch.inf
    assert loss[1:].isfinite().all()


def test_the_policy_that_sampled_comes_before_the_one_that_was_updated() -> None:
    """The ratio is against `rollout_log_probs` if the batch has both, and `old_log_probs` if the former are None."""
    config, output, data = distillation_inputs()
    rollout = data["rollout_log_probs"]
    data["old_log_probs"] = -torch.rand(3, 6, dtype=torch.float64) * 3
    ends, mask = [1, 7, 16], data["response_mask"].bool()  # the prediction position of each first response token
    index = torch.tensor(ends)[:, None] + torch.arange(6)
    logp, teacher = (
        x.detach()[index.clamp(max=17)] for x in (output["log_probs"], data["teacher_logprobs"].values()[:, 0])
    )
    for sampled in (rollout, None):
        loss, _ = verl.reverse_kl(None, config, output, data | {"rollout_log_probs": sampled})
        (gradient,) = torch.autograd.grad(loss.sum(), output["log_probs"])
        ratio = (logp - (data["old_log_probs"] if sampled is None else sampled)).exp()
        torch.testing.assert_close(gradient[index[mask]], (ratio * (logp - teacher))[mask])
        assert (gradient != 0).sum() == mask.sum()


def test_a_teacher_that_was_scored_at_another_temperature_is_refused() -> None:
    config, output, data = distillation_inputs()
    for same in (1, 1.0, torch.tensor([1.0, 1.0, 1.0])):
        verl.reverse_kl(None, config, output, data | {"temperature": same})
    with pytest.raises(ValueError, match=r"rollout\.temperature must be 1 with kdloss_reverse_kl, got 0\.7"):
        verl.reverse_kl(None, config, output, data | {"temperature": 0.7})
