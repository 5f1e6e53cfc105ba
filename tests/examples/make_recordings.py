"""Writes `data/{vllm,sglang,openai}.json`: answers in each server's format, with the tiny teacher's numbers.

  PYTHONPATH=src:docs/examples python tests/examples/make_recordings.py

Formats: vLLM 0.10 `/v1/completions` with `prompt_logprobs`; SGLang 0.5 `/generate` with `return_logprob`; OpenAI's
completions with `echo`, `logprobs` and vLLM's `return_tokens_as_token_ids`. All give the log-prob of a token at its own
position, and null for the first.
"""

import json
from pathlib import Path

import torch
from opd.task import WordProblems
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parent / "data"
TEACHER = Path(__file__).parents[2] / "docs" / "examples" / "tiny" / "teacher"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    problems = [WordProblems(seed=9, held_out=False)[i] for i in range(3)]
    recordings: dict[str, list] = {"vllm": [], "sglang": [], "openai": []}
    for problem in problems:
        prompt = tokenizer(problem.prompt)["input_ids"]
        ids = prompt + tokenizer(problem.solution)["input_ids"] + [tokenizer.eos_token_id]
        words = tokenizer.convert_ids_to_tokens(ids)
        with torch.no_grad():
            logp = teacher(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [None] + [round(logp[t - 1, ids[t]].item(), 6) for t in range(1, len(ids))]
        ranks = [None] + [int((logp[t - 1] > logp[t - 1, ids[t]]).sum()) + 1 for t in range(1, len(ids))]
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny/teacher", "usage": usage}
        scored = [
            None if x is None else {str(i): {"logprob": x, "rank": rank, "decoded_token": word}}
            for i, x, rank, word in zip(ids, own, ranks, words, strict=True)
        ]
        bodies = {
            "vllm": head
            | {"choices": [{"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": scored}]},
            "sglang": {
                "text": "",
                "meta_info": {
                    "prompt_tokens": len(ids),
                    "completion_tokens": 0,
                    "finish_reason": {"type": "length", "length": 0},
                    "input_token_logprobs": [[x, i, None] for x, i in zip(own, ids, strict=True)],
                    "output_token_logprobs": [],
                },
            },
            "openai": head
            | {
                "choices": [
                    {
                        "index": 0,
                        "text": "",
                        "finish_reason": "length",
                        "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": own},
                    }
                ]
            },
        }
        for kind, body in bodies.items():
            recordings[kind].append({"tokens": ids, "prompt_length": len(prompt), "answer": body})
    for kind, rows in recordings.items():
        (DATA / f"{kind}.json").write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
