"""A language of letters, its tokenizer, and Qwen3 models with a few thousand parameters, all created here."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

LETTERS = "abcdefgh"


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)


def model(seed: int, hidden: int = 32) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=11,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).eval()


def alphabetical_teacher(steps: int = 150) -> Qwen3ForCausalLM:
    """A model that always continues a letter with the next one of the alphabet."""
    teacher = model(seed=7)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = torch.randint(3, 11, (16, 10))
        following = 3 + (rows - 2) % 8
        logits = teacher(input_ids=rows).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher.eval()


def prompts(count: int = 32) -> Dataset:
    return Dataset.from_dict({"prompt": [LETTERS[i % 8] + LETTERS[(i + 1) % 8] for i in range(count)]})


def in_order(completions, prompts, **_) -> list[float]:
    """The share of letters that follow their predecessor in the alphabet."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = (prompt[-1] + completion).replace(" ", "")
        pairs = [(LETTERS.find(x), LETTERS.find(y)) for x, y in pairwise(text)]
        rewards.append(sum((x + 1) % 8 == y for x, y in pairs) / max(1, len(pairs)))
    return rewards


def grpo_config(output_dir, **options) -> GRPOConfig:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "beta": 0.0,
        "lr_scheduler_type": "constant",
    }
    return GRPOConfig(output_dir=str(output_dir), **{**defaults, **options})


def grpo(cls, student, output_dir, *, keywords=None, **options):
    """A trainer of class `cls` on a copy of `student`; `options` go to GRPOConfig."""
    return cls(
        model=copy.deepcopy(student),
        reward_funcs=in_order,
        args=grpo_config(output_dir, **options),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        **(keywords or {}),
    )
