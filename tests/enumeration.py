"""Expected gradients by hand: NumPy enumeration of a `SequenceTree`, from the coefficient of every token.

A loss is given by c_t = d loss / d logp_t. Its gradient, d loss / d logits = sum over t of c_t (onehot(o_t) - q_t), is
averaged over responses, or batches of them, weighted by their probabilities. The library is not used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdloss.testing import SequenceTree

# float64; sums of at most 30 responses (343 groups of them), whose terms of order 1 round at 1e-16 each
assert_equal = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


class Path(NamedTuple):
    """One response, token by token: what a coefficient may depend on."""

    q: np.ndarray  # (n,) probability of each token taken, under the student
    mu: np.ndarray  # (n,) under the policy that sampled
    p: np.ndarray  # (n,) under the teacher
    reward: float

    @property
    def ratio(self) -> np.ndarray:
        return self.q / self.mu


def distributions(logits: Tensor) -> np.ndarray:
    weights = np.exp(logits.detach().numpy())
    return weights / weights.sum(-1, keepdims=True)


def responses(tree: SequenceTree, under: str) -> list[tuple[float, Path, list[int], tuple[int, ...]]]:
    """(probability, path, rows of the policies along the path, tokens) of every response."""
    q, p = distributions(tree.student), distributions(tree.teacher)
    mu = {"student": q, "behaviour": distributions(tree.behaviour)}[under]
    listed = []
    for (prompt, tokens), reward in zip(tree.sequences, tree.rewards.tolist(), strict=True):
        rows = [tree.prefixes.index((prompt, tokens[:i])) for i in range(len(tokens))]
        path = Path(q[rows, tokens], mu[rows, tokens], p[rows, tokens], reward)
        listed.append((float(path.mu.prod()) / len(tree.prompt_lengths), path, rows, tokens))
    return listed


def by_hand(tree: SequenceTree, coefficient: Callable[[Path], np.ndarray], *, under: str = "student") -> Tensor:
    """E of d loss / d logits, from d loss / d logp of every token of a response."""
    q, total = distributions(tree.student), np.zeros(tree.student.shape)
    for probability, path, rows, tokens in responses(tree, under):
        for row, token, c in zip(rows, tokens, np.broadcast_to(coefficient(path), len(tokens)), strict=True):
            total[row] += probability * c * (np.eye(tree.vocab_size)[token] - q[row])
    return torch.from_numpy(total)


def by_hand_of_batches(
    tree: SequenceTree, coefficients: Callable[[list[Path]], list[np.ndarray]], *, size: int, under: str = "student"
) -> Tensor:
    """E of d loss / d logits for a loss that couples the `size` responses of a batch."""
    q, total = distributions(tree.student), np.zeros(tree.student.shape)
    for batch in itertools.product(responses(tree, under), repeat=size):
        probability = math.prod(member[0] for member in batch)
        for (_, _, rows, tokens), c in zip(batch, coefficients([member[1] for member in batch]), strict=True):
            for row, token, c_t in zip(rows, tokens, np.broadcast_to(c, len(tokens)), strict=True):
                total[row] += probability * c_t * (np.eye(tree.vocab_size)[token] - q[row])
    return torch.from_numpy(total)


def gradient_of(objective: Tensor, tree: SequenceTree) -> Tensor:
    return torch.autograd.grad(objective, tree.student)[0]


def policy_gradient(tree: SequenceTree) -> Tensor:
    """The gradient of the expected reward, by differentiating the enumerated expectation."""
    return gradient_of((tree.probabilities(tree.student) * tree.rewards).sum(), tree)


def token_level_gradient(tree: SequenceTree) -> Tensor:
    """The gradient of sum over prefixes h of mu(h) * sum over v of q(v | h) Q(h, v), Q = E_mu[reward | h, v]."""
    visits = np.zeros(tree.student.shape)
    rewarded = np.zeros(tree.student.shape)
    for probability, path, rows, tokens in responses(tree, "behaviour"):
        for row, token in zip(rows, tokens, strict=True):
            visits[row, token] += probability
            rewarded[row, token] += probability * path.reward
    weight = torch.from_numpy(visits.sum(-1, keepdims=True) * rewarded / visits)
    return gradient_of((weight * tree.student.softmax(-1)).sum(), tree)


def assert_differs(gradient: Tensor, *others: Tensor):
    """Different by at least a hundredth of its norm: a bias that a test of equality cannot miss."""
    for other in others:
        assert (gradient - other).norm() > 1e-2 * other.norm()


def assert_not_parallel(gradient: Tensor, other: Tensor):
    """Not a multiple either: another objective, and not only another learning rate."""
    scale = (gradient * other).sum() / other.square().sum()
    assert_differs(gradient, scale * other)


def returns_to_go(path, discount):
    """Returns of log p - log q: a later token counts discount to the power of its distance."""
    rewards = np.log(path.p / path.q)
    return np.array([sum(discount**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))])


def ppo(path, low, high, dual=math.inf):
    a, rho = path.reward, path.ratio
    stopped = (rho > 1 + high) if a > 0 else (rho < 1 - low) | (rho > dual)
    return np.where(stopped, 0, -rho * a)
