"""Train the tiny pairs that the examples start from: python docs/examples/make_tiny_pair.py cipher [--out FOLDER].

cipher (20 s on one core): the teacher reads what a confused writer wrote, who is wrong about 6 of 36 facts. The student
reads a beginner, who knows where to look but takes another table: it gets a whole message right once in thousands.
word-problems (half an hour): the teacher (96 x 3) reads correct solutions. The student (64 x 2) reads correct solutions
first and then solutions in which 35 % of the sums have a digit wrong, at random, and carry it on.

All see next-token cross-entropy on the solution alone. The result is a function of the seeds below and of the torch
version.
"""

import argparse
from pathlib import Path

import torch
from opd.task import DIGITS, LETTERS, PAD, SYMBOLS, WORDS, Cipher, WordProblems
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BATCH = 128
SIZES = {  # of teacher and student
    "cipher": 2 * ({"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 16},),
    "word-problems": (
        {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 24},
        {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "head_dim": 16},
    ),
}
TOKENS = {"cipher": (*LETTERS, *DIGITS, PAD, "="), "word-problems": (*SYMBOLS, *WORDS)}


def build_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """Words, single digits and signs are tokens. Decoding joins them without spaces, as solutions are written."""
    word = "[a-z]+|." if task == "word-problems" else "."
    tokens = ["<pad>", "<eos>", *TOKENS[task]]
    core = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(word), "isolated")]
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, **sizes: int) -> Qwen3ForCausalLM:
    """A Qwen3 of these sizes with random weights."""
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


def train(model, tokenizer, problems: Cipher | WordProblems, *, steps: int, lr: float, start: int = 0) -> None:
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
    """Trains what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SIZES)
    parser.add_argument("--out", type=Path, help="default: cipher/ or tiny/ beside this file")
    parser.add_argument("--only", choices=("teacher", "student"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or Path(__file__).parent / {"cipher": "cipher", "word-problems": "tiny"}[args.task]
    tokenizer = build_tokenizer(args.task)
    teacher, student = (build_model(tokenizer, seed=i, **sizes) for i, sizes in enumerate(SIZES[args.task]))
    if args.only != "student":
        if args.task == "cipher":
            train(teacher, tokenizer, Cipher(seed=100, held_out=False, writer="confused"), steps=200, lr=1e-2)
        else:
            train(teacher, tokenizer, WordProblems(seed=100, held_out=False), steps=4000, lr=3e-3)
        save(teacher, tokenizer, out / "teacher")
    if args.only != "teacher":
        if args.task == "cipher":
            train(student, tokenizer, Cipher(seed=101, held_out=False, writer="beginner"), steps=400, lr=5e-3)
        else:
            train(student, tokenizer, WordProblems(seed=101, held_out=False), steps=3000, lr=3e-3)
            noisy = WordProblems(seed=102, held_out=False, error_rate=0.35)
            train(student, tokenizer, noisy, steps=600, lr=1e-3)
        save(student, tokenizer, out / "student")


if __name__ == "__main__":
    main()
