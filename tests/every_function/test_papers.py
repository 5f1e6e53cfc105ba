"""Holds the last column of docs/papers.md: every row's functions, with the gradient or the effect that the row states.

A row of the page without an entry here fails, and so does a row whose calls or words change. Gradients are enumerated
in float64. What they should be is computed without the library.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdloss
from enumeration import (
    assert_differs,
    assert_equal,
    by_hand,
    by_hand_of_batches,
    gradient_of,
    policy_gradient,
    ppo,
    responses,
)
from kdloss import schedules
from kdloss.testing import SequenceTree, audit, expected_gradient

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"

# Responses of one to three of three tokens after prompts of two lengths; and one prompt, whose responses are a group.
TREE = SequenceTree(max_length=3, eos=0, prompt_lengths=(2, 1), seed=2)
GROUP = SequenceTree(max_length=2, eos=0, prompt_lengths=(2,), seed=3)
TAUGHT = SequenceTree(
    max_length=3, eos=0, prompt_lengths=(2, 1), student=TREE.student, teacher=TREE.teacher, behaviour=TREE.teacher
)

Check = Callable[[str], None]  # it takes the name of one function of the row


def rows() -> list[tuple[str, str]]:
    """(calls, what they do) of every row of the page."""
    cells = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)]
    return [(call, words.strip()) for paper, call, words in cells if paper != "paper"]


# --- losses -----------------------------------------------------------------------------------------------------------


def dense(name: str, **options: float) -> Callable[..., Tensor]:
    """A divergence of whole distributions. A linear one takes the logits as hidden states, under an identity head."""
    function = getattr(kdloss, name)
    head = torch.eye(TREE.vocab_size, dtype=torch.float64)

    def of_logits(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        value: Tensor = function(logits, teacher_logits, **options)
        return value

    def of_hidden(logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor) -> Tensor:
        value: Tensor = function(logits, head, teacher_logits, head, loss_mask=loss_mask, **options)
        return value

    return of_hidden if name.startswith("linear_") else of_logits


def top(name: str, k: int = 1, **options: Any) -> Callable[..., Tensor]:
    """A divergence to the teacher's top K."""
    function = getattr(kdloss, name)
    head = torch.eye(TREE.vocab_size, dtype=torch.float64)

    def loss(
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        old_logp: Tensor,
        teacher_logp: Tensor,
        loss_mask: Tensor,
    ) -> Tensor:
        given = teacher_logits.log_softmax(-1).topk(k)
        sampled = (labels, teacher_logp) if "sampled" in name else ()
        more = options | ({"old_logp": old_logp} if sampled else {})
        if name.startswith("linear_"):
            value: Tensor = function(logits, head, *sampled, *given, loss_mask=loss_mask, **more)
        else:
            value = function(logits, *sampled, *given, **more)
        return value

    return loss


def rewarded(name: str, **options: float) -> Callable[..., Tensor]:
    """The surrogate on a reward of the teacher."""

    def loss(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, loss_mask: Tensor) -> Tensor:
        reward = getattr(kdloss, name)(logp, teacher_logp, loss_mask=loss_mask, **options)
        return kdloss.importance_sampled_surrogate(logp, old_logp, reward, loss_mask=loss_mask).loss

    return loss


def weighted(weights_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The policy gradient with weights, as a trainer applies them: the ratio is 1 at the start of an update."""

    def loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        prox_logp = logp.detach()
        weights = weights_of(prox_logp, old_logp, advantages, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
        return kdloss.clipped_surrogate(
            logp, prox_logp, advantages, loss_mask=loss_mask, weights=weights.to(logp.dtype)
        ).loss

    return loss


def joined(advantages_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The surrogate on what a function makes of the teacher's reward and the advantages."""

    def loss(
        logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, loss_mask: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
        both = advantages_of(reward, advantages, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
        return kdloss.importance_sampled_surrogate(logp, old_logp, both, loss_mask=loss_mask).loss

    return loss


def grouped(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Advantages within a batch, which is one group."""

    def loss(logp: Tensor, old_logp: Tensor, rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        advantages = function(rewards, group_size=len(rewards), **options)
        advantages = kdloss.broadcast_to_tokens(advantages, cu_seqlens=cu_seqlens, total_tokens=len(logp))
        surrogate = kdloss.importance_sampled_surrogate(logp, old_logp, advantages, loss_mask=loss_mask)
        return kdloss.token_mean(surrogate.loss, loss_mask=loss_mask, normalizer=len(rewards))

    return loss


# --- objectives -------------------------------------------------------------------------------------------------------


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = 0.3 * p + 0.7 * q
    return 0.3 * kl(p, m) + 0.7 * kl(q, m)


def bucketed(divergence: Callable[[Tensor, Tensor], Tensor], p: Tensor, q: Tensor) -> Tensor:
    """Between the teacher's most probable token and all others together."""
    first = p.argmax(-1, keepdim=True)
    p, q = p.gather(-1, first), q.gather(-1, first)
    return divergence(torch.cat([p, 1 - p], -1), torch.cat([q, 1 - q], -1))


def generalised(forward: bool, p: Tensor, q: Tensor) -> Tensor:
    """sum a log(a/b) - a + b over the teacher's two most probable tokens."""
    ids = p.topk(2).indices
    p, q = p.gather(-1, ids), q.gather(-1, ids)
    a, b = (p, q) if forward else (q, p)
    return (a * (a / b).log() - a + b).sum(-1)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return kl(p, q)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return kl(q, p)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p - q).abs().sum(-1)


def visited(
    divergence: Callable[[Tensor, Tensor], Tensor], *, tree: SequenceTree = TREE, under: str = "student", T=1.0
):
    """The gradient of a divergence D(p, q) of next tokens, summed over the prefixes as often as they are visited."""
    visits = torch.zeros(len(tree.prefixes), dtype=torch.float64)
    for probability, _, prefixes, _ in responses(tree, under):
        visits[prefixes] += probability
    values = divergence((tree.teacher / T).softmax(-1), (tree.student / T).softmax(-1))
    return gradient_of((visits * values).sum(), tree)


def log_ratio(path: Any) -> np.ndarray:
    return np.log(path.p / path.q)


def equals(losses: dict[str, Callable[..., Any]], wanted: Callable[[], Tensor], **options: Any) -> Check:
    """The loss of a function has this expected gradient."""

    def check(name: str) -> None:
        assert_equal(expected_gradient(losses[name], **({"tree": TREE} | options)), wanted())

    return check


def of_dense(names: list[str], divergence: Callable[[Tensor, Tensor], Tensor], **options: float) -> Check:
    return equals({name: dense(name, **options) for name in names}, lambda: visited(divergence))


def raises_reward(losses: dict[str, Callable[..., Any]], **options: Any) -> Check:
    return equals(losses, lambda: -policy_gradient(TREE), **options)


# --- the rows ---------------------------------------------------------------------------------------------------------


def f_divergence(name: str) -> None:
    divergences = {
        "forward_kl_reward": forward_kl,
        "jsd_reward": jsd,
        "squared_hellinger_reward": lambda p, q: 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1),
        "total_variation_reward": total_variation,
    }
    options = {"beta": 0.3} if name == "jsd_reward" else {}
    assert_equal(expected_gradient(rewarded(name, **options), TREE), visited(divergences[name]))


def jsd_at_beta(name: str) -> None:
    if name == "jsd_reward":
        f_divergence(name)
    elif "topk" in name:
        loss = top(name, beta=0.3, tail="bucket")
        assert_equal(expected_gradient(loss, TREE), visited(partial(bucketed, jsd)))
    else:
        of_dense([name], jsd, beta=0.3)(name)


def skewed(name: str) -> None:
    divergences = {
        "skewed_forward_kl": lambda p, q: kl(p, 0.3 * p + 0.7 * q),
        "skewed_reverse_kl": lambda p, q: kl(q, 0.7 * p + 0.3 * q),
    }
    of_dense([name], divergences[name.removeprefix("linear_")], alpha=0.3)(name)


def without_t_squared(name: str) -> None:
    of_dense([name], forward_kl)(name)
    of_dense_at_2 = expected_gradient(dense(name, temperature=2.0), TREE)
    assert_equal(of_dense_at_2, visited(forward_kl, T=2.0))


def generalised_kl(name: str) -> None:
    forward = "forward" in name
    loss = top(name, k=2, tail="generalized")
    assert_equal(expected_gradient(loss, TREE), visited(partial(generalised, forward)))
    agreeing = SequenceTree(max_length=2, eos=0, student=GROUP.teacher, teacher=GROUP.teacher, seed=3)
    assert_equal(expected_gradient(loss, agreeing), torch.zeros_like(agreeing.student))


def bucket(name: str) -> None:
    divergence = forward_kl if "forward" in name else reverse_kl
    assert_equal(expected_gradient(top(name, tail="bucket"), TREE), visited(partial(bucketed, divergence)))
    p, q = TREE.teacher.softmax(-1), TREE.student.softmax(-1)
    batch = TREE.batch(range(len(TREE.sequences)))
    fields = (batch.logits, batch.teacher_logits, batch.labels, batch.old_logp, batch.teacher_logp, batch.loss_mask)
    m = batch.loss_mask
    value = top(name, tail="bucket")(*fields)[m]
    assert (value < divergence(batch.teacher_logits.softmax(-1), batch.logits.softmax(-1))[m]).all()
    assert (bucketed(divergence, p, q) < divergence(p, q)).all()


def baseline(name: str) -> None:
    def loss(
        logp: Tensor,
        old_logp: Tensor,
        teacher_logp: Tensor,
        logits: Tensor,
        teacher_logits: Tensor,
        behaviour_logits: Tensor,
        loss_mask: Tensor,
    ) -> Tensor:
        constant = kdloss.reverse_kl_baseline(logits, teacher_logits, kind="optimal", behaviour_logits=behaviour_logits)
        reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask) - constant
        return kdloss.importance_sampled_surrogate(logp, old_logp, reward, loss_mask=loss_mask).loss

    with_it, without = audit(loss, TREE), audit(rewarded("reverse_kl_reward"), TREE)
    for quieter, louder in ((with_it.on_policy, without.on_policy), (with_it.off_policy, without.off_policy)):
        assert quieter.coefficients.keys() == louder.coefficients.keys() == {"reverse KL (token)"}
        assert quieter.variance < 0.95 * louder.variance


def earlier_weigh_more(name: str) -> None:
    def size(path):
        return np.abs(log_ratio(path))

    def weights(path):
        return 1 + 1.5 * (1 - (np.cumsum(size(path)) - size(path)) / size(path).sum())

    for _, path, _, _ in responses(TREE, "student"):
        assert (np.diff(weights(path)) < 0).all()

    def early(reward, advantages, loss_mask, cu_seqlens):
        w = kdloss.prefix_weights(reward, loss_mask=loss_mask, cu_seqlens=cu_seqlens, gain=1.5)
        return torch.where(loss_mask, w * reward, 0)

    wanted = by_hand(TREE, lambda path: -weights(path) * log_ratio(path))
    assert_equal(expected_gradient(joined(early), TREE), wanted)


def kept_tokens(kept: Callable[[Any], Any], weights_of: Callable[..., Tensor]) -> Check:
    """The policy gradient off-policy, of the tokens that a mask keeps, and the mask drops some."""

    def check(name: str) -> None:
        dropped = [not np.all(kept(path)) for _, path, _, _ in responses(TREE, "behaviour")]
        assert 0 < sum(dropped) < len(dropped)
        wanted = by_hand(TREE, lambda path: -path.reward * np.asarray(kept(path)), under="behaviour")
        assert_equal(expected_gradient(weighted(weights_of), TREE, under="behaviour"), wanted)

    return check


def informative(path: Any) -> np.ndarray:
    """The half of the tokens with the most surprise or disagreement."""

    def scaled(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / np.ptp(x) if np.ptp(x) else 0 * x

    score = 1 - (1 - scaled(-np.log(path.q))) * (1 - scaled(np.abs(log_ratio(path))))
    return score >= np.sort(score)[::-1][max(1, int(0.5 * len(score) + 0.5)) - 1]


def only_informative(name: str) -> None:
    def loss(logp, old_logp, teacher_logp, loss_mask, cu_seqlens):
        kept = kdloss.informative_token_mask(
            -logp, (logp - teacher_logp).abs(), loss_mask=loss_mask, cu_seqlens=cu_seqlens, fraction=0.5
        )
        reward = kdloss.reverse_kl_reward(logp, teacher_logp, loss_mask=loss_mask)
        return kdloss.importance_sampled_surrogate(
            logp, old_logp, reward, loss_mask=loss_mask, weights=kept.to(logp.dtype)
        ).loss

    wanted = by_hand(TREE, lambda path: -log_ratio(path) * informative(path))
    assert_equal(expected_gradient(loss, TREE), wanted)
    assert_differs(wanted, visited(reverse_kl))


def agreement(name: str) -> None:
    def gated(reward, advantages, loss_mask, cu_seqlens):
        return kdloss.gate_kd_reward(reward, advantages, loss_mask=loss_mask)

    def coefficient(path):
        return -np.where(path.reward * log_ratio(path) > 0, log_ratio(path), 0)

    assert_equal(expected_gradient(joined(gated), TREE), by_hand(TREE, coefficient))


def size_not_sign(name: str) -> None:
    sizes = []

    def modulated(reward, advantages, loss_mask, cu_seqlens):
        both = kdloss.modulate_advantages(advantages, reward, loss_mask=loss_mask, mix=0.6, clip=0.3)
        assert torch.equal(both[loss_mask].sign(), advantages[loss_mask].sign())
        sizes.extend((both / advantages)[loss_mask].tolist())
        return both

    def coefficient(path):
        share = np.clip(np.exp(np.sign(path.reward) * log_ratio(path)), 0.7, 1.3)
        return -path.reward * (0.4 + 0.6 * share)

    assert_equal(expected_gradient(joined(modulated), TREE), by_hand(TREE, coefficient))
    assert min(sizes) < 0.9
    assert max(sizes) > 1.1


def longer_prompt(name: str) -> None:
    """The teacher's log-probs are those of the same responses, three tokens later in a longer stream."""

    def loss(logp, old_logp, teacher_logp, loss_mask, cu_seqlens, normalizer=None):
        parts = teacher_logp.split(cu_seqlens.diff().tolist())
        hint = torch.full((3,), torch.nan, dtype=logp.dtype)
        longer = torch.cat([torch.cat([hint, part]) for part in parts])
        masks = [torch.cat([torch.zeros(3, dtype=torch.bool), m]) for m in loss_mask.split(cu_seqlens.diff().tolist())]
        aligned = kdloss.align_responses(
            longer,
            from_mask=torch.cat(masks),
            from_cu_seqlens=cu_seqlens + 3 * torch.arange(len(cu_seqlens)),
            to_mask=loss_mask,
            to_cu_seqlens=cu_seqlens,
            fill=0.0,
        )
        return kdloss.distillation_loss(logp, old_logp, aligned, loss_mask=loss_mask, normalizer=1.0).loss

    assert_equal(expected_gradient(loss, TREE), visited(reverse_kl))


def unsure(name: str) -> None:
    """The recipe adds the forward KL at prefixes where the teacher's entropy is high."""
    recipe = (PAGE.parent / "recipes.md").read_text("utf-8").partition("## Forward KL where the teacher is unsure")[2]
    assert f"kdloss.{name}(logits, teacher_logits)" in recipe.partition("\n## ")[0]
    p = TREE.teacher.softmax(-1)
    bound = -(p * p.log()).sum(-1).median()

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(-1)

    def loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        high = entropy(teacher_logits.softmax(-1)) > bound
        return kdloss.reverse_kl(logits, teacher_logits) + high * kdloss.forward_kl(logits, teacher_logits)

    wanted = visited(lambda p, q: kl(q, p) + (entropy(p) > bound) * kl(p, q))
    assert_equal(expected_gradient(loss, TREE), wanted)


def per_length(name: str) -> None:
    raises_reward({name: partial(kdloss.grpo_loss, normalizer=1.0)})(name)
    loss = partial(kdloss.grpo_loss, reduction="sequence_mean")
    assert_equal(expected_gradient(loss, TREE), by_hand(TREE, lambda path: np.array(-path.reward / len(path.q))))


def over_the_spread(name: str) -> None:
    """Of a group of two that differ, the advantages are +-1/sqrt(2) whatever the rewards are."""

    def coefficients(paths):
        a, b = (path.reward for path in paths)
        return [np.array(-np.sign(a - b) / np.sqrt(2) / 2), np.array(-np.sign(b - a) / np.sqrt(2) / 2)]

    loss = grouped(kdloss.group_relative_advantages, eps=0.0)
    assert_equal(expected_gradient(loss, GROUP, batch_size=2), by_hand_of_batches(GROUP, coefficients, size=2))


def share_of_group(function: Callable[..., Tensor], share: float, **options: Any) -> Check:
    def check(name: str) -> None:
        got = expected_gradient(grouped(function, **options), GROUP, batch_size=2)
        assert_equal(got, -share * policy_gradient(GROUP))

    return check


def clip_around_prox(name: str) -> None:
    """The policy at the start of the update is the teacher here, so that it differs from both others."""

    def loss(logp, old_logp, teacher_logp, advantages, loss_mask, normalizer=None):
        return kdloss.grpo_loss(
            logp, old_logp, advantages, loss_mask=loss_mask, prox_logp=teacher_logp, normalizer=1.0
        ).loss

    wanted = by_hand(TREE, lambda path: ppo(path._replace(mu=path.p), 0.2, 0.2), under="behaviour")
    assert_equal(expected_gradient(loss, TREE, under="behaviour"), wanted)
    assert_differs(wanted, by_hand(TREE, lambda path: ppo(path, 0.2, 0.2), under="behaviour"))


def every_token(name: str) -> None:
    options = {"clip_high": 0.2} if name == "cispo_surrogate" else {"max_ratio": 1.2}
    loss = partial(getattr(kdloss, name), **options)
    raises_reward({name: loss})(name)
    wanted = by_hand(TREE, lambda path: -np.minimum(path.ratio, 1.2) * path.reward, under="behaviour")
    assert_equal(expected_gradient(loss, TREE, under="behaviour"), wanted)
    assert any((path.ratio > 1.2).any() for _, path, _, _ in responses(TREE, "behaviour"))


def corrects(coefficient: Callable[[Any], Any], weights_of: Callable[..., Tensor], *, exact: bool = False) -> Check:
    """The policy gradient with the samples of another policy, up to what bounds it."""

    def check(name: str) -> None:
        got = expected_gradient(weighted(weights_of), TREE, under="behaviour")
        assert_equal(got, by_hand(TREE, lambda path: -path.reward * np.asarray(coefficient(path)), under="behaviour"))
        exactly = by_hand(TREE, lambda path: -path.reward * path.ratio.prod(), under="behaviour")
        assert_equal(exactly, -policy_gradient(TREE))
        if exact:
            assert_equal(got, exactly)
        else:
            assert_differs(got, exactly)

    return check


def sequence_weights(aggregate: str, prox_logp, old_logp, advantages, *, loss_mask, cu_seqlens):
    return kdloss.sequence_importance_weights(
        prox_logp,
        old_logp,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        aggregate=aggregate,
        action="truncate",
        max_weight=torch.inf,
    )


def high_entropy(name: str) -> None:
    """Here a batch is one response, and 0.4 of it is its token of the highest entropy."""

    def loss(logp, old_logp, advantages, entropy, loss_mask, normalizer=None):
        kept = kdloss.top_entropy_mask(entropy, loss_mask=loss_mask, fraction=0.4)
        surrogate = kdloss.importance_sampled_surrogate(logp, old_logp, advantages, loss_mask=loss_mask).loss
        return torch.where(kept, surrogate, 0).sum()

    q = TREE.student.detach().softmax(-1)
    entropies = -(q * q.log()).sum(-1)
    wanted = torch.zeros_like(q)
    for probability, path, prefixes, tokens in responses(TREE, "student"):
        best = int(entropies[prefixes].argmax())
        score = torch.eye(TREE.vocab_size, dtype=torch.float64)[tokens[best]] - q[prefixes[best]]
        wanted[prefixes[best]] -= probability * path.reward * score
    assert_equal(expected_gradient(loss, TREE), wanted)


def falls(name: str) -> None:
    values = [schedules.linear_floor(step, start=0.005, slope=0.001, floor=0.001) for step in range(8)]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (0.005, 0.001)


def over_the_run(name: str) -> None:
    values = [schedules.cosine(step, start=1.0, end=0.0, total_steps=4) for step in range(5)]
    np.testing.assert_allclose(values, [0.5 + 0.5 * np.cos(np.pi * step / 4) for step in range(5)], atol=1e-15)


def wider_above(name: str) -> None:
    loss = partial(getattr(kdloss, name), clip_high=0.4, **({"normalizer": 1.0} if name == "grpo_loss" else {}))
    raises_reward({name: loss})(name)
    wanted = by_hand(TREE, lambda path: ppo(path, 0.2, 0.4), under="behaviour")
    assert_equal(expected_gradient(loss, TREE, under="behaviour"), wanted)
    assert_differs(wanted, by_hand(TREE, lambda path: ppo(path, 0.2, 0.2), under="behaviour"))


def one(name: str, loss: Callable[..., Any] | None = None, **options: Any) -> dict[str, Callable[..., Any]]:
    return {name: partial(loss or getattr(kdloss, name), **options)}


DISTILLATION = [
    (
        "`kdrl_loss`, `kdrl_token_loss`",
        "minus the expected reward, plus KL(q‖p) token by token",
        equals(
            one("kdrl_loss", distill_loss_weight=1.0, normalizer=1.0) | one("kdrl_token_loss", distill_loss_weight=1.0),
            lambda: visited(reverse_kl) - policy_gradient(TREE),
        ),
    ),
    (
        "`distillation_loss`, `importance_sampled_surrogate` on `reverse_kl_reward`",
        "KL(q‖p) token by token",
        equals(
            one("distillation_loss", normalizer=1.0)
            | dict.fromkeys(("importance_sampled_surrogate", "reverse_kl_reward"), rewarded("reverse_kl_reward")),
            lambda: visited(reverse_kl),
        ),
    ),
    (
        "`sft_loss`",
        "KL(p‖q)",
        equals(
            one("sft_loss", normalizer=1.0),
            lambda: visited(forward_kl, tree=TAUGHT, under="behaviour"),
            tree=TAUGHT,
            under="behaviour",
        ),
    ),
    ("`schedules.linear_floor`", "nothing: a weight that falls over training", falls),
    ("`forward_kl`, `linear_forward_kl`", "KL(p‖q), without the T² factor", without_t_squared),
    (
        "`reverse_kl`, `linear_reverse_kl`",
        "KL(q‖p) of each token",
        of_dense(["reverse_kl", "linear_reverse_kl"], reverse_kl),
    ),
    ("`generalized_jsd`, `linear_generalized_jsd`, `jsd_reward`", "the JSD at `beta`", jsd_at_beta),
    (
        '`topk_generalized_jsd`, `linear_topk_generalized_jsd`, `tail="bucket"`',
        "the JSD between the top K and one bucket for the rest",
        jsd_at_beta,
    ),
    (
        "`skewed_forward_kl`, `skewed_reverse_kl`, `linear_skewed_forward_kl`, `linear_skewed_reverse_kl`",
        "the skewed KL at `alpha`",
        skewed,
    ),
    (
        "`total_variation`, `linear_total_variation`",
        "the total variation of each token",
        of_dense(["total_variation", "linear_total_variation"], total_variation),
    ),
    (
        "`kl_k1`",
        "nothing: its expected gradient is zero",
        equals(one("kl_k1"), lambda: torch.zeros_like(TREE.student.detach())),
    ),
    ("`kl_k2`", "KL(q‖p)", equals(one("kl_k2"), lambda: visited(reverse_kl))),
    ("`kl_k3`", "KL(p‖q)", equals(one("kl_k3"), lambda: visited(forward_kl))),
    (
        "`forward_kl_reward`, `jsd_reward`, `squared_hellinger_reward`, `total_variation_reward`",
        "that divergence, [with the term that -f(u) lacks](divergence-rewards.md)",
        f_divergence,
    ),
    (
        '`topk_reverse_kl`, `tail="generalized"`',
        "the generalised KL of the masses on the top K; 0 where they agree",
        generalised_kl,
    ),
    (
        '`topk_forward_kl`, `tail="generalized"`',
        "the generalised forward KL of the masses on the top K; 0 where they agree",
        generalised_kl,
    ),
    (
        '`topk_forward_kl`, `topk_reverse_kl`, `linear_topk_forward_kl`, `linear_topk_reverse_kl`, `tail="bucket"`',
        "the KL between the top K and one bucket for the rest, a lower bound",
        bucket,
    ),
    (
        "`topk_sampled_reverse_kl`, `linear_topk_sampled_reverse_kl`",
        "KL(q‖p), from the top K and one sample",
        equals(
            {name: top(name) for name in ("topk_sampled_reverse_kl", "linear_topk_sampled_reverse_kl")},
            lambda: visited(reverse_kl),
        ),
    ),
    ('`reverse_kl_baseline`, `kind="optimal"`', "the same as without it, with less variance", baseline),
]
VARIANTS = [
    ("`prefix_weights`", "more weight on early tokens", earlier_weigh_more),
    ("`informative_token_mask`", "only the informative tokens of each response", only_informative),
    ("`gate_kd_reward`", "only where teacher and verifier agree", agreement),
    ("`modulate_advantages`", "the size of the advantages, not their sign", size_not_sign),
    ("`align_responses`", "the teacher is the student with a longer prompt", longer_prompt),
    (
        "`forward_kl` beside `reverse_kl`",
        "[a recipe](recipes.md#forward-kl-where-the-teacher-is-unsure)",
        unsure,
    ),
]
REINFORCEMENT = [
    ("`clipped_surrogate`", "minus the expected reward", raises_reward(one("clipped_surrogate"))),
    (
        "`clipped_surrogate`, `dual_clip`",
        "minus the expected reward",
        raises_reward(one("clipped_surrogate", dual_clip=1.5)),
    ),
    (
        "`grpo_loss`",
        'minus the expected reward; with `reduction="sequence_mean"`, minus the reward divided by the length',
        per_length,
    ),
    (
        "`group_relative_advantages`",
        "no expected reward: each group's reward is divided by its own spread",
        over_the_spread,
    ),
    (
        "`grpo_loss`, `clipped_surrogate`, `clip_high`",
        "minus the expected reward; the clip has a bound of its own above",
        wider_above,
    ),
    (
        "`group_relative_advantages`, `scale_by_std=False`",
        "minus (G - 1)/G of the expected reward",
        share_of_group(kdloss.group_relative_advantages, 0.5, scale_by_std=False),
    ),
    ("`leave_one_out_advantages`", "minus the expected reward", share_of_group(kdloss.leave_one_out_advantages, 1.0)),
    ("`grpo_loss`, `prox_logp`", "the clip is around the policy at the start of the update", clip_around_prox),
    (
        "`sequence_clipped_surrogate`",
        "minus the expected reward",
        raises_reward(one("sequence_clipped_surrogate")),
    ),
    (
        '`sequence_importance_weights`, `aggregate="mean"`',
        "corrects the mismatch of the rollout engine, with a biased weight",
        corrects(lambda path: np.exp(np.log(path.ratio).mean()), partial(sequence_weights, "mean")),
    ),
    (
        "`cispo_surrogate`, `importance_sampled_surrogate` with `max_ratio`",
        "minus the expected reward; every token keeps a gradient",
        every_token,
    ),
    (
        "`sapo_surrogate`",
        "minus the expected reward; a soft gate in place of the clip",
        raises_reward(one("sapo_surrogate")),
    ),
    (
        "`truncated_importance_weights`",
        "corrects the mismatch of the rollout engine, with a bounded weight",
        corrects(
            lambda path: np.minimum(path.ratio, 1.5),
            lambda prox, old, _, *, loss_mask, cu_seqlens: kdloss.truncated_importance_weights(
                prox, old, loss_mask=loss_mask, max_weight=1.5
            ),
        ),
    ),
    (
        "`masked_importance_weights`",
        "corrects the same mismatch, and drops tokens beyond the bounds",
        corrects(
            lambda path: np.where((path.ratio >= 0.5) & (path.ratio <= 1.5), path.ratio, 0),
            lambda prox, old, _, *, loss_mask, cu_seqlens: kdloss.masked_importance_weights(
                prox, old, loss_mask=loss_mask, min_weight=0.5, max_weight=1.5
            ),
        ),
    ),
    (
        "`sequence_importance_weights`",
        "corrects the same mismatch of whole responses",
        corrects(lambda path: path.ratio.prod(), partial(sequence_weights, "sum"), exact=True),
    ),
    (
        "`trust_region_mask`",
        "drops tokens too far from the policy that sampled",
        kept_tokens(
            lambda path: ~((path.reward * (path.q - path.mu) > 0) & (np.abs(path.q - path.mu) > 0.1)),
            lambda prox, old, advantages, *, loss_mask, cu_seqlens: kdloss.trust_region_mask(
                prox, old, advantages, loss_mask=loss_mask, max_divergence=0.1
            ),
        ),
    ),
    (
        "`stale_sequence_mask`",
        "drops stale sequences of negative advantage",
        kept_tokens(
            lambda path: not (path.reward < 0 and -np.log(path.ratio).mean() > 0.2),
            lambda prox, old, advantages, *, loss_mask, cu_seqlens: kdloss.stale_sequence_mask(
                prox, old, advantages, loss_mask=loss_mask, cu_seqlens=cu_seqlens, max_divergence=0.2
            ),
        ),
    ),
    ("`top_entropy_mask`", "only tokens of high entropy", high_entropy),
    ("`schedules.cosine`", "nothing: a weight that follows half a cosine over the run", over_the_run),
]
HELD = [*DISTILLATION, *VARIANTS, *REINFORCEMENT]


def functions(call: str) -> list[str]:
    """The functions that the calls of a row name; the rest are arguments."""
    names = [name.removeprefix("schedules.") for name in re.findall(r"`([\w.]+)`", call)]
    return [name for name in names if callable(getattr(kdloss, name, getattr(schedules, name, None)))]


def test_every_row_of_the_page_is_held_and_no_other():
    assert rows() == [(call, words) for call, words, _ in HELD]


@pytest.mark.parametrize(
    ("name", "check"),
    [pytest.param(name, check, id=f"{name}: {words[:40]}") for call, words, check in HELD for name in functions(call)],
)
def test_the_function_does_what_its_row_says(name: str, check: Check):
    check(name)
