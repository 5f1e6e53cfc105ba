"""Tests a real vLLM as the teacher: every request form scores as the local model does, and five steps distil it."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdloss
from kdloss.integrations import servers
from kdloss.integrations.transformers import check_packed

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
from opd.teacher_client import TeacherEndpoint

QUESTIONS = (
    "Why is the sky blue?",
    "Name three fruits.",
    "What is 12 + 30?",
    "Write a line about rain.",
    "What do bees make?",
    "How does a boat float?",
    "Tell me about Rome.",
    "What is a prime number?",
)
NEW_TOKENS = 32


class Rollout(NamedTuple):
    """Sampled responses as a packed stream."""

    input_ids: torch.Tensor  # (T,)
    cu_seqlens: torch.Tensor  # (B + 1,)
    loss_mask: torch.Tensor  # (T,) bool
    labels: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (T,) restarting

    @property
    def layout(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids, "cu_seqlens": self.cu_seqlens}


@pytest.fixture(scope="module")
def teacher(smollm2: Path) -> Any:
    return load(smollm2)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def sample(model: Any, folder: Path, seed: int) -> Rollout:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(seed)
    rows = model.generate(
        **prompts,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )
    ended = rows[:, prompts.input_ids.shape[1] :] == tokenizer.eos_token_id
    mask = torch.cat([prompts.attention_mask.bool(), ended.cumsum(1) - ended.long() == 0], 1)
    lengths = mask.sum(1)
    input_ids = kdloss.pack(rows, mask=mask)
    cu_seqlens = kdloss.cu_seqlens_from_lengths(lengths)
    return Rollout(
        input_ids,
        cu_seqlens,
        kdloss.response_mask(prompts.attention_mask.sum(1), cu_seqlens=cu_seqlens, total_tokens=len(input_ids)),
        kdloss.next_token_labels(input_ids, cu_seqlens=cu_seqlens),
        torch.arange(len(input_ids)) - cu_seqlens[:-1].repeat_interleave(lengths),
    )


def hidden(model: Any, rollout: Rollout) -> torch.Tensor:
    packed = {"input_ids": rollout.input_ids[None], "position_ids": rollout.position_ids[None]}
    return model.model(**packed, use_cache=False).last_hidden_state[0]


def logp_of(model: Any, rollout: Rollout) -> torch.Tensor:
    states, head = hidden(model, rollout), model.lm_head.weight
    return kdloss.linear_token_logprobs(states, head, rollout.labels, loss_mask=rollout.loss_mask)


def ask(url: str, rollout: Rollout, **body: Any) -> list[Any]:
    """One answer per sequence."""
    bounds = rollout.cu_seqlens.tolist()
    ids = [rollout.input_ids[start:stop].tolist() for start, stop in pairwise(bounds)]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda tokens: post(url, {"prompt": tokens, **body}), ids))


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps({"model": "smollm2", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refused:
        return json.load(refused)


@pytest.fixture(scope="module")
def rollout(teacher: Any, smollm2: Path) -> Rollout:
    return sample(teacher, smollm2, seed=7)


SAMPLED = {
    "prompt_logprobs": ({"max_tokens": 1, "prompt_logprobs": 0}, servers.read_vllm),
    "echo": ({"max_tokens": 0, "echo": True, "logprobs": 1}, servers.read_openai),
    "echo, token ids": (
        {"max_tokens": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True},
        servers.read_openai,
    ),
    "echo, prompt ids": (
        {"max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True},
        servers.read_openai,
    ),
}


@pytest.mark.parametrize(("body", "read"), SAMPLED.values(), ids=SAMPLED)
def test_every_request_scores_as_the_local_model_does(url, teacher, rollout, body, read):
    """float32 on both sides: sums in another order, and a bound of 1e-3 nats."""
    answers = ask(url, rollout, **body)
    teacher_logp = read(answers, **rollout.layout, loss_mask=rollout.loss_mask)
    with torch.no_grad():
        logp = logp_of(teacher, rollout)
    assert (teacher_logp - logp)[rollout.loss_mask].abs().max() < 1e-3
    late = kdloss.to_token_positions(teacher_logp, cu_seqlens=rollout.cu_seqlens, fill=torch.nan)
    mask = rollout.loss_mask & ~late.isnan()
    aligned = {"loss_mask": mask, "cu_seqlens": rollout.cu_seqlens}
    assert kdloss.check_alignment(logp, teacher_logp, **aligned).aligned
    assert kdloss.check_alignment(logp, late, **aligned).shift == 1
    # without ids by position: texts that are ids
    if body.get("return_tokens_as_token_ids"):
        for answer in answers:
            assert answer["choices"][0].pop("prompt_logprobs") is not None
        torch.testing.assert_close(read(answers, **rollout.layout), read_all(url, rollout), equal_nan=True)


def read_all(url: str, rollout: Rollout) -> torch.Tensor:
    return servers.read_vllm(ask(url, rollout, max_tokens=1, prompt_logprobs=0), **rollout.layout)


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_the_examples_client_scores_as_the_local_model_does(url, teacher, rollout, kind):
    """`endpoint.url` of docs/examples, for rows that are padded on the right."""
    lengths = rollout.cu_seqlens.diff()
    rows = kdloss.unpack(rollout.input_ids, cu_seqlens=rollout.cu_seqlens, length=int(lengths.max()))
    labelled = kdloss.segment_sum(
        rollout.loss_mask.double(), loss_mask=rollout.loss_mask, cu_seqlens=rollout.cu_seqlens
    )
    batch = SimpleNamespace(input_ids=rows, lengths=lengths, prompt_lengths=lengths - labelled.long())
    client = TeacherEndpoint(url, kind=kind, model="smollm2", concurrency=4)
    with torch.no_grad():
        logp = logp_of(teacher, rollout)
    teacher_logp = kdloss.pack(client(batch), lengths=lengths)
    assert (teacher_logp - logp)[rollout.loss_mask].abs().max() < 1e-3


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_likely_tokens_are_the_local_models(url, teacher, rollout, k):
    with torch.no_grad():
        best = teacher.lm_head(hidden(teacher, rollout)).log_softmax(-1).topk(k)
    mask = rollout.loss_mask
    for body, read in (
        ({"max_tokens": 1, "prompt_logprobs": k}, servers.read_vllm_topk),
        ({"max_tokens": 0, "echo": True, "logprobs": k, "return_tokens_as_token_ids": True}, servers.read_openai_topk),
    ):
        top = read(ask(url, rollout, **body), **rollout.layout, k=k)
        assert (top.logp - best.values)[mask].abs().max() < 1e-3
        assert (top.ids == best.indices)[mask].float().mean() > 0.99  # two log-probs may differ by less than rounding


def test_the_longest_sequence_is_refused_in_the_servers_words(url, longest):
    """vLLM generates at least one token, so it scores at most one token less than `max_model_len`."""
    tokens = torch.arange(100, 100 + longest)
    for length, scored in ((longest - 1, True), (longest, False)):
        answer = post(url, {"prompt": tokens[:length].tolist(), "max_tokens": 1, "prompt_logprobs": 0})
        layout = {"input_ids": tokens[:length], "cu_seqlens": torch.tensor([0, length])}
        if scored:
            assert servers.read_vllm([answer], **layout)[:-1].isfinite().all()
        else:
            with pytest.raises(servers.ScoreError, match=r"the server said .*max_tokens must be at least 1, got 0"):
                servers.read_vllm([answer], **layout)


def test_five_steps_lower_the_exact_reverse_kl(url, teacher, smollm2):
    """The whole of it: a student with noise in its weights samples, the server scores, the loss descends."""
    student = load(smollm2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.07 * parameter.std() * torch.randn_like(parameter))
    assert check_packed(student) < 1e-3
    held_out = sample(student, smollm2, seed=99)
    history = [exact_reverse_kl(student, teacher, held_out)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-5, weight_decay=0.0)
    for step in range(5):
        rollout = sample(student, smollm2, seed=step)
        answers = ask(url, rollout, max_tokens=1, prompt_logprobs=0)
        mask = rollout.loss_mask
        teacher_logp = servers.read_vllm(answers, **rollout.layout, loss_mask=mask)
        logp = logp_of(student, rollout)
        report = kdloss.check_batch(
            logp, None, teacher_logp, loss_mask=mask, labels=rollout.labels, cu_seqlens=rollout.cu_seqlens
        )
        assert report.ok, report
        optimizer.zero_grad()
        kdloss.distillation_loss(logp, None, teacher_logp, loss_mask=mask).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        history.append(exact_reverse_kl(student, teacher, held_out))
    print("exact reverse KL, nats a token:", " ".join(f"{x:.3f}" for x in history))
    assert history[-1] < 0.9 * history[0], history


@torch.no_grad()
def exact_reverse_kl(student: Any, teacher: Any, rollout: Rollout) -> float:
    pairs = [x for model in (student, teacher) for x in (hidden(model, rollout), model.lm_head.weight)]
    per_token = kdloss.linear_reverse_kl(*pairs, loss_mask=rollout.loss_mask)
    return kdloss.token_mean(per_token, loss_mask=rollout.loss_mask).item()
