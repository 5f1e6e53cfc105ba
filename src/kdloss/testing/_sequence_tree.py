"""A language small enough to list: every sequence of a vocabulary up to a length, with its exact probability.

A policy over it is one row of free logits per prefix, so a gradient with respect to the logits of the root is a
gradient with respect to the first next-token distribution, and nothing hides behind a parametrisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kdloss._packing.layout import broadcast_to_tokens, cu_seqlens_from_lengths


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of a tree packed into one stream; fields are named as the library's arguments are."""

    logits: Tensor  # (T, V) of the student, attached to its parameters
    labels: Tensor  # (T,) int64, -100 where nothing is trained
    logp: Tensor  # (T,) attached
    old_logp: Tensor  # (T,) of the policy that sampled
    teacher_logp: Tensor  # (T,)
    entropy: Tensor  # (T,) of the student, attached
    rewards: Tensor  # (B,)
    advantages: Tensor  # (T,) the reward of its sequence at every token
    loss_mask: Tensor  # (T,) bool
    cu_seqlens: Tensor  # (B + 1,)
    lengths: Tensor = field(repr=False)  # (B,) response tokens

    def named(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


class SequenceTree:
    """Every response over tokens 0 .. V - 1 up to `max_length`, for one or several prompts, and three policies on it.

    A response ends with `eos`, or at `max_length`. Prompts are equally likely, each with a tree of its own; they are
    masked prefixes of the packed stream. Untrained positions hold `garbage` in every floating tensor, NaN by default:
    a loss that lets it through shows.

    Args:
        vocab_size: V >= 2.
        max_length: response tokens of the longest sequence, >= 1.
        eos: the token that ends a response. None: all have `max_length` tokens.
        prompt_lengths: tokens of each prompt, >= 1 (something must predict the first response token).
        seed: of the random policies and rewards.
        scale: standard deviation of the random logits.
        student, teacher, behaviour: (N, V) log-probabilities or logits per prefix, in the order of `prefixes`, in
            place of the random ones. Float64.
        rewards: (S,) one a sequence, in the order of `sequences`, in place of random ones.
        garbage: what untrained positions hold.

    Attributes:
        prefixes: list of (prompt, tokens), where tokens is the part of the response so far; the rows of the policies.
        sequences: list of (prompt, tokens) of whole responses.
        student, teacher, behaviour: (N, V) float64 logits; `student` requires grad.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 3,
        max_length: int = 2,
        eos: int | None = None,
        prompt_lengths: Sequence[int] = (1,),
        seed: int = 0,
        scale: float = 1.0,
        student: Tensor | None = None,
        teacher: Tensor | None = None,
        behaviour: Tensor | None = None,
        rewards: Tensor | None = None,
        garbage: float = math.nan,
    ) -> None:
        if vocab_size < 2 or max_length < 1:
            raise ValueError(f"vocab_size must be >= 2 and max_length >= 1, got {vocab_size} and {max_length}")
        if not prompt_lengths or min(prompt_lengths) < 1:
            raise ValueError(f"prompt_lengths must be >= 1 each, got {tuple(prompt_lengths)}")
        self.vocab_size, self.max_length, self.eos = vocab_size, max_length, eos
        self.prompt_lengths, self.garbage = tuple(prompt_lengths), garbage
        self.prefixes, self.sequences = self._enumerate()
        self._row = {prefix: row for row, prefix in enumerate(self.prefixes)}

        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.prefixes), vocab_size)

        def policy(name: str, given: Tensor | None) -> Tensor:
            # drawn even where it is given, so that giving one policy leaves the others as they were
            drawn = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            if given is None:
                return drawn
            if given.shape != shape:
                raise ValueError(f"{name} must be one row of logits per prefix {shape}, got {tuple(given.shape)}")
            return given.detach().to(torch.float64).clone()

        self.student = policy("student", student).requires_grad_()
        self.teacher = policy("teacher", teacher)
        self.behaviour = policy("behaviour", behaviour)
        drawn_rewards = torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)
        rewards = drawn_rewards if rewards is None else rewards
        if rewards.shape != (len(self.sequences),):
            raise ValueError(f"rewards must be one a sequence ({len(self.sequences)},), got {tuple(rewards.shape)}")
        self.rewards = rewards.to(torch.float64)

    def probabilities(self, policy: Tensor) -> Tensor:
        """(S,) the probability of every sequence under a policy (N, V) of logits; differentiable, summing to 1."""
        return self.log_probabilities(policy).exp() / len(self.prompt_lengths)

    def log_probabilities(self, policy: Tensor) -> Tensor:
        """(S,) the log-probability of every response given its prompt, nats."""
        log_policy = policy.log_softmax(-1)
        return torch.stack([log_policy[rows, tokens].sum() for rows, tokens in map(self._path, self.sequences)])

    def batch(self, indices: Sequence[int], *, under: str = "student") -> TokenBatch:
        """The sequences of `indices`, packed one after the other, with the log-probs of the policy that sampled them.

        Args:
            indices: positions in `sequences`; repeats are legal.
            under: "student" | "behaviour", the policy that sampled: where `old_logp` comes from.
        """
        paths = [self._path(self.sequences[i]) for i in indices]
        prompts = [self.prompt_lengths[self.sequences[i][0]] for i in indices]
        lengths = torch.tensor([prompt + len(rows) for prompt, (rows, _) in zip(prompts, paths, strict=True)])
        cu_seqlens = cu_seqlens_from_lengths(lengths.to(torch.int64))
        total = int(cu_seqlens[-1])

        # the last prompt token predicts the first response token, the last response token predicts nothing
        positions: list[int] = []
        for start, prompt, (rows, _) in zip(cu_seqlens.tolist(), prompts, paths, strict=False):
            positions.extend(range(start + prompt - 1, start + prompt - 1 + len(rows)))
        position = torch.tensor(positions)
        row = torch.cat([rows for rows, _ in paths])
        token = torch.cat([tokens for _, tokens in paths])

        def stream(values: Tensor, fill: float) -> Tensor:
            return values.new_full((total, *values.shape[1:]), fill).index_copy(0, position, values)

        def logp_of(policy: Tensor) -> Tensor:
            return stream(policy.log_softmax(-1)[row, token], self.garbage)

        log_student = self.student.log_softmax(-1)
        old_logp = {"student": self.student, "behaviour": self.behaviour}[under]
        rewards = self.rewards[list(indices)]
        return TokenBatch(
            logits=stream(self.student[row], self.garbage),
            labels=stream(token, -100),
            logp=logp_of(self.student),
            old_logp=logp_of(old_logp.detach()),
            teacher_logp=logp_of(self.teacher),
            entropy=stream(-(log_student.exp() * log_student).sum(-1)[row], self.garbage),
            rewards=rewards,
            advantages=broadcast_to_tokens(rewards, cu_seqlens=cu_seqlens, total_tokens=total),
            loss_mask=torch.zeros(total, dtype=torch.bool).index_fill(0, position, True),
            cu_seqlens=cu_seqlens,
            lengths=torch.tensor([len(rows) for rows, _ in paths]),
        )

    def _enumerate(self) -> tuple[list[tuple[int, tuple[int, ...]]], list[tuple[int, tuple[int, ...]]]]:
        prefixes: list[tuple[int, tuple[int, ...]]] = []
        sequences: list[tuple[int, tuple[int, ...]]] = []
        for prompt in range(len(self.prompt_lengths)):
            level: list[tuple[int, ...]] = [()]
            while level:
                prefixes += [(prompt, tokens) for tokens in level]
                extended = [(*tokens, v) for tokens in level for v in range(self.vocab_size)]
                ended = [t for t in extended if t[-1] == self.eos or len(t) == self.max_length]
                sequences += [(prompt, tokens) for tokens in ended]
                level = [t for t in extended if t not in set(ended)]
        return prefixes, sequences

    def _path(self, sequence: tuple[int, tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Rows of the policies that a response passes through, and the token taken in each."""
        prompt, tokens = sequence
        return torch.tensor([self._row[prompt, tokens[:i]] for i in range(len(tokens))]), torch.tensor(tokens)
