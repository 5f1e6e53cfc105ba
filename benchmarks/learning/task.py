"""The task: an autokey cipher, of which nothing can be deduced, so that all knowledge comes from a teacher or a reward.

    prompt x_1 .. x_n =      answer y_1 .. y_n <end>      y_1 = T[0, x_1],  y_i = T[y_(i-1), x_i]

T is a random table of 6 x 6 digits: 36 facts. An error carries on, so the prefixes of a student that errs are not those
of its teacher. The verifier wants the whole answer: a guess succeeds once in 6^n.

Prompts are padded on the right to one width, so the digit that an answer needs is always the same distance back.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

SYMBOLS = 6
EQUALS, END, PAD = 6, 7, 8
VOCAB = 9
IGNORED = -100
SPARE = 2  # positions of an answer beyond the longest right one's digits: one for the end, one to be too long


class Messages(NamedTuple):
    """Lengths n between the two bounds, all equally frequent."""

    shortest: int
    longest: int

    @property
    def prompt_width(self) -> int:
        return self.longest + 1

    @property
    def answer_width(self) -> int:
        return self.longest + SPARE

    def draw(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
        """(count, longest) digits, padded on the right. A tenth of all messages is held out."""
        found, missing = [], count
        while missing > 0:
            size = (count + 8) * (11 if held_out else 2)
            options = {"generator": generator, "device": generator.device}
            digits = torch.randint(SYMBOLS, (size, self.longest), **options)  # type: ignore[call-overload]
            lengths = torch.randint(self.shortest, self.longest + 1, (size, 1), **options)  # type: ignore[call-overload]
            digits = torch.where(_places(digits) < lengths, digits, PAD)
            found.append(digits[is_held_out(digits) == held_out][:missing])
            missing -= found[-1].shape[0]
        return torch.cat(found)


def is_held_out(messages: Tensor) -> Tensor:  # (B, n) -> (B,)
    """Whether a message is for evaluation only, by a hash of its digits."""
    powers = torch.tensor([pow(7, i, 1_000_003) for i in range(messages.shape[1])], device=messages.device)
    key = torch.where(messages == PAD, 0, (messages + 1) * powers).sum(1)
    return (key * 2_654_435_761 % 2**32).bitwise_right_shift(16) % 10 == 0


def prompts(messages: Tensor) -> Tensor:  # (B, n) -> (B, n + 1)
    return torch.cat([messages, torch.full_like(messages[:, :1], EQUALS)], 1)


def random_table(generator: torch.Generator) -> Tensor:  # (6, 6)
    """T[previous digit of the answer, digit of the message]."""
    return torch.randint(SYMBOLS, (SYMBOLS, SYMBOLS), generator=generator, device=generator.device)


def right_answers(table: Tensor, messages: Tensor) -> Tensor:  # (B, n) -> (B, n + 2)
    """What the verifier wants: digits, the end, padding."""
    previous, answer = torch.zeros_like(messages[:, 0]), []
    for x in messages.clamp(max=SYMBOLS - 1).unbind(1):
        previous = table[previous, x]
        answer.append(previous)
    return _ended(answer, messages)


def writer(table: Tensor, *, slips: float, wrong: int, trust: float, generator: torch.Generator) -> Tensor:  # (6, 6, 6)
    """Distribution of the next digit, of somebody who knows the table more or less well.

    `wrong` facts have another digit in their place with probability `trust`, and the right one otherwise. A share
    `slips` of all digits is then replaced by a random one; slips=1 writes the right form and knows nothing.
    """
    device = table.device
    right = torch.nn.functional.one_hot(table, SYMBOLS).double()
    shift = torch.randint(1, SYMBOLS, table.shape, generator=generator, device=device)
    other = torch.nn.functional.one_hot((table + shift) % SYMBOLS, SYMBOLS).double()
    chosen = torch.zeros(SYMBOLS**2, dtype=torch.bool, device=device)
    chosen[torch.randperm(SYMBOLS**2, generator=generator, device=device)[:wrong]] = True
    believed = torch.where(chosen.view(SYMBOLS, SYMBOLS, 1), trust * other + (1 - trust) * right, right)
    return (1 - slips) * believed + slips / SYMBOLS


def written(digits: Tensor, messages: Tensor, generator: torch.Generator) -> Tensor:  # (B, n + 2)
    """Answers drawn from `digits` (6, 6, 6), one digit after the other."""
    previous, answer = torch.zeros_like(messages[:, 0]), []
    for x in messages.clamp(max=SYMBOLS - 1).unbind(1):
        previous = torch.multinomial(digits[previous, x], 1, generator=generator).squeeze(1)
        answer.append(previous)
    return _ended(answer, messages)


def _ended(digits: list[Tensor], messages: Tensor) -> Tensor:
    """As many digits as the message has, the end, and padding."""
    answers = torch.stack([*digits, *[torch.full_like(digits[0], PAD)] * SPARE], 1)
    places, lengths = _places(answers), (messages != PAD).sum(1, keepdim=True)
    return torch.where(places < lengths, answers, torch.where(places == lengths, END, PAD))


def labels_of(answers: Tensor) -> Tensor:  # (B, A) -> (B, A)
    """The tokens up to the end, which is the last that counts; -100 after it."""
    ended = (answers == END).cumsum(1) - (answers == END).long() > 0
    return torch.where(ended, IGNORED, answers)


def verify(answers: Tensor, right: Tensor) -> Tensor:  # (B, A), (B, A) -> (B,)
    """1.0 where the whole answer is right, up to its end; else 0.0."""
    return (labels_of(answers) == labels_of(right)).all(1).float()


def stream(device: str, *names: object) -> torch.Generator:
    """A generator of its own for everything that is named, so that no run depends on what ran before it."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def _places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)
