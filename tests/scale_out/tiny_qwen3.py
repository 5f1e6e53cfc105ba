"""A tiny model like Qwen3 in plain torch: grouped queries, normed queries and keys, RoPE, SwiGLU, a tied head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 40
HEADS, GROUPS, HEAD_WIDTH = 4, 2, 8


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None, None] / 1e4 ** (torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.key, self.value = (nn.Linear(width, GROUPS * HEAD_WIDTH, bias=False) for _ in range(2))
        self.query_norm, self.key_norm = Norm(HEAD_WIDTH), Norm(HEAD_WIDTH)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)
        self.before, self.between = Norm(width), Norm(width)

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(1, (-1, HEAD_WIDTH)) for f in (self.query, self.key, self.value))
        q, k = rotated(self.query_norm(q), positions), rotated(self.key_norm(k), positions)
        k, v = (z.repeat_interleave(HEADS // GROUPS, 1) for z in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * HEAD_WIDTH**-0.5
        mixed = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        x = x + self.out(mixed.flatten(1))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Tiny(nn.Module):
    """Maps packed tokens to `score(hidden, head)` of the last hidden states and the head.

    `score` runs inside `forward`, where a wrapper has gathered the whole head.
    """

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)  # also the head
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = Norm(width)

    def forward(self, ids: Tensor, segments: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        at = torch.arange(len(ids))
        seen = (segments[:, None] == segments) & (at[:, None] >= at)
        positions = seen.sum(1) - 1
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, positions, seen)
        return score(self.norm(x), self.embed.weight)
