"""A language small enough to list: every sequence of a vocabulary up to a length, with its exact probability.

A policy is one row of free logits per prefix. The gradient with respect to the logits of the root is therefore the
gradient with respect to the first next-token distribution, without a model in between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss._packing.layout import cu_seqlens_from_lengths

_KEPT_LAYOUTS = 1024  # of batches of one tree; all batches of two sequences of a tree of 32


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of a tree, packed into one stream at prediction positions. Fields have the library's argument names.

    Attributes:
        logits: (T, V) of the student, differentiable in its logits.
        labels: (T,) int64, -100 at untrained positions.
        logp: (T,) log-probs of the labels under the student, nats, differentiable in its logits.
        old_logp: (T,) log-probs under the policy that sampled, nats, detached.
        teacher_logp: (T,) log-probs under the teacher, nats.
        entropy: (T,) of the student's next-token distribution, nats, differentiable in its logits.
        rewards: (B,) one per sequence.
        advantages: (T,) the reward of the sequence, at each of its tokens.
        loss_mask: (T,) bool, True where the label is a response token.
        cu_seqlens: (B + 1,) int64, cumulative lengths, prompts included.
        lengths: (B,) int64, response tokens per sequence.
        teacher_logits: (T, V) of the teacher. Its top K are `teacher_logits.log_softmax(-1).topk(K)`.
        behaviour_logits: (T, V) of the policy that sampled, detached.

    Example:
        >>> from kdloss.testing import SequenceTree, TokenBatch
        >>> batch: TokenBatch = SequenceTree(vocab_size=2, max_length=2, prompt_lengths=(2,)).batch([0])
        >>> batch.labels.tolist()
        [-100, 0, 0, -100]
        >>> batch.loss_mask.tolist()
        [False, True, True, False]
    """

    logits: Tensor
    labels: Tensor
    logp: Tensor
    old_logp: Tensor
    teacher_logp: Tensor
    entropy: Tensor
    rewards: Tensor
    advantages: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    lengths: Tensor = field(repr=False)
    teacher_logits: Tensor
    behaviour_logits: Tensor

    def named(self) -> dict[str, Any]:
        """The fields as keyword arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class _Layout(NamedTuple):
    """Where the N response tokens of a batch of B sequences lie in its stream of T tokens."""

    row: Tensor  # (N,) the prefix before each response token: a row of the policies
    token: Tensor  # (N,) the response tokens
    position: Tensor  # (N,) their prediction positions
    owner: Tensor  # (T,) the sequence of each token
    lengths: Tensor  # (B,) response tokens
    cu_seqlens: Tensor  # (B + 1,) of prompts and responses


class SequenceTree:
    """Every response over tokens 0 .. V - 1 up to `max_length`, for one or several prompts, with three policies.

    A response ends with `eos` or at `max_length`. Prompts are equally likely. Each has a tree of its own, and is an
    untrained prefix of its sequences in the packed stream. Untrained positions of every floating tensor hold `garbage`:
    with NaN, the default, a loss that reads them shows it.

    Args:
        vocab_size: V, at least 2.
        max_length: response tokens of the longest sequence, at least 1.
        eos: the token that ends a response. None: every response has `max_length` tokens.
        prompt_lengths: tokens of each prompt, at least 1, because the last one predicts the first response token.
        seed: of the random policies and rewards.
        scale: standard deviation of the random logits.
        student, teacher, behaviour: (N, V) logits or log-probs per prefix, in the order of `prefixes`; converted to
            float64. None: random.
        rewards: (S,) one per sequence, in the order of `sequences`. None: random.
        garbage: the value at untrained positions.

    Attributes:
        prefixes: list of N pairs (prompt, tokens), where tokens is the response so far: the rows of the policies.
        sequences: list of S pairs (prompt, tokens), where tokens is a whole response.
        student, teacher, behaviour: (N, V) float64 logits; `student` requires grad.
        rewards: (S,) float64.

    Raises:
        ValueError: `vocab_size`, `max_length` or a prompt length is too small, or a policy or `rewards` has another
            shape.

    Example:
        >>> from kdloss.testing import SequenceTree
        >>> tree = SequenceTree(vocab_size=2, max_length=2, eos=0)
        >>> tree.sequences
        [(0, (0,)), (0, (1, 0)), (0, (1, 1))]
        >>> round(tree.probabilities(tree.student).sum().item(), 9)
        1.0
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
        self._layouts: dict[tuple[int, ...], _Layout] = {}
        self._row = {prefix: row for row, prefix in enumerate(self.prefixes)}

        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.prefixes), vocab_size)

        def policy(name: str, given: Tensor | None) -> Tensor:
            # drawn even if it is given, so that giving one policy does not change the others
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
            raise ValueError(f"rewards must be one per sequence ({len(self.sequences)},), got {tuple(rewards.shape)}")
        self.rewards = rewards.to(torch.float64)

    def probabilities(self, policy: Tensor) -> Tensor:
        """(S,) the probability of every sequence under a policy, (N, V) logits; sums to 1, differentiable in them."""
        return self.log_probabilities(policy).exp() / len(self.prompt_lengths)

    def log_probabilities(self, policy: Tensor) -> Tensor:
        """(S,) the log-prob of every response given its prompt under a policy, (N, V) logits; nats, differentiable."""
        layout = self._layout(tuple(range(len(self.sequences))))
        of_tokens = policy.log_softmax(-1)[layout.row, layout.token]
        sequence = torch.repeat_interleave(layout.lengths)
        return of_tokens.new_zeros(len(self.sequences)).index_add(0, sequence, of_tokens)

    def batch(self, indices: Sequence[int], *, under: str = "student") -> TokenBatch:
        """The sequences of `indices`, packed in that order.

        Args:
            indices: positions in `sequences`; they may repeat.
            under: "student" | "behaviour", the policy that sampled, of which `old_logp` are the log-probs.

        Returns:
            `TokenBatch`.
        """
        return batch_and_rows(self, indices, under)[0]

    def _layout(self, indices: tuple[int, ...]) -> _Layout:
        """The layout of a batch, kept: the same batches are asked for again and again."""
        if indices in self._layouts:
            return self._layouts[indices]
        paths = [self._path(self.sequences[i]) for i in indices]
        prompts = [self.prompt_lengths[self.sequences[i][0]] for i in indices]
        lengths = torch.tensor([prompt + len(rows) for prompt, (rows, _) in zip(prompts, paths, strict=True)])
        cu_seqlens = cu_seqlens_from_lengths(lengths.to(torch.int64))

        # the last prompt token predicts the first response token, the last response token predicts nothing
        positions: list[int] = []
        for start, prompt, (rows, _) in zip(cu_seqlens.tolist(), prompts, paths, strict=False):
            positions.extend(range(start + prompt - 1, start + prompt - 1 + len(rows)))
        layout = _Layout(
            row=torch.cat([rows for rows, _ in paths]),
            token=torch.cat([tokens for _, tokens in paths]),
            position=torch.tensor(positions),
            owner=torch.repeat_interleave(lengths),
            lengths=torch.tensor([len(rows) for rows, _ in paths]),
            cu_seqlens=cu_seqlens,
        )
        if len(self._layouts) < _KEPT_LAYOUTS:
            self._layouts[indices] = layout
        return layout

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
        """The rows of the policies for a response's prefixes, and the token that follows each."""
        prompt, tokens = sequence
        return torch.tensor([self._row[prompt, tokens[:i]] for i in range(len(tokens))]), torch.tensor(tokens)


def replaced(tree: SequenceTree, **tensors: Tensor) -> SequenceTree:
    """The same language with other policies or rewards."""
    other = copy.copy(tree)
    for name, tensor in tensors.items():
        setattr(other, name, tensor.detach().requires_grad_(name == "student"))
    return other


def batch_and_rows(tree: SequenceTree, indices: Sequence[int], under: str) -> tuple[TokenBatch, Tensor, Tensor]:
    """A batch, the (P, V) logits of the student before each of its P response tokens, and their (P,) prefixes.

    All that a batch has of the student is computed from these rows. So the gradient in them tells the sequences apart,
    where the gradient in the student's logits is their sum.
    """
    layout = tree._layout(tuple(indices))
    rows = tree.student.index_select(0, layout.row)
    behaviour = {"student": rows, "behaviour": tree.behaviour.index_select(0, layout.row)}[under].detach()
    teacher = tree.teacher.index_select(0, layout.row)
    log_student = rows.log_softmax(-1)

    def stream(values: Tensor, fill: float) -> Tensor:
        return values.new_full((len(layout.owner), *values.shape[1:]), fill).index_copy(0, layout.position, values)

    def logp_of(log_policy: Tensor) -> Tensor:
        return stream(log_policy.gather(-1, layout.token[:, None]).squeeze(-1), tree.garbage)

    rewards = tree.rewards[list(indices)]
    batch = TokenBatch(
        logits=stream(rows, tree.garbage),
        labels=stream(layout.token, -100),
        logp=logp_of(log_student),
        old_logp=logp_of(behaviour.log_softmax(-1)),
        teacher_logp=logp_of(teacher.log_softmax(-1)),
        entropy=stream(-(log_student.exp() * log_student).sum(-1), tree.garbage),
        rewards=rewards,
        advantages=rewards[layout.owner],
        loss_mask=torch.zeros(len(layout.owner), dtype=torch.bool).index_fill(0, layout.position, True),
        cu_seqlens=layout.cu_seqlens.clone(),  # a loss that writes to it changes no other batch
        lengths=layout.lengths.clone(),
        teacher_logits=stream(teacher, tree.garbage),
        behaviour_logits=stream(behaviour, tree.garbage),
    )
    return batch, rows, layout.row
