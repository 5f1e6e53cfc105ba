"""Random inputs of each path, the truth, and the check of a contender's results against it.

The truth is the formula of `formulas.py` in float64, chunk by chunk, differentiated by torch.

Logits are N(0, 9), so the largest probabilities are a few percent and neither the peak of the softmax nor its tail is
trivial. Every incoming gradient is random, which finds a peer that assumes ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import formulas
from .cases import Case
from .formulas import Formula

LOGIT_SCALE = 3.0
SEQUENCE = 256  # peers that want (B, L) get the stream as sequences of this length
MASS = 0.9  # of the teacher's K log-probs
# Logits at a time. On a CPU few enough that their memory is reused and not faulted in again.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
FLOAT64_ELEMENTS = 2**29  # of logits, up to which the truth is float64; float32 beyond
SAMPLED_ROWS = 64  # of the gradient of a (T, ...) leaf

# A peer may round to its dtype: a bf16 log-prob near -16 is 2⁻⁴ from its neighbours, and a divergence made from such
# log-probs, and its gradient, are off by more. Ours may not, except where plain torch in the same dtype errs as much.
VALUE_BOUND = {"ours": {"half": 1e-3, "float32": 2e-4}, "peer": {"half": 0.3, "float32": 5e-3}}  # nats
GRADIENT_BOUND = {"ours": {"half": 1e-2, "float32": 2e-4}, "peer": {"half": 0.15, "float32": 5e-3}}  # of the norm
SLACK = 1.05


class Truth(NamedTuple):
    """Every output, and the gradient of each leaf at some of its rows."""

    values: tuple[Tensor, ...]
    gradients: tuple[tuple[Tensor, Tensor], ...]  # rows, and the gradient there


@dataclass(frozen=True)
class Inputs:
    """Arguments of every contender's function, and what its results must be."""

    formula: Formula  # per token
    arguments: tuple[Any, ...]
    upstream: tuple[Tensor, ...]  # gradients of the per-token outputs
    leaves: tuple[int, ...] = (0,)  # positions of what is differentiated
    shared: tuple[int, ...] = ()  # positions of what has no axis of tokens: the heads
    scalar: bool = False  # contenders give the mean, whose upstream gradient is 1

    def incoming(self) -> tuple[Tensor, ...]:
        return (self.upstream[0].new_ones(()),) if self.scalar else self.upstream

    def truth(self, vocab: int) -> Truth:
        """The formula in float64, by chunks of tokens. Rows of gradients: 64 of T, both ends included; all of V."""
        tokens = self.upstream[0].shape[0]
        dtype = torch.float64 if tokens * vocab <= FLOAT64_ELEMENTS else torch.float32
        device = self.upstream[0].device
        step = max(1, CHUNK_ELEMENTS[device.type] // vocab)
        rows = sample(tokens).to(device)
        heads = {i: self.arguments[i].detach().to(dtype).requires_grad_(i in self.leaves) for i in self.shared}
        sums = {i: torch.zeros_like(heads[i]) for i in self.leaves if i in self.shared}
        values, sampled = [], []
        for start in range(0, tokens, step):
            chunk = slice(start, start + step)
            parts = [heads[i] if i in heads else _part(x, chunk, dtype) for i, x in enumerate(self.arguments)]
            leaves = [parts[i].requires_grad_() for i in self.leaves]
            outputs = self.formula(*parts)
            gradients = torch.autograd.grad(outputs, leaves, [g[chunk].to(dtype) for g in self.upstream])
            values.append([x.detach() for x in outputs])
            here = rows[(rows >= start) & (rows < start + step)] - start
            sampled.append([g[here] for i, g in zip(self.leaves, gradients, strict=True) if i not in sums])
            for i, gradient in zip(self.leaves, gradients, strict=True):
                if i in sums:
                    sums[i] += gradient
        of_rows = iter(torch.cat(column) for column in zip(*sampled, strict=True))
        found = tuple(torch.cat(column) for column in zip(*values, strict=True))
        if self.scalar:
            found = ((found[0] * self.upstream[0]).double().sum(),)
        everything = {i: torch.arange(len(x), device=device) for i, x in sums.items()}
        return Truth(
            found, tuple((everything[i], sums[i]) if i in sums else (rows, next(of_rows)) for i in self.leaves)
        )


def _part(x: Tensor, chunk: slice, dtype: torch.dtype) -> Tensor:
    return x[chunk].detach().to(dtype) if x.is_floating_point() else x[chunk]


def sample(size: int) -> Tensor:
    """Up to 64 different indices in order, the same in every run, both ends included."""
    if size <= SAMPLED_ROWS:
        return torch.arange(size)
    inner = torch.randperm(size - 2, generator=torch.Generator().manual_seed(size))[: SAMPLED_ROWS - 2] + 1
    return torch.cat([torch.tensor([0, size - 1]), inner]).sort().values


class Draw:
    """Random tensors of a case, the same in every run."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device

    def normal(self, *shape: int, scale: float, seed: int) -> Tensor:
        """Filled by blocks of rows, so no float32 copy of the whole is made."""
        generator = torch.Generator(self.device).manual_seed(seed)
        out = torch.empty(shape, dtype=getattr(torch, self.case.dtype), device=self.device)
        for rows in out.split(max(1, 2**22 // max(1, math.prod(shape[1:])))):
            rows.copy_(torch.randn(rows.shape, generator=generator, device=self.device).mul_(scale))
        return out

    def logits(self, seed: int = 0) -> Tensor:
        return self.normal(self.case.tokens, self.case.vocab, scale=LOGIT_SCALE, seed=seed)

    def head(self, width: int, seed: int) -> tuple[Tensor, Tensor]:
        """Hidden states and a head whose logits have the scale of `logits`."""
        weight = self.normal(self.case.vocab, width, scale=LOGIT_SCALE / width**0.5, seed=seed + 1)
        return self.normal(self.case.tokens, width, scale=1.0, seed=seed), weight

    def per_token(self, seed: int) -> Tensor:
        return torch.randn(self.case.tokens, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def labels(self) -> Tensor:
        labels = torch.randint(self.case.vocab, (self.case.tokens,), generator=torch.Generator().manual_seed(2))
        labels[0], labels[-1] = 0, self.case.vocab - 1  # both ends
        return labels.to(self.device)

    def mask(self) -> Tensor:
        """Exactly the case's fraction of the tokens, at random places."""
        tokens = self.case.tokens
        mask = torch.zeros(tokens, dtype=torch.bool)
        trained = max(1, round(self.case.trained * tokens))
        mask[torch.randperm(tokens, generator=torch.Generator().manual_seed(3))[:trained]] = True
        return mask.to(self.device)

    def top(self) -> tuple[Tensor, Tensor]:
        """A teacher's log-probs and ids, which are spread over the vocabulary: they meet the most cache lines."""
        case = self.case
        first = torch.randint(case.vocab, (case.tokens, 1), generator=torch.Generator().manual_seed(6))
        ids = (first + torch.arange(case.kept) * (case.vocab // case.kept)) % case.vocab
        kept = self.normal(case.tokens, case.kept, scale=2.0, seed=7).float()
        return torch.log_softmax(kept, -1) + math.log(MASS), ids.to(self.device)

    def policies(self, logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """old_logp, teacher_logp, advantages. Ratios stay within (0.88, 1.13), so rounding never decides a clip."""
        old_logp = logp - 0.04 * self.per_token(7).clamp(-3, 3)
        advantages = self.per_token(9)
        first = torch.arange(len(logp), device=self.device) // SEQUENCE * SEQUENCE
        return old_logp, logp + 0.5 * self.per_token(8), advantages[first]  # one advantage per sequence


def build(case: Case, device: str) -> dict[str, Inputs]:
    """Inputs by name: "" is what contenders get unless they ask for others."""
    draw, path = Draw(case, device), case.path
    upstream = (draw.per_token(4), draw.per_token(5))[: 1 + case.entropy]
    if path == "logits":
        formula: Formula = formulas.logps_entropies if case.entropy else formulas.logps
        return {"": Inputs(formula, (draw.logits().requires_grad_(), draw.labels()), upstream)}
    if path == "tail":
        gather = Inputs(formulas.logps, (draw.logits().requires_grad_(), draw.labels()), upstream)
        logp = 3 * draw.per_token(6) - 12  # of the size that log-probs have
        mask, policies = draw.mask(), draw.policies(logp)
        tail = Inputs(formulas.after_logp, (logp.requires_grad_(), *policies, mask), (mask / mask.sum(),), scalar=True)
        return {"": gather, "tail": tail}
    if path == "topk-forward-kl":
        return {"": Inputs(formulas.topk_forward_kl, (draw.logits().requires_grad_(), *draw.top()), upstream)}
    if not case.width:
        return {
            "": Inputs(partial(formulas.divergence, path), (draw.logits().requires_grad_(), draw.logits(10)), upstream)
        }

    hidden, weight = (x.requires_grad_() for x in draw.head(case.width, 0))
    mask = draw.mask()
    mean = (mask / mask.sum(),)
    labels = draw.labels().masked_fill(~mask, -100)
    make = partial(Inputs, leaves=(0, 1), shared=(1,))
    if path == "hidden":
        formula = formulas.hidden_logps_entropies if case.entropy else formulas.hidden_logps
        return {"": make(formula, (hidden, weight, labels, mask), upstream)}
    if path == "ce":
        return {"": make(formulas.nll, (hidden, weight, labels, mask), mean, scalar=True)}
    if path in ("kdrl", "grpo"):
        with torch.no_grad():
            pairs = zip(hidden.split(SEQUENCE), labels.split(SEQUENCE), mask.split(SEQUENCE), strict=True)
            logp = torch.cat([formulas.hidden_logps(h, weight, y, m)[0] for h, y, m in pairs])
        formula = partial(formulas.after_hidden, formulas.kdrl_tail if path == "kdrl" else formulas.grpo_tail)
        return {"": make(formula, (hidden, weight, labels, mask, *draw.policies(logp)), mean, scalar=True)}
    if path == "linear-topk-forward-kl":
        arguments = (hidden, weight, *draw.top(), mask)
        return {"": make(formulas.linear_topk_forward_kl, arguments, mean, scalar=True)}
    formula = partial(formulas.linear_divergence, path.removeprefix("linear-"))
    arguments = (hidden, weight, *draw.head(case.teacher_width, 10), mask)
    return {"": Inputs(formula, arguments, mean, leaves=(0, 1), shared=(1, 3), scalar=True)}


# --- parity --------------------------------------------------------------------------------------------------------


class Parity(NamedTuple):
    """Errors against the truth, and their bounds."""

    value_error: float  # the largest, in nats; of a scalar, relative where it is above 1
    gradient_error: float  # norm of the difference over norm of the truth, the largest of the leaves
    value_bound: float
    gradient_bound: float

    @property
    def complaint(self) -> str:
        """What is wrong; empty if nothing is."""
        if self.value_error <= self.value_bound and self.gradient_error <= self.gradient_bound:
            return ""
        return (
            f"value error {self.value_error:.2e} (bound {self.value_bound:.2e}), "
            f"gradient error {self.gradient_error:.2e} (bound {self.gradient_bound:.2e})"
        )


def check(
    truth: Truth, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], *, ours: bool, plain: Parity | None = None
) -> Parity:
    """Compares the results of one call with the truth. `plain` is what eager plain torch got: ours may err as much.

    Raises:
        ValueError: the number of outputs or a shape is wrong.
    """
    if len(outputs) != len(truth.values):
        raise ValueError(f"{len(outputs)} outputs, expected {len(truth.values)}")
    value_error = max(_value_error(out, want) for out, want in zip(outputs, truth.values, strict=True))
    pairs = zip(gradients, truth.gradients, strict=True)
    gradient_error = max(_gradient_error(grad, rows, want) for grad, (rows, want) in pairs)
    half, who = "half" if gradients[0].itemsize == 2 else "float32", "ours" if ours else "peer"
    value_bound, gradient_bound = VALUE_BOUND[who][half], GRADIENT_BOUND[who][half]
    if plain and not plain.complaint:
        value_bound = max(value_bound, SLACK * plain.value_error)
        gradient_bound = max(gradient_bound, SLACK * plain.gradient_error)
    return Parity(value_error, gradient_error, value_bound, gradient_bound)


def _value_error(out: Tensor, want: Tensor) -> float:
    if out.shape != want.shape:
        raise ValueError(f"output is {tuple(out.shape)}, expected {tuple(want.shape)}")
    difference = (out.detach().double() - want.double()).abs()
    if want.ndim == 0:
        difference = difference / want.double().abs().clamp(min=1)
    return _or_infinite(float(difference.max()))


def _gradient_error(grad: Tensor, rows: Tensor, want: Tensor) -> float:
    if grad.shape[1:] != want.shape[1:]:
        raise ValueError(f"gradient is {tuple(grad.shape)}, expected rows of {tuple(want.shape[1:])}")
    norm = float(want.norm())
    return _or_infinite(float((grad[rows].to(want.dtype) - want).norm()) / max(norm, 1e-30))


def _or_infinite(x: float) -> float:
    return x if math.isfinite(x) else math.inf
