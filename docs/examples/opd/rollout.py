"""From problems to a batch: sample responses, judge them, and have the teacher score the sampled tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import kdloss
from opd.models import Policy, layout
from opd.task import Problem, reward


@dataclass(frozen=True)
class Batch:
    """B sampled sequences in right-padded rows. Entry [b, t] of a per-token tensor speaks of token t + 1."""

    input_ids: Tensor  # (B, L)
    lengths: Tensor  # (B,) tokens of prompt and response, the end of sequence included
    prompt_lengths: Tensor  # (B,)
    old_logp: Tensor  # (B, L) under the policy that sampled, recorded when it sampled
    rewards: Tensor  # (B,)
    teacher_logp: Tensor | None = None  # (B, L)
    advantages: Tensor | None = None  # (B,)
    failed: Tensor | None = None  # (B,) bool: no response to this question was right
    prox_logp: Tensor | None = None  # (B, L) under the student when the update begins

    def __len__(self) -> int:
        return len(self.lengths)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to every tensor."""
        return replace(self, **{f.name: function(x) for f in fields(self) if (x := getattr(self, f.name)) is not None})

    def split(self, parts: int) -> list["Batch"]:
        """`parts` batches of nearly equal size, each cut to its own longest row."""
        bounds = [len(self) * i // parts for i in range(parts + 1)]
        longest = [int(self.lengths[i:j].max()) for i, j in pairwise(bounds)]
        return [
            self.map(lambda x, i=i, j=j, n=n: x[i:j, :n] if x.ndim == 2 else x[i:j])
            for (i, j), n in zip(pairwise(bounds), longest, strict=True)
        ]


@torch.no_grad()
def sample(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    n_samples: int,
    max_new_tokens: int,
    top_p: float,
    instruction: str = "",
    device: torch.device,
) -> Batch:
    """`n_samples` responses to each problem, one after the other in the batch, with their exact rewards."""
    texts = [prompt_text(tokenizer, p.prompt, instruction) for p in problems for _ in range(n_samples)]
    # a chat template writes the beginning of sequence itself; without one the tokenizer adds it, where it has one
    special = not tokenizer.chat_template
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special).to(device)
    if special and prompts.input_ids[:, -1].unique().tolist() == [tokenizer.eos_token_id]:
        # this tokenizer also adds an end of sequence, which a prompt must not have; padding is on the left
        for name in ("input_ids", "attention_mask"):
            prompts[name] = prompts[name][:, :-1]
    ends = policy.end_ids(tokenizer)
    responses, response_logp = policy.generate(
        prompts.input_ids,
        prompts.attention_mask,
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    ended = torch.isin(responses, torch.tensor(ends, device=responses.device))
    keep = ended.cumsum(1) - ended.long() == 0  # up to and with the first end of sequence
    prompt_lengths, response_lengths = prompts.attention_mask.sum(1), keep.sum(1)
    mask = torch.cat([prompts.attention_mask.bool(), keep], 1)
    lengths = prompt_lengths + response_lengths
    rewards = [
        reward(tokenizer.decode(row[:n], skip_special_tokens=True), problem)
        for row, n, problem in zip(
            responses, response_lengths.tolist(), (p for p in problems for _ in range(n_samples)), strict=True
        )
    ]
    own_position = torch.cat([torch.zeros_like(prompts.input_ids, dtype=response_logp.dtype), response_logp], 1)
    return Batch(
        input_ids=shift_left(torch.cat([prompts.input_ids, responses], 1), mask, fill=tokenizer.pad_token_id),
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        old_logp=shift_left(own_position, mask, fill=0.0).roll(-1, 1),  # to prediction positions
        rewards=torch.tensor(rewards, device=device),
    )


@torch.no_grad()
def score(policy: Policy, batch: Batch, *, parts: int = 1) -> Tensor:
    """Log-probs (B, L) of the batch's response tokens under `policy`, 0 elsewhere; scored in `parts` to save memory."""

    def one(part: Batch) -> Tensor:
        cu_seqlens = layout(part.input_ids, part.lengths, part.prompt_lengths).cu_seqlens
        logp = policy(part.input_ids, part.lengths, part.prompt_lengths).logp
        return kdloss.unpack(logp, cu_seqlens=cu_seqlens, length=batch.input_ids.shape[1])

    return torch.cat([one(part) for part in batch.split(parts)])


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str, instruction: str) -> str:
    """The chat template's rendering where the tokenizer has one, else the plain question."""
    text = f"{question}\n{instruction}" if instruction else question
    if not tokenizer.chat_template:
        return text
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def shift_left(padded: Tensor, mask: Tensor, *, fill: float) -> Tensor:
    """Rows of `padded` (B, L) with their True entries moved to the front, `fill` behind, cut at the longest."""
    order = mask.byte().argsort(dim=1, descending=True, stable=True)
    moved = padded.gather(1, order).masked_fill(~mask.gather(1, order), fill)
    return moved[:, : int(mask.sum(1).max())]
