"""The known objectives of the auditor: closed forms over the whole tree, and their gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdloss.testing._calls import student_gradient
from kdloss.testing._sequence_tree import SequenceTree

# Log-probs are rounded at 1e-16. A gradient smaller than this is rounding alone: the objective is constant on the tree.
_ROUNDING = 1e-14
# Combinations with these are tried last: near p = q all divergences have nearly the same gradient.
DIVERGENCES = ("JSD, beta 0.5", "squared Hellinger", "total variation", "chi-square")
LENGTHS = ("expected length", "expected 1/length", "expected 1/tokens of the batch")
# Off-policy an objective has a variant: one token at a time comes from the student and the others as sampled, or the
# prefixes are the student's and not those visited. On-policy the gradients are equal, and the two count as one.
ON_POLICY_NAME = {
    "reverse KL (token, student's prefixes)": "reverse KL (token)",
    "expected reward (token by token)": "expected reward",
    "expected reward / length (token by token)": "expected reward / length",
}


def known_gradients(
    tree: SequenceTree, under: str, batch_size: int, names: Collection[str] | None = None
) -> dict[str, npt.NDArray[np.float64]]:
    """The flat gradients of the objectives of `names` (None: all) that this tree can identify."""
    known = {
        name: student_gradient(value, tree).flatten().numpy()
        for name, value in _known(tree, under, batch_size).items()
        if names is None or name in names
    }
    # not those that are infinite on this tree (a KL outside the support) or constant (a length without eos)
    sizes = {name: float(np.linalg.norm(g)) for name, g in known.items() if np.isfinite(g).all()}
    # a chi-square may be many orders larger than the others
    largest = max((size for name, size in sizes.items() if not name.startswith(DIVERGENCES)), default=0.0)
    return {name: known[name] for name, size in sizes.items() if size > max(1e-12 * largest, _ROUNDING)}


def _known(tree: SequenceTree, under: str, batch_size: int) -> dict[str, Tensor]:
    """The closed forms, signed so that +1 of each is descended. Of equally small fits the first counts.

    q is the student, p the teacher, mu the policy that samples. `visits` has the probability under mu of each prefix.
    """
    log_q, log_p = tree.student.log_softmax(-1), tree.teacher.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    mu = tree.student if under == "student" else tree.behaviour
    visits = _visits(tree, mu).detach()
    reverse, entropy = (q * (log_q - log_p)).sum(-1), -(q * log_q).sum(-1)

    of_q, of_p, of_mu = (tree.probabilities(policy) for policy in (tree.student, tree.teacher, mu.detach()))
    log_of_q, log_of_p = tree.log_probabilities(tree.student), tree.log_probabilities(tree.teacher)
    length = _lengths(tree)

    known = {
        "reverse KL (token)": (visits * reverse).sum(),
        "reverse KL (sequence)": (of_q * (log_of_q - log_of_p)).sum(),
        "forward KL (token)": (visits[:, None] * p * (log_p - log_q)).sum(),
        "forward KL (sequence)": (of_p * (log_of_p - log_of_q)).sum(),
        "expected reward": -(of_q * tree.rewards).sum(),
        "expected reward / length": -(of_q * tree.rewards / length).sum(),
        "entropy (token)": -(visits * entropy).sum(),
        "entropy (sequence)": (of_q * log_of_q).sum(),
        "expected length": -(of_q * length).sum(),
        "expected 1/length": (of_q / length).sum(),
    }
    if batch_size > 1:
        tokens = _batch_tokens(tree, batch_size)
        inverse = 1 / torch.arange(tokens.shape[0], dtype=torch.float64)
        known["expected 1/tokens of the batch"] = (tokens[1:] * inverse[1:]).sum()
        # the gradient flows through a response's own tokens, and not through those of the others in the batch
        others = _batch_tokens(tree, batch_size - 1).detach()
        share = torch.stack([(others * inverse[n : n + others.shape[0]]).sum() for n in length.long().tolist()])
        known["expected reward / tokens of the batch"] = -batch_size * (of_q * tree.rewards * share).sum()
    if under == "behaviour":
        ratios = _summed_ratios(tree)  # differentiable in one token at a time
        known |= {
            "KL (behaviour || student)": -(of_mu * log_of_q).sum(),
            "reverse KL (token, student's prefixes)": (_visits(tree, tree.student).detach() * reverse).sum(),
            "expected reward (token by token)": -(of_mu * tree.rewards * ratios).sum(),
            "expected reward / length (token by token)": -(of_mu * tree.rewards / length * ratios).sum(),
        }
    of_tokens, of_responses = _divergences(log_q, log_p), _divergences(log_of_q, log_of_p)
    for name in DIVERGENCES:
        known[f"{name} (token)"] = (visits[:, None] * of_tokens[name]).sum()
        known[f"{name} (sequence)"] = of_responses[name].sum() / len(tree.prompt_lengths)
    return known


def _divergences(log_q: Tensor, log_p: Tensor) -> dict[str, Tensor]:
    """The terms of each divergence, whose sum over the outcomes is the divergence, up to a constant.

    Finite, with a finite gradient, where p is 0.
    """
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)  # of the mixture (p + q) / 2
    jsd = 0.5 * log_q.exp() * log_q - log_m.exp() * log_m
    hellinger = -(0.5 * (log_q + log_p)).exp()  # of 1/2 sum (sqrt p - sqrt q)^2 = 1 - sum sqrt(p q)
    variation = 0.5 * (log_q.exp() - log_p.exp()).abs()
    chi_square = (2 * log_p - log_q).exp()  # of sum (p - q)^2 / q = sum p^2 / q - 1
    return dict(zip(DIVERGENCES, (jsd, hellinger, variation, chi_square), strict=True))


def _visits(tree: SequenceTree, policy: Tensor) -> Tensor:
    """(N,) the probability that a response begins with each prefix."""
    log_policy = policy.detach().log_softmax(-1)
    reached: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    row = {prefix: n for n, prefix in enumerate(tree.prefixes)}
    for prompt, tokens in tree.prefixes:  # a parent comes before its children
        parent = (prompt, tokens[:-1])
        reached[prompt, tokens] = (
            reached[parent] + log_policy[row[parent], tokens[-1]] if tokens else log_policy.new_zeros(())
        )
    return torch.stack(list(reached.values())).exp() / len(tree.prompt_lengths)


def _summed_ratios(tree: SequenceTree) -> Tensor:
    """(S,) the sum over a response's tokens of q(token | prefix) / mu(token | prefix)."""
    batch = tree.batch(range(len(tree.sequences)), under="behaviour")
    log_ratio = torch.where(batch.loss_mask, batch.logp - batch.old_logp, -math.inf)
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    return torch.stack([log_ratio[start:stop].exp().sum() for start, stop in bounds])


def _lengths(tree: SequenceTree) -> Tensor:
    return torch.tensor([len(tokens) for _, tokens in tree.sequences], dtype=torch.float64)


def expected_length(tree: SequenceTree) -> Tensor:
    return (tree.probabilities(tree.student) * _lengths(tree)).sum()


def _batch_tokens(tree: SequenceTree, batch_size: int) -> Tensor:
    """(n,) the distribution of the number of response tokens in a batch."""
    of_one = torch.zeros(tree.max_length + 1, dtype=torch.float64)
    of_one = of_one.index_add(0, _lengths(tree).long(), tree.probabilities(tree.student))
    of_batch = torch.ones(1, dtype=torch.float64)
    for _ in range(batch_size):
        parts = [torch.nn.functional.pad(of_batch * p, (n, tree.max_length - n)) for n, p in enumerate(of_one)]
        of_batch = torch.stack(parts).sum(0)
    return of_batch
