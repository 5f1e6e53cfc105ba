"""Writes the table of docs/gradients.md: every public loss, run through the auditor.

    python docs/generate_gradient_table.py

A test fails where the committed table is not what this prints. To add a loss, add a row to ROWS.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdloss
from kdloss.testing import Audit, Fit, SequenceTree, audit

PAGE = Path(__file__).parent / "gradients.md"

# three tokens, responses of one to three, prompts of one and two tokens, random policies and rewards
TREE = SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 2))
# batches of two are enumerated in pairs of sequences: one prompt keeps that to 225
PAIRS = SequenceTree(max_length=3, eos=0)
# the other policy is the teacher: what supervised fine-tuning sees
TAUGHT = SequenceTree(max_length=3, eos=0, prompt_lengths=(1, 2), behaviour=TREE.teacher)

Loss = Callable[..., Any]
fixed = {"normalizer": 1.0}  # one sequence a batch: a denominator that does not depend on the samples


class Row(NamedTuple):
    name: str
    loss: Loss
    source: str
    tree: SequenceTree = TREE
    batch_size: int = 1


def reward_surrogate(function: Loss, **keywords: Any) -> Loss:
    """A surrogate with the reward of its sequence as the advantage."""

    def loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        sequence = {"cu_seqlens": cu_seqlens} if function is kdloss.sequence_clipped_surrogate else {}
        value: Tensor = function(logp, old_logp, advantages, loss_mask=loss_mask, **sequence, **keywords).loss
        return value

    return loss


def distilled_surrogate(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
    return kdloss.importance_sampled_surrogate(logp, old_logp, reward, loss_mask=loss_mask).loss


def other_divergence(function: Loss, **keywords: Any) -> Loss:
    """The surrogate on the reward of another divergence."""

    def loss(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
        reward = function(logp, teacher_logp, loss_mask=loss_mask, **keywords)
        return kdloss.importance_sampled_surrogate(logp, old_logp, reward, loss_mask=loss_mask).loss

    return loss


def modulated(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
    both = kdloss.modulate_advantages(advantages, reward, loss_mask=loss_mask, mix=0.5, clip=0.5)
    return kdloss.importance_sampled_surrogate(logp, old_logp, both, loss_mask=loss_mask).loss


def early(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
    weights = kdloss.prefix_weights(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, gain=1.0)
    return kdloss.importance_sampled_surrogate(logp, old_logp, reward, loss_mask=loss_mask, weights=weights).loss


def folded(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
    both = kdloss.fold_kd_reward(advantages, reward, distill_loss_weight=0.3)
    return kdloss.importance_sampled_surrogate(logp, old_logp, both, loss_mask=loss_mask).loss


def fused(
    logits: Tensor, labels: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, loss_mask: Tensor
) -> Tensor:
    """`kdrl_token_loss` inside the head: the logits as hidden states under an identity head."""

    def token_loss(logp: Tensor, entropy: Tensor, *inputs: Tensor) -> Tensor:
        return kdloss.kdrl_token_loss(logp, *inputs, distill_loss_weight=0.3)

    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    inputs = (old_logp, teacher_logp, advantages)
    return kdloss.fused_linear_loss(logits, head, labels, token_loss, *inputs, loss_mask=loss_mask, **fixed).loss


def grouped(function: Loss, **keywords: Any) -> Loss:
    """Advantages within the batch, which is one group, on a loss without clip."""

    def loss(logp: Tensor, old_logp: Tensor, rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        advantages = function(rewards, group_size=rewards.shape[0], **keywords)
        advantages = kdloss.broadcast_to_tokens(advantages, cu_seqlens=cu_seqlens, total_tokens=logp.shape[0])
        surrogate = kdloss.importance_sampled_surrogate(logp, old_logp, advantages, loss_mask=loss_mask)
        return kdloss.token_mean(surrogate.loss, loss_mask=loss_mask, normalizer=rewards.shape[0])

    return loss


def weighted(function: Loss, *, sequences: bool = False, **keywords: Any) -> Loss:
    """GRPO at the first step of an update (prox = student), importance weights from the policy that sampled."""

    def loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        more = {"cu_seqlens": cu_seqlens} if sequences else {}
        weights = function(logp.detach(), old_logp, loss_mask=loss_mask, **more, **keywords)
        prox_logp = logp.detach()
        output = kdloss.grpo_loss(
            logp, old_logp, advantages, loss_mask=loss_mask, prox_logp=prox_logp, weights=weights, **fixed
        )
        return output.loss

    return loss


distill, grpo = kdloss.distillation_loss, kdloss.grpo_loss
kdrl = partial(kdloss.kdrl_loss, distill_loss_weight=0.3)
unclipped = {"clip_low": 1.0, "clip_high": 1e9}
literal = partial(kdrl, direct_penalty=True, **unclipped)
whole = {"sequences": True, "aggregate": "sum", "action": "truncate"}

SCHULMAN = "Schulman 2020"
KDRL, GRPO, PPO = "KDRL, eq. 5", "GRPO, eq. 3", "PPO, eq. 7"

ROWS = {
    "Distillation": [
        Row("`reverse_kl`, from the logits of both", kdloss.reverse_kl, "no sampled token"),
        Row("`distillation_loss`", partial(distill, **fixed), KDRL),
        Row("`importance_sampled_surrogate` on `reverse_kl_reward`", distilled_surrogate, KDRL),
        Row(
            "`importance_sampled_surrogate` on `forward_kl_reward`",
            other_divergence(kdloss.forward_kl_reward),
            "u f' - f",
        ),
        Row("the same on `reverse_kl_reward`, with `prefix_weights`", early, "IW-OPD"),
        Row("`kl_k2` as a loss", kdloss.kl_k2, SCHULMAN),
        Row("`kl_k1` as a loss", kdloss.kl_k1, SCHULMAN),
        Row("`kl_k3` as a loss", kdloss.kl_k3, SCHULMAN),
        Row("`distillation_loss`, `kd_discount=0.5`", partial(distill, kd_discount=0.5, **fixed), "by design"),
        Row("`distillation_loss`, `kd_discount=1`", partial(distill, kd_discount=1.0, **fixed), "chain rule of the KL"),
        Row("`distillation_loss`, `kd_max_ratio=1`", partial(distill, kd_max_ratio=1.0, **fixed), "CISPO, eq. 4"),
        Row("`distillation_loss`, `kd_reward_clip=0.5`", partial(distill, kd_reward_clip=0.5, **fixed), "by design"),
        Row("`distillation_loss`, local count, 2 a batch", distill, "O(1/B)", PAIRS, 2),
        Row("`distillation_loss`, `sequence_mean`", partial(distill, reduction="sequence_mean"), "KDRL, as written"),
        Row("`sft_loss`; the other policy is the teacher", partial(kdloss.sft_loss, **fixed), "KDRL, eq. 2", TAUGHT),
    ],
    "Reinforcement": [
        Row("`importance_sampled_surrogate`", reward_surrogate(kdloss.importance_sampled_surrogate), KDRL),
        Row("`clipped_surrogate`", reward_surrogate(kdloss.clipped_surrogate), PPO),
        Row("`cispo_surrogate`", reward_surrogate(kdloss.cispo_surrogate, clip_high=0.2), "CISPO, eq. 4"),
        Row("`sapo_surrogate`", reward_surrogate(kdloss.sapo_surrogate), "SAPO, eq. 5"),
        Row("`sequence_clipped_surrogate`", reward_surrogate(kdloss.sequence_clipped_surrogate), "GSPO, eq. 13"),
        Row("`grpo_loss`", partial(grpo, **fixed), GRPO),
        Row("`grpo_loss`, `sequence_mean`", partial(grpo, reduction="sequence_mean"), GRPO),
        Row("`grpo_loss`, local count, 2 a batch", grpo, "O(1/B)", PAIRS, 2),
        Row("`leave_one_out_advantages`, G = 2", grouped(kdloss.leave_one_out_advantages), "RLOO", PAIRS, 2),
        Row(
            "`group_relative_advantages` without std, G = 2",
            grouped(kdloss.group_relative_advantages, scale_by_std=False),
            "(G - 1)/G",
            PAIRS,
            2,
        ),
        Row("`group_relative_advantages`, G = 2", grouped(kdloss.group_relative_advantages), "GRPO", PAIRS, 2),
        Row("`truncated_importance_weights`", weighted(kdloss.truncated_importance_weights), "TIS"),
        Row("`masked_importance_weights`", weighted(kdloss.masked_importance_weights), "IcePop"),
        Row(
            "`sequence_importance_weights`, sum, no bound",
            weighted(kdloss.sequence_importance_weights, max_weight=math.inf, **whole),
            "exact",
        ),
        Row(
            "`sequence_importance_weights`, sum, at most 2",
            weighted(kdloss.sequence_importance_weights, max_weight=2.0, **whole),
            "sequence TIS",
        ),
    ],
    "Joint, distillation weight 0.3": [
        Row("`kdrl_loss`", partial(kdrl, **fixed), "KDRL, eq. 8"),
        Row("`kdrl_loss`, no clip in reach", partial(kdrl, **unclipped, **fixed), "KDRL, eq. 8"),
        Row("`kdrl_token_loss`", partial(kdloss.kdrl_token_loss, distill_loss_weight=0.3), "KDRL, eq. 8"),
        Row("`fused_linear_loss` of `kdrl_token_loss`", fused, "KDRL, eq. 8"),
        Row("`modulate_advantages` in `importance_sampled_surrogate`", modulated, "RLSD"),
        Row("`fold_kd_reward` in `importance_sampled_surrogate`", folded, "KDRL, eq. 8"),
        Row("`direct_penalty`, no clip in reach", partial(literal, **fixed), "trainers' joint mode"),
        Row("`direct_penalty`, `sequence_mean`", partial(literal, reduction="sequence_mean"), "trainers' joint mode"),
        Row("`direct_penalty`, local count, 2 a batch", literal, "trainers' joint mode", PAIRS, 2),
    ],
}


def table() -> str:
    """The Markdown between the markers of the page."""
    parts = []
    for title, rows in ROWS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # direct_penalty warns; here it is on display
            reports = [audit(row.loss, row.tree, batch_size=row.batch_size) for row in rows]
        parts.append(f"**{title}**\n\n| loss | on-policy | off-policy | variance | source |\n|---|---|---|---|---|\n")
        for row, report, variance in zip(rows, reports, relative_variances(rows, reports), strict=True):
            cells = (row.name, cell(report.on_policy), cell(report.off_policy), variance, row.source)
            parts.append(f"| {' | '.join(cells)} |\n")
        parts.append("\n")
    return "".join(parts)


def cell(fit: Fit) -> str:
    if fit.is_zero:
        return "**zero**"
    if fit.coefficients:
        return str(fit).replace("||", "‖")
    assert fit.nearest is not None
    name, coefficient, residual = fit.nearest
    return f"biased; nearest {coefficient:.2f} \N{MULTIPLICATION SIGN} {name.replace('||', '‖')}, off by {residual:.2f}"


def relative_variances(rows: list[Row], reports: list[Audit]) -> Iterator[str]:
    """On-policy, per sequence and for a coefficient of 1, over the least among rows of one tree and objective."""
    variances: list[tuple[object, float] | None] = []
    for row, report in zip(rows, reports, strict=True):
        coefficients = report.on_policy.coefficients
        if not coefficients:
            variances.append(None)
            continue
        size = next(iter(coefficients.values()))
        family = (id(row.tree), tuple((name, round(c / size, 6)) for name, c in coefficients.items()))
        variances.append((family, report.on_policy.variance * row.batch_size / size**2))
    for report, entry in zip(reports, variances, strict=True):
        if entry is None:
            yield "noise only" if report.on_policy.is_zero and report.on_policy.variance > 0 else "-"
            continue
        others = [v[1] for v in variances if v is not None and v[0] == entry[0]]
        yield f"{entry[1] / min(others):.2f}" if len(others) > 1 else "-"


def updated(page: str) -> str:
    """The page with its table replaced by what the code gives."""
    return between_marks(page, Path(__file__).name, table())


def between_marks(page: str, script: str, text: str) -> str:
    """The page with `text` in place of what `script` gave before."""
    begin, end = f"<!-- generated by docs/{script}: begin -->\n", "<!-- generated: end -->\n"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text}{end}{after}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
