"""Tests the readers on recorded answers of real servers for SmolLM2-135M, right and wrong, against local log-probs."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kdloss
from kdloss.integrations import servers

DATA = Path(__file__).parents[1] / "data" / "servers"


@functools.cache
def recorded(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"smollm2-135m-{name}.json").read_text(encoding="utf-8"))


def stream(sequences: int = 3) -> dict[str, torch.Tensor]:
    """The tokens that were sent, as packed sequences."""
    local = recorded("local")
    cu_seqlens = torch.tensor(local["cu_seqlens"][: sequences + 1])
    return {"input_ids": torch.tensor(local["ids"])[: cu_seqlens[-1]], "cu_seqlens": cu_seqlens}


def local_logp() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the same weights in transformers, float32, and the mask of the responses."""
    local = recorded("local")
    return torch.tensor(local["logp"]), torch.tensor(local["loss_mask"]).bool()


def without_ids(answers: list[Any]) -> list[Any]:
    """The answers of a server of the same protocol that sends no prompt_logprobs by id."""
    answers = copy.deepcopy(answers)
    for answer in answers:
        del answer["choices"][0]["prompt_logprobs"]
    return answers


FORMS = {
    "prompt_logprobs": lambda: servers.read_vllm(recorded("vllm-prompt_logprobs-0")["answers"], **stream()),
    "echo": lambda: servers.read_openai(recorded("vllm-echo-text")["answers"], **stream()),
    "echo, prompt_token_ids": lambda: servers.read_openai(
        without_ids(recorded("vllm-echo-token_ids")["answers"]), **stream()
    ),
    "echo, texts": lambda: servers.read_openai(
        without_ids(recorded("vllm-echo-text")["answers"]), **stream(), token_id=None
    ),
}


@pytest.mark.parametrize("read", FORMS.values(), ids=FORMS)
def test_vllm_scores_as_the_model_does(read):
    """The largest difference is 3.9e-5 nats: float32 sums in another order, and two roundings of a JSON number."""
    (logp, mask), teacher_logp = local_logp(), read()
    assert teacher_logp[mask].isfinite().all()
    assert (teacher_logp - logp)[mask].abs().max() < 1e-4
    assert (teacher_logp.isnan() == (kdloss.next_token_labels(**stream()) == -100)).all()
    report = kdloss.check_batch(
        logp,
        None,
        teacher_logp,
        loss_mask=mask,
        labels=kdloss.next_token_labels(**stream()),
        cu_seqlens=stream()["cu_seqlens"],
    )
    assert report.ok, report


def test_likely_tokens_of_two_requests_are_the_same():
    """Of `prompt_logprobs` at 20, and of an echo with `logprobs` 1, which carries ids too."""
    first = stream(1)
    wide = recorded("vllm-prompt_logprobs-20-first")["answers"]
    of_20 = servers.read_vllm_topk(wide, k=20, **first)
    assert (of_20.ids[:-1] >= 0).all()
    assert (of_20.logp[:-1].diff(dim=1) <= 0).all()
    assert (of_20.logp[:-1].exp().sum(1) < 1 + 1e-5).all()
    for k in (1, 5):
        top = servers.read_vllm_topk(wide, k=k, **first)
        assert torch.equal(top.ids, of_20.ids[:, :k])
    for name in ("vllm-echo-text", "vllm-echo-token_ids"):
        top = servers.read_openai_topk(recorded(name)["answers"], k=1, **stream())
        assert torch.equal(top.ids[: len(of_20.ids)], of_20.ids[:, :1])
    sampled = servers.read_vllm(wide, **first)
    labels = kdloss.next_token_labels(**first)
    inside = of_20.ids == labels[:, None]
    assert inside.any(1).float().mean() > 0.8
    torch.testing.assert_close(of_20.logp[inside], sampled[inside.any(1)])


def test_decoded_texts_are_not_the_tokenizers_own_and_the_error_shows_them():
    texts = without_ids(recorded("vllm-echo-text")["answers"])
    with pytest.raises(servers.ScoreError, match=r"given as text, '<\|im_start\|>'.*return_tokens_as_token_ids"):
        servers.read_openai(texts, **stream())
    spelled = {"<|im_start|>": 1, "system": 9690}  # a tokenizer knows "Ċ", and the server writes "\n"
    with pytest.raises(
        servers.ScoreError, match=r"token 2 was sent as id 198, and id 0 was scored, for the text '\\n'"
    ):
        servers.read_openai(texts, **stream(), token_id=lambda text: spelled.get(text, 0))
    numbered = copy.deepcopy(texts)
    for answer, start, stop in zip(numbered, stream()["cu_seqlens"], stream()["cu_seqlens"][1:], strict=False):
        ids = stream()["input_ids"][start:stop].tolist()
        answer["choices"][0]["logprobs"]["tokens"] = [f"token_id:{i}" for i in ids]
    logp, mask = local_logp()
    assert (servers.read_openai(numbered, **stream()) - logp)[mask].abs().max() < 1e-4


def test_a_server_that_scores_the_wrong_token_is_stopped():
    """llama-cpp-python without a leading BOS: its counts and texts are right, and its scores are of the next logits."""
    wrong = recorded("llama_cpp-echo-wrong")
    input_ids, cu_seqlens = torch.tensor(wrong["ids"]), torch.tensor(wrong["cu_seqlens"])
    labels = kdloss.next_token_labels(input_ids, cu_seqlens=cu_seqlens)
    right_logp, mask = torch.tensor(wrong["right_logp"]), labels != -100
    answers = wrong["answers"]
    for answer, start, stop in zip(answers, cu_seqlens, cu_seqlens[1:], strict=False):
        block = answer["choices"][0]["logprobs"]
        for name in ("tokens", "token_logprobs", "top_logprobs"):  # one token was generated
            block[name] = block[name][: stop - start]
    read = servers.read_openai(answers, input_ids, cu_seqlens=cu_seqlens, token_id=None)
    assert (read - right_logp)[mask].abs().mean() > 5
    found = kdloss.check_alignment(right_logp, read, loss_mask=mask, cu_seqlens=cu_seqlens)
    assert (found.tokens, found.aligned, found.verdict) == (129, False, "nothing in common")
    assert max(found.correlations.values()) < 0.2
    report = kdloss.check_batch(right_logp, None, read, loss_mask=mask, labels=labels, cu_seqlens=cu_seqlens)
    assert [finding.check for finding in report.findings if finding.verdict == "wrong"] == [
        "teacher alignment",
        "distance",
    ]
    noise = 0.3 * torch.randn(len(mask), generator=torch.Generator().manual_seed(0))
    right = kdloss.check_alignment(right_logp + noise, right_logp, loss_mask=mask, cu_seqlens=cu_seqlens)
    assert right.aligned, right
