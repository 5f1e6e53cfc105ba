"""Writes the entries of docs/wrong-gradients.md: formulas of trainers, their audit, and what to call instead.

    python docs/generate_wrong_gradients.py

A test fails where the committed page is not what this prints. The formulas are written by hand from the sources that
are named. Clips, clamps and denominators are left out. To add an entry, read the source, write the formula and the
kdloss call as two functions, and add a row to ENTRIES.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdloss
from generate_gradient_table import between_marks
from kdloss.testing import Audit, SequenceTree, audit

PAGE = Path(__file__).parent / "wrong-gradients.md"

# three tokens, responses of one to three, random policies and rewards
TREE = SequenceTree(max_length=3, eos=0)


class Entry(NamedTuple):
    title: str
    setting: str
    meant: str
    where: str  # files, lines, version
    formula: Callable[..., Any]
    instead: Callable[..., Any]
    fair: str  # what of that trainer is right


def joint_mode(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor) -> Tensor:
    rl = -(logp - old_logp).exp() * advantages
    return rl + 0.005 * (logp - teacher_logp)


def joint_mode_instead(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, loss_mask: Tensor
) -> Tensor:
    return kdloss.kdrl_token_loss(
        logp,
        old_logp,
        teacher_logp,
        advantages,
        loss_mask=loss_mask,
        distill_loss_weight=0.005,
        clip_low=1.0,  # like the formula, without the clip of PPO
        clip_high=1e9,
    )


def k3_direct(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    log_ratio = teacher_logp - logp
    return log_ratio.exp() - log_ratio - 1


def k3_direct_instead(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
    return kdloss.distillation_loss(logp, old_logp, teacher_logp, loss_mask=loss_mask, normalizer=1.0).loss


def k3_as_reward(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    log_ratio = teacher_logp - logp
    reward = -(log_ratio.exp() - log_ratio - 1).detach()
    return -(logp - old_logp).exp() * reward


def k3_of_a_module(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    difference = teacher_logp - logp
    return difference.expm1() - difference


def topk_penalty(logp: Tensor, old_logp: Tensor, behaviour_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    q, p = behaviour_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    top = q.topk(2)  # the student's, as it sampled
    penalty = (top.values.softmax(-1) * (top.values - p.gather(-1, top.indices))).sum(-1)
    return -(logp - old_logp).exp() * -penalty


def topk_penalty_instead(
    logits: Tensor, labels: Tensor, old_logp: Tensor, teacher_logp: Tensor, teacher_logits: Tensor
) -> Tensor:
    ids = logits.detach().topk(2).indices  # the student's own
    topk_logp = teacher_logits.log_softmax(-1).gather(-1, ids)
    return kdloss.topk_sampled_reverse_kl(logits, labels, teacher_logp, topk_logp, ids, old_logp=old_logp)


def divergence_as_reward(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    u = (teacher_logp - logp).exp()
    reward = -((u.sqrt() - 1) ** 2 / 2).detach()  # -f(u) of the squared Hellinger distance
    return -(logp - old_logp).exp() * reward


def divergence_as_reward_instead(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
    reward = kdloss.squared_hellinger_reward(logp, teacher_logp, loss_mask=loss_mask)
    return kdloss.importance_sampled_surrogate(logp, old_logp, reward, loss_mask=loss_mask).loss


ENTRIES = [
    Entry(
        "AReaL 1.0.4",
        "a `teacher` block, `rl_loss_weight` not 0 (the default is 1.0)",
        "the reverse KL, added to the RL loss",
        """`areal/trainer/ppo/actor.py`, lines 505-510, of the wheel. The defaults, 1.0 and
        `distill_loss_weight: 0.005`, are in `areal/api/cli_args.py`, lines 2936-2944.""",
        joint_mode,
        joint_mode_instead,
        """With `rl_loss_weight: 0` the same function descends the importance-sampled reverse KL (lines 494-502), which
        is right. In the repository in August 2026, the files `gsm8k_grpo_distill_mode_*.yaml` of
        `examples/distillation` set 1.0 and 0.005, and `mopd/mopd_multi.yaml` sets `rl_loss_weight: 0.0`. The weight
        0.005 was tuned on this formula: choose [another](weights.md) for the call above. [The joint
        mode](joint-mode.md) explains more, and [the adapter](integrations/areal.md) replaces the loss inside
        AReaL.""",
    ),
    Entry(
        "verl 0.9.1",
        "`loss_mode=k3`, `use_policy_gradient=false` (the defaults of the YAML)",
        "the reverse KL",
        """`verl/trainer/config/distillation/distillation.yaml`, lines 24 and 43, of the wheel;
        `verl/trainer/distillation/losses.py`, lines 291-300 and 373, where it is a `reverse_kl_estimator`;
        `verl/trainer/ppo/core_algos.py`, lines 2239-2245.""",
        k3_direct,
        k3_direct_instead,
        """A comment of verl (`core_algos.py`, lines 2206-2209) says that the expected gradient of k1 and k3 is not that
        of the KL. For this reason verl refuses `k1` as a direct loss, but its docstring recommends `k3` there.
        `loss_mode=k1 use_policy_gradient=true` descends the reverse KL, and so does `loss_mode=k2` on-policy. Of the
        seven scripts in `examples/on_policy_distillation_trainer` (repository, 22 August 2026), six set k1 with the
        policy gradient, which is right. One sets `forward_kl_topk`, and says so. [The page on
        verl](integrations/verl.md) has the plug-in.""",
    ),
    Entry(
        "verl 0.9.1",
        "`loss_mode=k3`, `use_policy_gradient=true`",
        "the reverse KL",
        """`verl/trainer/distillation/losses.py`, lines 268-288, of the wheel. The defaults of the YAML differ by one
        flag. These two values are the defaults of the dataclass (`verl/workers/config/distillation.py`, lines 65 and
        84), and no check refuses them.""",
        k3_as_reward,
        k3_direct_instead,
        """The docstring of `use_policy_gradient` recommends `loss_mode=k1`, which is right. None of the seven scripts
        combines k3 with it.""",
    ),
    Entry(
        "torchrl 0.14.1",
        '`DistillationLoss(kl_direction="reverse")` (the default)',
        "the reverse KL",
        """`torchrl/objectives/llm/distillation.py`, lines 72-73 and 497-498, of the wheel. The formula has
        `normalize_by_seq_length=False`. The default, True, also divides each response by its length.""",
        k3_of_a_module,
        k3_direct_instead,
        """The docstring of the class says so (lines 145-151): the score-function term is dropped, and the expected
        gradient of both directions is that of the forward KL. `kl_direction="forward"` is right on responses of the
        teacher. [The page on torchrl](integrations/torchrl.md) has the call in its loop.""",
    ),
    Entry(
        "miles, 31f1ca9",
        "`--opd-log-prob-top-k` above 0",
        "the reverse KL on the top k",
        """`miles/rollout/on_policy_distillation.py`, lines 343-347, and
        `miles/backends/training_utils/loss_hub/opd.py`, lines 33-54, at commit 31f1ca9 of 21 August 2026. The formula
        has K = 2 and the defaults `only-student` and `student_p`. A user reported it as radixark/miles#2362.""",
        topk_penalty,
        topk_penalty_instead,
        """All tokens of a position get the same number, so none of them gains on another. With `--opd-log-prob-top-k
        0`, the default, the log-ratio of the sampled token is subtracted, which is right. In
        `examples/on_policy_distillation`, `run-qwen3-8B-opd-megatron.sh` uses 0; `run-qwen3-8B-opd.sh` and
        `run-qwen3-8B-opd-multi-teacher.sh` set 16.""",
    ),
    Entry(
        "No trainer",
        "-f(u), u = p/q, as the reward of a divergence Σ q f(u)",
        "that divergence",
        """This is a general pattern: an estimate of a divergence, detached, is used as a reward. The formula has the
        squared Hellinger distance.""",
        divergence_as_reward,
        divergence_as_reward_instead,
        """For the reverse KL, f(u) = -log u, and this reward is right. [Rewards of
        divergences](divergence-rewards.md) explains why. The library has the right rewards of other divergences:
        `forward_kl_reward`, `jsd_reward`, `squared_hellinger_reward`, `total_variation_reward`.""",
    ),
]


def entries() -> str:
    """The Markdown between the markers of the page: a table, and a section per entry."""
    reports = [audit(entry.formula, TREE) for entry in ENTRIES]
    rows = ["| | trainer | setting | meant | descending it, on-policy |\n|---|---|---|---|---|\n"]
    parts: list[str] = []
    shown: dict[Callable[..., Any], int] = {}
    for number, (entry, report) in enumerate(zip(ENTRIES, reports, strict=True), 1):
        title = f"{number}. {entry.title}: {entry.setting}"
        does = "**an expected gradient of zero**" if report.on_policy.is_zero else str(report.on_policy)
        rows.append(f"| {number} | {entry.title} | {entry.setting} | {entry.meant} | {does} |\n")
        parts.append(f"## {title}\n\n{wrapped(entry.where)}\n{code(entry.formula)}\n{said(report)}\n")
        if entry.instead in shown:
            parts.append(f"Meant: {entry.meant}. The call is the same as in entry {shown[entry.instead]}.\n\n")
        else:
            shown[entry.instead] = number
            instead = audit(entry.instead, TREE)
            parts.append(f"Meant: {entry.meant}.\n\n{code(entry.instead)}\n{said(instead)}\n")
        parts.append(f"{wrapped(entry.fair)}\n")
    return "".join([*rows, "\n", *parts])


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def code(function: Callable[..., Any]) -> str:
    return f"```python\n{inspect.getsource(function)}```\n"


def said(report: Audit) -> str:
    """What the audit prints, as a quotation, without residuals of rounding: they differ from machine to machine."""
    first, *others = (re.sub(r"; residual \de-1\d$", "", sentence) for sentence in report.verdicts)
    on, off = report.on_policy, report.off_policy
    same = report.scope == "any behaviour policy" or (on.is_zero and off.is_zero)
    elsewhere = "the same holds" if same and "token by" not in str(off) else f"it {off}"
    # the sentence on the scope begins with "right" where a result is known, whatever was meant
    kept = [sentence for sentence in others if not sentence.startswith(("right", "from another"))]
    lines = [first, f"from another policy's samples {elsewhere}", *kept]
    return "".join(f"> {line.replace('||', '‖')}\\\n" for line in lines[:-1]) + f"> {lines[-1].replace('||', '‖')}\n"


def updated(page: str) -> str:
    """The page with its entries replaced by what the code gives."""
    return between_marks(page, Path(__file__).name, entries())


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
