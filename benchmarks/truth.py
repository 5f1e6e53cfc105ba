"""What the results must be: the formulas in float32, or float64 where the case is small, chunk by chunk.

Values are held at every token, gradients at sampled rows (first and last among them): a row of dlogits or dH follows
from one token, and a row of dW, which sums over all tokens, needs only one column of the logits beside each token's
log-sum-exp. So one product with the head is enough for a truth of all of it. Nothing here is differentiated by torch.

    dz = g (onehot - p) - e p (log p + H),   dH = dz W,   dW = dzᵀ H,     g, e: gradients of log-prob and entropy
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # of logits at a time
SMALL = 2**24  # elements of the logits up to which the truth is float64
SAMPLED_ROWS = 64


class Rows(NamedTuple):
    """Some rows of a leaf's gradient."""

    rows: Tensor  # (n,) int64
    expected: Tensor  # (n, ...)


@dataclass(frozen=True)
class Truth:
    """Outputs and gradients, and the error in value of the plain formula in the inputs' dtype, for comparison."""

    values: tuple[Tensor, ...]
    gradients: tuple[Rows, ...]  # one a leaf
    torch_error: float = 0.0


class Forward(NamedTuple):
    """Log-probs, entropies and log-sum-exps of every token."""

    logp: Tensor  # (T,)
    entropy: Tensor  # (T,)
    lse: Tensor  # (T,)
    torch_error: float


class Source:
    """Logits by rows or columns, from themselves or from hidden states and a head, in the truth's dtype."""

    def __init__(self, logits: Tensor | None = None, hidden: Tensor | None = None, weight: Tensor | None = None):
        self.logits = None if logits is None else logits.detach()
        first = self.logits if self.logits is not None else hidden
        if first is None or (self.logits is None and weight is None):
            raise ValueError("Source needs logits, or hidden and weight")
        self.tokens = first.shape[0]
        self.vocab = self.logits.shape[1] if self.logits is not None else weight.shape[0]  # type: ignore[union-attr]
        self.dtype = torch.float64 if self.tokens * self.vocab <= SMALL else torch.float32
        self.half = first.dtype
        self.raw = None if hidden is None or weight is None else (hidden.detach(), weight.detach())
        self.wide = None if self.raw is None else (self.raw[0].to(self.dtype), self.raw[1].to(self.dtype))

    def rows(self, index: slice | Tensor) -> Tensor:
        if self.logits is not None:
            return self.logits[index].to(self.dtype)
        hidden, weight = self.wide  # type: ignore[misc]
        return hidden[index] @ weight.T

    def columns(self, index: Tensor) -> Tensor:
        if self.logits is not None:
            return self.logits[:, index].to(self.dtype)
        hidden, weight = self.wide  # type: ignore[misc]
        return hidden @ weight[index].T

    def rounded_rows(self, index: Tensor) -> Tensor:
        """As the plain formula has them: the product rounded to the inputs' dtype."""
        if self.raw is None:
            return self.rows(index)
        return (self.raw[0][index] @ self.raw[1].T).to(self.dtype)


def forward(source: Source, labels: Tensor) -> Forward:
    """One pass over the tokens; `labels` holds a token of the vocabulary everywhere."""
    step = max(1, CHUNK_ELEMENTS // source.vocab)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for start in range(0, source.tokens, step):
            chunk = slice(start, start + step)
            z = source.rows(chunk)
            lse = torch.logsumexp(z, -1)
            logp = z.gather(-1, labels[chunk, None]).squeeze(-1) - lse
            all_logp = z - lse[:, None]
            parts.append((logp, -(all_logp.exp() * all_logp).sum(-1), lse))
        logp, entropy, lse = (torch.cat(column) for column in zip(*parts, strict=True))
        rows = sample(source.tokens, labels.device)
        rounded = torch.log_softmax(source.rounded_rows(rows).float(), -1).gather(-1, labels[rows, None]).squeeze(-1)
        error = float((rounded.to(source.dtype) - logp[rows]).abs().max())
    return Forward(logp, entropy, lse, error)


def logits_gradient(source: Source, labels: Tensor, known: Forward, g: Tensor, e: Tensor | None) -> Rows:
    rows = sample(source.tokens, labels.device)
    return Rows(rows, _dz(source.rows(rows), labels[rows], rows, known, g, e))


def hidden_gradient(source: Source, labels: Tensor, known: Forward, g: Tensor, e: Tensor | None) -> Rows:
    rows = sample(source.tokens, labels.device)
    return Rows(rows, _dz(source.rows(rows), labels[rows], rows, known, g, e) @ source.wide[1])  # type: ignore[index]


def weight_gradient(source: Source, labels: Tensor, known: Forward, g: Tensor, e: Tensor | None) -> Rows:
    columns = torch.cat([sample(source.vocab, labels.device), labels[:8]]).unique()  # rows that are labels, and others
    z = source.columns(columns)
    log_p = z - known.lse[:, None]
    p = log_p.exp()
    dz = g[:, None] * ((labels[:, None] == columns).to(p.dtype) - p)
    if e is not None:
        dz -= e[:, None] * p * (log_p + known.entropy[:, None])
    return Rows(columns, dz.T @ source.wide[0])  # type: ignore[index]


def _dz(z: Tensor, labels: Tensor, rows: Tensor, known: Forward, g: Tensor, e: Tensor | None) -> Tensor:
    log_p = z - known.lse[rows, None]
    p = log_p.exp()
    dz = -p * g[rows, None]
    dz.scatter_add_(-1, labels[:, None], g[rows, None].to(dz.dtype))
    if e is not None:
        dz -= e[rows, None] * p * (log_p + known.entropy[rows, None])
    return dz


def sample(size: int, device: torch.device) -> Tensor:
    """Up to 64 different indices, always the same, both ends among them."""
    if size <= SAMPLED_ROWS:
        return torch.arange(size, device=device)
    inner = torch.randperm(size - 2, generator=torch.Generator().manual_seed(size))[: SAMPLED_ROWS - 2] + 1
    return torch.cat([torch.tensor([0, size - 1]), inner]).sort().values.to(device)
