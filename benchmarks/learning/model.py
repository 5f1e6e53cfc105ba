"""A transformer in plain torch: pre-LayerNorm, learned positions, and a cache of keys and values to sample with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .task import END, PAD, VOCAB

WIDTH, HEADS, HIDDEN, LAYERS = 64, 2, 256, 1
Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, heads, positions, width of a head) of each layer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.query, self.pair = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cached: tuple[Tensor, Tensor] | None, start: int, wanted_from: int) -> Tensor:
        """(B, L, D) of the positions from `start` on -> (B, L - wanted_from, D), of the last of them.

        Keys and values of the positions before `start` are in `cached`, which those of `x` are added to.
        """
        B, L, _ = x.shape
        normed, x = self.attention_norm(x), x[:, wanted_from:]
        k, v = self.pair(normed).view(B, L, 2, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query(normed[:, wanted_from:]).view(B, L - wanted_from, HEADS, -1).transpose(1, 2)
        if cached is not None:
            keys, values = cached
            keys[:, :, start : start + L], values[:, :, start : start + L] = k, v
            k, v = keys[:, :, : start + L], values[:, :, : start + L]
        visible = None  # the last position sees all
        if q.shape[2] > 1:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(start + wanted_from)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(self.up(self.mlp_norm(x)).relu())
        return y


class Transformer(nn.Module):
    def __init__(self, positions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(positions, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)

    def forward(self, tokens: Tensor, *, logits_from: int = 0, cache: Cache | None = None, start: int = 0) -> Tensor:
        """(B, L) tokens of the positions from `start` on -> (B, L - logits_from, V) logits of the tokens after them."""
        x = self.tokens(tokens) + self.positions.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start, logits_from if i == LAYERS - 1 else 0)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def answer_logits(self, tokens: Tensor, prompt_width: int) -> Tensor:
        """(B, P + A) prompt and answer -> (B, A, V): the logits that each token of the answer is drawn from."""
        return self.forward(tokens[:, :-1], logits_from=prompt_width - 1)


@torch.no_grad()
def sample(
    model: Transformer, prompts: Tensor, answer_width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # (B, A), (B, A, V)
    """One answer at temperature 1 to each prompt, with padding after its end, and the logits it was drawn from.

    All random numbers are drawn before the first token, so a stream does not depend on how long answers are.
    """
    B, prompt_width = prompts.shape
    empty = torch.zeros(2, LAYERS, B, HEADS, prompt_width + answer_width, WIDTH // HEADS, device=prompts.device)
    cache = list(zip(*empty, strict=True))
    noise = torch.empty(answer_width, B, VOCAB, device=prompts.device).exponential_(generator=generator)
    answers, drawn_from = prompts.new_full((B, answer_width), PAD), []
    ended = torch.zeros(B, dtype=torch.bool, device=prompts.device)
    logits = model(prompts, cache=cache, logits_from=prompt_width - 1)[:, 0]
    for i in range(answer_width):
        drawn_from.append(logits)
        # the first of several exponential clocks rings with the probability of its rate
        token = (logits.softmax(-1) / noise[i]).argmax(-1)
        answers[:, i] = torch.where(ended, PAD, token)
        ended = ended | (token == END)
        if i + 1 < answer_width:
            logits = model(answers[:, i : i + 1], cache=cache, start=prompt_width + i)[:, 0]
    return answers, torch.stack(drawn_from, 1)
