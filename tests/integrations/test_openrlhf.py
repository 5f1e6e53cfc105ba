"""Tests the OpenRLHF adapter against OpenRLHF 0.11.2: its call, its five results, its denominators.

Its `PolicyLoss` computed the values in tests/data/openrlhf-0.11.2.json. rtol 1e-7: its means add 1e-8 to the
denominator.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss
from kdloss.integrations.openrlhf import KDRLPolicyLoss, attach
from trainer_values import cases, close

DEFAULTS = {
    "clip_eps_low": 0.2,
    "clip_eps_high": 0.2,
    "dual_clip": None,
    "token_level_loss": True,
    "policy_loss_type": "ppo",
    "is_correction_level": "off",
    "is_correction_mode": "mask",
    "is_correction_gating": "ratio",
    "is_correction_threshold": [0.5, 5.0],
}


def policy_loss(**settings: Any) -> SimpleNamespace:
    """OpenRLHF's settings, as attributes of its `PolicyLoss`."""
    loss = SimpleNamespace(**{**DEFAULTS, **settings})
    if loss.policy_loss_type == "gspo":
        loss.token_level_loss = False
    return loss


def batch(*, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def logp() -> Tensor:
        return -torch.rand(3, 5, generator=generator, dtype=torch.float64) * 2

    return {
        "log_probs": logp().requires_grad_(),
        "old_log_probs": logp(),
        "advantages": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "action_mask": (torch.arange(5) < torch.tensor([5, 2, 4])[:, None]).float(),
        "rollout_log_probs": logp(),
    }


@pytest.mark.parametrize("case", cases("openrlhf-0.11.2"))
def test_openrlhfs_own_policy_loss(case: dict[str, Any]) -> None:
    inputs = {name: torch.tensor(x, dtype=torch.float64) for name, x in case["inputs"].items()}
    inputs["log_probs"].requires_grad_()
    out = KDRLPolicyLoss(policy_loss(**case["settings"]), distill_loss_weight=0.0)(**inputs, **case["info"])
    close(torch.autograd.grad(out.loss, inputs["log_probs"])[0], case["gradient"], rtol=1e-7)
    assert len(out) == len(case["out"])
    for mine, theirs in zip(out, case["out"], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            close(mine, theirs, rtol=1e-7)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("rolled_out", [True, False])
def test_the_teacher_joins(rolled_out: bool, by_token: bool) -> None:
    inputs = batch()
    if not rolled_out:
        inputs["rollout_log_probs"] = None
    teacher = -torch.rand(3, 5, dtype=torch.float64)
    options = {"rl_loss_weight": 0.7, "distill_loss_weight": 0.2, "kd_reward_clip": 0.9}
    loss = KDRLPolicyLoss(policy_loss(token_level_loss=by_token, dual_clip=3.0), **options)
    loss.teacher_log_probs = teacher
    info = {"dp_size": 2, "batch_num_tokens": torch.tensor(30.0), "global_batch_size": torch.tensor(8.0)}
    out = loss(**inputs, **info)
    flat = {name: None if x is None else x.flatten() for name, x in inputs.items()}
    expected = kdloss.kdrl_loss(
        flat["log_probs"],
        flat["rollout_log_probs"] if rolled_out else flat["old_log_probs"],
        teacher.flatten(),
        flat["advantages"],
        loss_mask=flat["action_mask"].bool(),
        prox_logp=flat["old_log_probs"],
        dual_clip=3.0,
        reduction="token_mean" if by_token else "sequence_mean",
        cu_seqlens=torch.tensor([0, 5, 10, 15]),
        normalizer=15.0 if by_token else 4.0,
        **options,
    )
    torch.testing.assert_close(out.loss, expected.loss)
    gradients = [torch.autograd.grad(x, inputs["log_probs"])[0] for x in (out.loss, expected.loss)]
    torch.testing.assert_close(*gradients)


def test_a_teacher_is_used_once() -> None:
    inputs, loss = batch(), KDRLPolicyLoss(policy_loss(), distill_loss_weight=0.005)
    loss.teacher_log_probs = inputs["old_log_probs"]
    loss(**inputs)
    with pytest.raises(ValueError, match="teacher_log_probs must be set before every call"):
        loss(**inputs)


def test_a_weight_that_changes_counts_from_the_next_call_on() -> None:
    inputs, loss = batch(), KDRLPolicyLoss(policy_loss(), rl_loss_weight=0.0, distill_loss_weight=0.0)
    loss.teacher_log_probs = inputs["old_log_probs"]
    assert loss(**inputs).loss == 0
    loss.distill_loss_weight = 0.3
    with pytest.raises(ValueError, match="teacher_log_probs must be set before every call"):
        loss(**inputs)  # that of the call before was for another batch
    losses = []
    for weight in (0.3, 0.6):
        loss.distill_loss_weight = weight
        loss.teacher_log_probs = inputs["old_log_probs"]
        losses.append(loss(**inputs).loss)
    assert losses[0] != 0
    torch.testing.assert_close(losses[1], 2 * losses[0])


def test_attach_hands_each_experience_its_teacher() -> None:
    inputs = batch()

    class Trainer:
        """The part of `ActorPPOTrainer` that calls its loss."""

        def __init__(self) -> None:
            self.actor_loss_fn: Any = policy_loss(clip_eps_low=0.1)

        def training_step(self, experience: Any, kl_ctl: float, step: int = 0) -> Any:
            rest = {name: x for name, x in inputs.items() if name not in ("log_probs", "old_log_probs", "advantages")}
            return self.actor_loss_fn(inputs["log_probs"], experience.action_log_probs, experience.advantages, **rest)

    trainer = Trainer()
    attach(trainer, teacher=lambda experience: experience.base_action_log_probs, distill_loss_weight=0.3)
    assert trainer.actor_loss_fn.settings.clip_eps_low == 0.1
    for seed in (1, 2):
        teacher = -torch.rand(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        experience = SimpleNamespace(
            action_log_probs=inputs["old_log_probs"], advantages=inputs["advantages"], base_action_log_probs=teacher
        )
        with_teacher = trainer.training_step(experience, 0.0, step=seed)
        loss = KDRLPolicyLoss(policy_loss(clip_eps_low=0.1), distill_loss_weight=0.3)
        loss.teacher_log_probs = teacher
        torch.testing.assert_close(with_teacher.loss, loss(**inputs).loss)
    experience.base_action_log_probs = None
    with pytest.raises(ValueError, match="the teacher gave none for this experience"):
        trainer.training_step(experience, 0.0)


def test_what_is_not_trained_leaves_no_trace() -> None:
    inputs, loss = batch(), KDRLPolicyLoss(policy_loss(is_correction_level="token"), distill_loss_weight=0.005)
    teacher = -torch.rand(3, 5, dtype=torch.float64)
    untrained = inputs["action_mask"] == 0

    def run(fill: float) -> Tensor:
        dirty = {
            k: x if k in ("action_mask", "log_probs") else x.masked_fill(untrained, fill) for k, x in inputs.items()
        }
        loss.teacher_log_probs = teacher.masked_fill(untrained, fill)
        out = loss(**dirty)
        return torch.cat([torch.autograd.grad(out.loss, inputs["log_probs"])[0].flatten(), out.vllm_kl.view(1)])

    torch.testing.assert_close(run(torch.nan), run(0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_loss_type": "reinforce"}, "must be 'ppo' or 'gspo', got 'reinforce'"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "use 'ratio', or is_correction_level='off'"),
    ],
)
def test_settings_that_it_does_not_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDRLPolicyLoss(policy_loss(**settings), distill_loss_weight=0.005)
    for advised in ({"is_correction_gating": "ratio"}, {"is_correction_level": "off"}):
        KDRLPolicyLoss(policy_loss(**settings | advised | {"policy_loss_type": "ppo"}), distill_loss_weight=0.005)


def test_the_policy_loss_of_an_older_openrlhf_is_refused() -> None:
    older = policy_loss()
    del older.is_correction_level
    with pytest.raises(TypeError, match=r"PolicyLoss of OpenRLHF >= 0\.11\.2.*five results"):
        KDRLPolicyLoss(older, distill_loss_weight=0.005)


def test_a_correction_needs_the_policy_that_sampled() -> None:
    inputs = batch() | {"rollout_log_probs": None}
    with pytest.raises(ValueError, match="rollout_log_probs must be given where is_correction_level is not 'off'"):
        KDRLPolicyLoss(policy_loss(is_correction_level="token"), distill_loss_weight=0.0)(**inputs)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    inputs = batch()
    inputs["advantages"] = torch.full_like(inputs["advantages"], torch.nan)
    loss = KDRLPolicyLoss(policy_loss(), rl_loss_weight=0.0, distill_loss_weight=0.005)
    loss.teacher_log_probs = inputs["old_log_probs"]
    out = loss(**inputs).loss
    assert out.isfinite()
    assert torch.autograd.grad(out, inputs["log_probs"])[0].isfinite().all()
    nothing = KDRLPolicyLoss(policy_loss(), rl_loss_weight=0.0, distill_loss_weight=0.0)(**inputs).loss
    assert (torch.autograd.grad(nothing, inputs["log_probs"])[0] == 0).all()
