"""A causal language model as a policy: it samples responses, and scores tokens without ever holding (T, V) logits."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import kdloss
from opd import ranks


class Layout(NamedTuple):
    """Where the tokens of right-padded rows lie on the packed stream, and which of them are trained on."""

    lengths: Tensor  # (B,)
    cu_seqlens: Tensor  # (B + 1,)
    total_tokens: int
    labels: Tensor  # (T,)
    loss_mask: Tensor  # (T,) bool: True where labels[t] is a response token

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...); what has no token axis is left as it is."""
        return kdloss.pack(x, lengths=self.lengths, total_tokens=self.total_tokens) if x.ndim > 1 else x


def layout(input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Layout:
    """The packed layout of `input_ids` (B, L): row b holds `lengths[b]` tokens, `prompt_lengths[b]` of them prompt."""
    cu_seqlens = kdloss.cu_seqlens_from_lengths(lengths)
    total = int(lengths.sum())
    tokens = kdloss.pack(input_ids, lengths=lengths, total_tokens=total)
    labels = kdloss.next_token_labels(tokens, cu_seqlens=cu_seqlens)
    loss_mask = kdloss.response_mask(prompt_lengths, cu_seqlens=cu_seqlens, total_tokens=total)
    return Layout(lengths, cu_seqlens, total, labels, loss_mask)


class States(NamedTuple):
    """Hidden states of a packed stream, and the head that makes logits of them."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


class Scores(NamedTuple):
    """What a policy says of a packed stream; 0 at tokens that are not trained on."""

    logp: Tensor  # (T,)
    entropy: Tensor  # (T,)
    forward_kl: Tensor | None = None  # (T,) from the teacher's whole distribution, where it was asked for


class Policy(nn.Module):
    """A transformers model doing what distillation asks of it: `forward` scores, `generate` samples."""

    def __init__(self, lm: PreTrainedModel, *, vocab_size: int, temperature: float, compute_dtype: torch.dtype):
        super().__init__()
        self.lm, self.vocab_size, self.temperature, self.compute_dtype = lm, vocab_size, temperature, compute_dtype
        # A model's own sampling defaults (Qwen3: top-k 20, top-p 0.95) would make another behaviour policy. The tokens
        # that end a turn stay: several models have more of them than the tokenizer's one.
        ends = getattr(lm.generation_config, "eos_token_id", None)
        lm.generation_config = GenerationConfig(eos_token_id=ends)

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        lengths: Tensor,  # (B,)
        prompt_lengths: Tensor,  # (B,)
        *,
        teacher: "Policy | None" = None,
        taught: Tensor | None = None,  # (B,) bool
    ) -> Scores:
        """Log-probs and entropies of response tokens: the model runs padded, the head on trained tokens only.

        With a teacher, also the forward KL from it at the response tokens of the rows that are `taught`.
        """
        self.train(torch.is_grad_enabled())
        where = layout(input_ids, lengths, prompt_lengths)
        states = self.states(input_ids, lengths)
        hidden, weight, *head = states
        logp, entropy = kdloss.linear_token_logprobs_and_entropy(
            hidden,
            weight,
            where.labels.to(hidden.device),
            loss_mask=where.loss_mask.to(hidden.device),
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            **dict(zip(("bias", "softcap", "logit_scale"), head, strict=True)),
        )
        scores = Scores(logp.to(input_ids.device), entropy.to(input_ids.device))
        if teacher is None or taught is None:
            return scores
        rows = kdloss.broadcast_to_tokens(taught, cu_seqlens=where.cu_seqlens, total_tokens=where.total_tokens)
        divergence = self._forward_kl(states, teacher, input_ids, lengths, where.loss_mask & rows)
        return scores._replace(forward_kl=divergence.to(input_ids.device))

    def states(self, input_ids: Tensor, lengths: Tensor) -> States:
        """The model's last hidden states, packed, and its head, on one device and in the dtype that it computes in."""
        attention_mask = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        with self._autocast(input_ids.device):
            output = self.lm.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = output.last_hidden_state.to(self.compute_dtype)
        weight, bias, softcap, logit_scale = kdloss.output_head(self.lm)
        return States(
            kdloss.pack(hidden, lengths=lengths.to(hidden.device), total_tokens=int(lengths.sum())),
            weight.to(hidden.device, self.compute_dtype),
            None if bias is None else bias.to(hidden.device, self.compute_dtype),
            softcap,
            logit_scale,
        )

    def _forward_kl(
        self, states: States, teacher: "Policy", input_ids: Tensor, lengths: Tensor, loss_mask: Tensor
    ) -> Tensor:
        with torch.no_grad():
            theirs = teacher.eval().states(input_ids, lengths)
        device = states.hidden.device
        return kdloss.linear_forward_kl(
            states.hidden,
            states.weight,
            theirs.hidden.to(device),
            theirs.weight.to(device),
            loss_mask=loss_mask.to(device),
            bias=states.bias,
            softcap=states.softcap,
            logit_scale=states.logit_scale,
            teacher_bias=None if theirs.bias is None else theirs.bias.to(device),
            teacher_softcap=theirs.softcap,
            teacher_logit_scale=theirs.logit_scale,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end a sequence: the model's, which may be one or a list, and the tokenizer's."""
        ends = self.lm.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({x for x in (*ends, tokenizer.eos_token_id) if x is not None})

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,  # (B, P) left-padded
        attention_mask: Tensor,  # (B, P)
        *,
        max_new_tokens: int,
        top_p: float,
        eos_token_id: list[int],
        pad_token_id: int,
    ) -> tuple[Tensor, Tensor]:
        """Sampled tokens (B, R), padded after the end of sequence, and their log-probs under the sampling policy."""
        self.eval()
        record = BehaviourLogprobs()
        processors = [BoundVocabulary(self.vocab_size), TemperatureLogitsWarper(float(self.temperature))]
        processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        with self._autocast(prompt_ids.device):
            sequences = self.lm.generate(
                prompt_ids,
                attention_mask=attention_mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([*processors, record]),
                synced_gpus=dist.is_initialized(),  # sharded ranks gather weights together until the last one is done
            )
        responses = sequences[:, prompt_ids.shape[1] :]
        return responses, record.read(responses)

    def save_pretrained(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Saves the whole model as transformers does, gathered from all processes if it is sharded."""
        weights = get_model_state_dict(self.lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if ranks.rank() == 0:
            self.lm.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)

    def _autocast(self, device: torch.device):
        return nullcontext() if self.compute_dtype == torch.float32 else torch.autocast(device.type, self.compute_dtype)


class BoundVocabulary(LogitsProcessor):
    """Rows that pad the head to a round size are no tokens; sampling and scoring both leave them out."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class BehaviourLogprobs(LogitsProcessor):
    """Log-probs of the sampled tokens under the very distribution that they were drawn from.

    Last in the list, so that it sees what temperature and top-p made; holds one (B, V) tensor, not one a token.
    """

    def __init__(self):
        self.logp: list[Tensor] = []
        self.next: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.next is not None:
            self.logp.append(self.next.gather(1, input_ids[:, -1:]))
        self.next = scores.log_softmax(-1)
        return scores

    def read(self, responses: Tensor) -> Tensor:
        """(B, R) for the sampled `responses` (B, R)."""
        if len(self.logp) < responses.shape[1]:
            self.logp.append(self.next.gather(1, responses[:, -1:]))
        return torch.cat(self.logp[: responses.shape[1]], 1)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The student's tokenizer, padding on the left for generation."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    path: str,
    *,
    vocab_size: int,
    temperature: float,
    dtype: str,
    trained: bool,
    device_map: Any = None,
    attn_impl: str | None = None,
    gradient_checkpointing: bool = False,
) -> Policy:
    """A policy on this process's device, sharded under torchrun; computes in `dtype`, trains float32 weights."""
    if device_map is not None and dist.is_initialized():
        raise ValueError("device_map spreads one process over devices; it cannot be joined with torchrun")
    compute_dtype = getattr(torch, dtype)
    lm = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32 if trained else compute_dtype,
        device_map=device_map,
        attn_implementation=attn_impl,
    )
    if device_map is None and not dist.is_initialized():  # sharding moves each process's part by itself
        lm.to(ranks.device())
    if gradient_checkpointing:
        # older versions of transformers know the second name alone
        getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()
    lm.requires_grad_(trained)
    policy = Policy(lm, vocab_size=vocab_size, temperature=temperature, compute_dtype=compute_dtype)
    return shard(policy) if dist.is_initialized() else policy


def shard(policy: Policy) -> Policy:
    """FSDP2: a unit a layer, and a root unit (embedding, last norm, head) that `forward` and `generate` gather."""
    mixed = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=torch.float32)
    for layer in policy.lm.base_model.layers:
        fully_shard(layer, mp_policy=mixed)
    fully_shard(policy, mp_policy=mixed)
    register_fsdp_forward_method(policy, "generate")
    return policy
