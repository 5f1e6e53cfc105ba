"""Holds 42 cases computed by AReaL 1.0.4's own loss function: the same loss and the same gradient.

Its joint mode is the literal penalty, so those cases run with `direct_penalty=True`; the others need no option. Its RL
ratio is to `prox_logp`, its distillation ratio to the policy that sampled.

Tolerances: rtol 1e-12 in float64, which allows only rounding (a bound kept in float32 is off by 1e-8), and 2e-6 in
float32, some 16 roundings.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdloss

DATA = Path(__file__).parents[1] / "data"
SMALL = json.loads((DATA / "areal-1.0.4.json").read_text())
PACKED = json.loads((DATA / "areal-1.0.4-packed.json").read_text())


def check(loss: Tensor, logp: Tensor, case: dict[str, Any]) -> None:
    loss.backward()
    rtol = 1e-12 if logp.dtype == torch.float64 else 2e-6
    expected = torch.tensor(case["grad"], dtype=logp.dtype)
    torch.testing.assert_close(loss.detach(), torch.tensor(case["loss"], dtype=logp.dtype), rtol=rtol, atol=0)
    # a gradient entry is compared on the scale of the largest: entries near zero come from a difference
    torch.testing.assert_close(logp.grad, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def objective(
    mode: str,
    logp: Tensor,
    old_logp: Tensor,
    teacher_logp: Tensor | None,
    advantages: Tensor,
    case: dict,
    **options: Any,
) -> Tensor:
    if mode == "grpo":
        return kdloss.grpo_loss(logp, old_logp, advantages, **options).loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of direct_penalty, on purpose here
        return kdloss.kdrl_loss(
            logp,
            old_logp,
            teacher_logp,
            advantages,
            rl_loss_weight=case["rl_loss_weight"],
            distill_loss_weight=case["distill_loss_weight"],
            direct_penalty=mode == "joint",
            **options,
        ).loss


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c['mode']}-{'packed' if c['packed'] else 'padded'}-{c['dtype']}") for c in SMALL]
)
def test_small_cases(case: dict[str, Any]) -> None:
    assert set(case["kw"]) == {"eps_clip", "eps_clip_higher", "c_clip"}
    dtype = getattr(torch, case["dtype"].removeprefix("torch."))
    inputs = case["inputs"]

    def tensor(name: str) -> Tensor | None:
        return torch.tensor(inputs[name], dtype=dtype) if name in inputs else None

    logp = torch.tensor(case["logprobs"], dtype=dtype, requires_grad=True)
    loss = objective(
        case["mode"],
        logp,
        tensor("logprobs"),
        tensor("teacher_logp"),
        tensor("advantages"),
        inputs,
        loss_mask=torch.tensor(inputs["loss_mask"]).bool(),
        prox_logp=tensor("prox_logp"),
        clip_low=case["kw"]["eps_clip"],
        clip_high=case["kw"]["eps_clip_higher"],
        dual_clip=case["kw"]["c_clip"],
    )
    check(loss, logp, case)


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c['tag']}-{sum(c['lens'])}") for c in PACKED])
def test_packed_cases(case: dict[str, Any]) -> None:
    logp, old_logp, prox_logp, teacher_logp, advantages = (
        torch.tensor(case[name], dtype=torch.float64)
        for name in ("logp", "old_logp", "prox_logp", "teacher_logp", "advantages")
    )
    logp.requires_grad_()
    loss_mask = torch.tensor(case["loss_mask"])
    kw = dict(case["kw"])
    clip_low = kw.pop("eps_clip")
    clip_high = kw.pop("eps_clip_higher") or clip_low
    dual_clip = kw.pop("c_clip")
    if kw.pop("use_sapo_loss", False):
        surrogate = kdloss.sapo_surrogate(
            logp,
            prox_logp,
            advantages,
            loss_mask=loss_mask,
            tau_positive=kw.pop("sapo_tau_pos"),
            tau_negative=kw.pop("sapo_tau_neg"),
        )
        loss = kdloss.token_mean(surrogate.loss, loss_mask=loss_mask)
    elif kw.pop("importance_sampling_level", "token") == "sequence":
        surrogate = kdloss.sequence_clipped_surrogate(
            logp,
            prox_logp,
            advantages,
            loss_mask=loss_mask,
            cu_seqlens=kdloss.cu_seqlens_from_lengths(torch.tensor(case["lens"])),
            clip_low=clip_low,
            clip_high=clip_high,
        )
        loss = kdloss.token_mean(surrogate.loss, loss_mask=loss_mask)
    else:
        loss = objective(
            case["mode"],
            logp,
            old_logp,
            teacher_logp,
            advantages,
            case,
            loss_mask=loss_mask,
            prox_logp=prox_logp,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )
    assert not kw, "an option of the case was not used"
    check(loss, logp, case)


def test_every_mode_is_there() -> None:
    assert len(SMALL) == 12
    assert len(PACKED) == 30
    assert {c["mode"] for c in SMALL} == {"grpo", "kd", "joint"}
    assert {c["tag"][:4] for c in PACKED} >= {"kd0", "kd1", "join", "grpo", "gspo", "sapo"}
