"""Train the tiny teacher and the tiny student of `tiny/`: python docs/examples/make_tiny_pair.py [--out FOLDER].

The teacher (96 x 3) reads correct solutions. The student (64 x 2) reads correct solutions first and then solutions in
which 35 % of the sums have a digit wrong, at random, and carry it on. Both see next-token cross-entropy on the
solution alone. About half an hour on one core; the result is a function of the seeds below and of the torch version.
"""

import argparse
from pathlib import Path

import torch
from opd.task import SYMBOLS, WORDS, WordProblems
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BATCH = 128
TEACHER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 24}
STUDENT = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "head_dim": 16}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """46 tokens: words, single digits and signs. Decoding joins tokens without spaces, as solutions are written."""
    tokens = ["<pad>", "<eos>", *SYMBOLS, *WORDS]
    core = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[a-z]+|."), "isolated")]
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, **sizes: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sizes,
        )
    )


def train(model, tokenizer, problems: WordProblems, *, steps: int, lr: float, start: int = 0) -> None:
    """Cross-entropy on the solutions of problems `start` ... `start + steps * BATCH`; linear warm-up, cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, div_factor=100)
    model.train()
    bar = trange(steps)
    for step in bar:
        batch = [problems[start + step * BATCH + i] for i in range(BATCH)]
        prompts = tokenizer([p.prompt for p in batch])["input_ids"]
        solutions = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([p.solution for p in batch])["input_ids"]]
        pairs = list(zip(prompts, solutions, strict=True))
        ids = padded([p + s for p, s in pairs], fill=tokenizer.pad_token_id)
        labels = padded([[-100] * len(p) + s for p, s in pairs], fill=-100)
        logits = model(input_ids=ids, attention_mask=ids != tokenizer.pad_token_id, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def padded(rows: list[list[int]], *, fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def save(model, tokenizer, folder: Path) -> None:
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--only", choices=("teacher", "student"))
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--student-steps", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    if args.only != "student":
        teacher = build_model(tokenizer, seed=0, **TEACHER)
        train(teacher, tokenizer, WordProblems(seed=100, held_out=False), steps=args.teacher_steps, lr=3e-3)
        save(teacher, tokenizer, args.out / "teacher")
    if args.only != "teacher":
        student = build_model(tokenizer, seed=1, **STUDENT)
        train(student, tokenizer, WordProblems(seed=101, held_out=False), steps=args.student_steps, lr=3e-3)
        noisy = WordProblems(seed=102, held_out=False, error_rate=0.35)
        train(student, tokenizer, noisy, steps=args.student_steps // 5, lr=1e-3)
        save(student, tokenizer, args.out / "student")


if __name__ == "__main__":
    main()
