"""Holds the readers to answers of real servers: vLLM and SGLang in every request form, and llama.cpp's wrong one.

The bodies are those of vLLM 0.32.0 and SGLang 0.5.23 on a CPU and of llama-cpp-python 0.3.36, all serving
SmolLM2-135M-Instruct. This SGLang ran without its compiled kernels, by torch alone.
`smollm2-135m-local.json` holds the tokens, and the log-probs of the same weights in transformers, in float32.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import kdloss
from kdloss.integrations import servers
from kdloss.integrations.servers import ScoreError

DATA = Path(__file__).parents[1] / "data" / "servers"
# nats: in float32, vLLM and transformers differ by 3.91e-5 at most over 272 predicted tokens, SGLang by 2.67e-5
ROUNDING = 5e-5


def body(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"smollm2-135m-{name}.json").read_text("utf-8"))


def stream(recorded: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": torch.tensor(recorded["ids"]), "cu_seqlens": torch.tensor(recorded["cu_seqlens"])}


LOCAL = body("local")
STREAM = stream(LOCAL)
FIRST = {"input_ids": STREAM["input_ids"][:104], "cu_seqlens": STREAM["cu_seqlens"][:2]}
PREDICTED = kdloss.next_token_labels(STREAM["input_ids"], cu_seqlens=STREAM["cu_seqlens"]) != -100
LOSS_MASK = torch.tensor(LOCAL["loss_mask"]).bool()
LOGP = torch.tensor(LOCAL["logp"])
FORMS = {
    "prompt_logprobs": ("vllm-prompt_logprobs-0", servers.read_vllm),
    "echo": ("vllm-echo-text", servers.read_openai),
    "echo with token ids": ("vllm-echo-token_ids", servers.read_openai),
    "echo, its prompt_logprobs": ("vllm-echo-text", servers.read_vllm),
}


def by_text(name: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The first answer without its `prompt_logprobs`, as other servers echo, and the id of each text in it."""
    answers = body(name)["answers"][:1]
    entries = answers[0]["choices"][0].pop("prompt_logprobs")
    found = {(score["decoded_token"], int(token)) for entry in entries[1:] for token, score in entry.items()}
    found |= {("<|im_start|>", 1)}  # the first token, which has no entry
    assert len(dict(found)) == len(found), "a text of two ids"
    return answers, dict(found)


@pytest.mark.parametrize("form", FORMS)
def test_vllm_agrees_with_the_same_weights_in_transformers(form):
    name, read = FORMS[form]
    answers = body(name)["answers"]
    teacher_logp = read(answers, **STREAM)
    assert torch.equal(teacher_logp.isnan(), ~PREDICTED)
    assert (teacher_logp - LOGP)[PREDICTED].abs().max() < ROUNDING
    same = read(json.loads(json.dumps(answers)), **STREAM, loss_mask=LOSS_MASK)
    assert_close(same, teacher_logp, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_forgives_what_no_trained_token_needs(form):
    """Entries that no trained token needs are removed; the trained ones stay, and a mask of all tokens raises."""
    name, read = FORMS[form]
    answers = body(name)["answers"]
    for answer, (start, stop) in zip(answers, pairwise(LOCAL["cu_seqlens"]), strict=True):
        entries = answer["choices"][0]["prompt_logprobs"]
        entries[1:] = [e if LOSS_MASK[t] else None for t, e in zip(range(start, stop - 1), entries[1:], strict=True)]
    teacher_logp = read(answers, **STREAM, loss_mask=LOSS_MASK)
    assert torch.equal(teacher_logp.isnan(), ~LOSS_MASK)
    assert (teacher_logp - LOGP)[LOSS_MASK].abs().max() < ROUNDING
    with pytest.raises(ScoreError, match=r"sequence 0 \(request cmpl-.*, 104 tokens\): token 1 .* is trained on"):
        read(answers, **STREAM)


@pytest.mark.parametrize("form", ["text", "token_ids"])
def test_an_echo_without_prompt_logprobs(form):
    """As other servers of this protocol answer: texts need `token_id`, unless the answer holds the prompt's ids."""
    answers, ids = by_text(f"vllm-echo-{form}")
    read = servers.read_openai(answers, **FIRST, token_id=ids.__getitem__)
    assert (read[:103] - LOGP[:103]).abs().max() < ROUNDING
    top = servers.read_openai_topk(answers, **FIRST, k=1, token_id=ids.__getitem__)
    wide = servers.read_vllm_topk(body("vllm-prompt_logprobs-20-first")["answers"], **FIRST, k=1)
    assert torch.equal(top.ids, wide.ids)
    if form == "token_ids":
        assert_close(servers.read_openai(answers, **FIRST), read, equal_nan=True)
    else:
        with pytest.raises(ScoreError, match=r"a token is given as text, '<\|im_start\|>'; have the server send ids"):
            servers.read_openai(answers, **FIRST)
    with pytest.raises(ScoreError, match=r"a token is given as text, '.*'; have the server send ids"):
        servers.read_openai_topk(answers, **FIRST, k=1)


def test_the_texts_of_a_tokenizer_are_not_those_of_a_server():
    """`tokenizer.convert_tokens_to_ids` knows "Ċ", and gives the id of unk for a line break: errors show the text."""
    answers, ids = by_text("vllm-echo-text")
    tokenizer = {text.replace(" ", "Ġ").replace("\n", "Ċ"): token for text, token in ids.items()}
    message = r"token 2 was sent as id 198, and id 0 was scored, which token_id made of the text '\\n'; have the server"
    with pytest.raises(ScoreError, match=message):
        servers.read_openai(answers, **FIRST, token_id=lambda text: tokenizer.get(text, 0))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_likely_tokens_are_those_that_vllm_ranks_first(k):
    answer = body("vllm-prompt_logprobs-20-first")["answers"][0]
    top = servers.read_vllm_topk([answer], **FIRST, k=k)
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    for row, entry in zip(top.ids.tolist(), entries, strict=False):
        assert row == [int(t) for rank in range(1, k + 1) for t, x in entry.items() if x["rank"] == rank]
    assert top.ids[-1].tolist() == [-1] * k
    assert torch.equal(top.logp.isnan(), top.ids == -1)
    own = servers.read_vllm([answer], **FIRST)
    inside = top.ids[:-1] == FIRST["input_ids"][1:, None]
    assert_close(top.logp[:-1][inside], own[:-1][inside.any(-1)])
    assert inside.sum() == {1: 62, 5: 78, 20: 89}[k]  # vLLM adds the others


@pytest.mark.parametrize("form", ["text", "token_ids"])
def test_an_echo_has_the_likely_tokens_by_id(form):
    """Beside texts, an echo of vLLM holds `prompt_logprobs`: no text is turned into an id.

    Parts of an emoji have the text "". By text, the sent one lost its entry to the likeliest one.
    """
    answers = body(f"vllm-echo-{form}")["answers"]
    choice = answers[1]["choices"][0]
    assert choice["logprobs"]["tokens"][36] == ""
    assert list(choice["logprobs"]["top_logprobs"][36]) == [""]
    top = servers.read_openai_topk(answers, **STREAM, k=1)
    assert top.ids[104 + 35].tolist() == [230]
    assert STREAM["input_ids"][104 + 36] == 234
    assert torch.equal(top.ids[:, 0] == -1, ~PREDICTED)
    wide = servers.read_vllm_topk(body("vllm-prompt_logprobs-20-first")["answers"], **FIRST, k=1)
    assert torch.equal(top.ids[:103], wide.ids[:103])
    assert_close(top.logp[:103], wide.logp[:103], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("form", FORMS)
def test_other_tokens_than_those_sent_raise(form):
    name, read = FORMS[form]
    answers = body(name)["answers"]
    wrong = STREAM["input_ids"].clone()
    wrong[104 + 40] += 1
    with pytest.raises(ScoreError, match=r"sequence 1 \(request cmpl-.*, 83 tokens\): token 40 was sent as id "):
        read(answers, wrong, cu_seqlens=STREAM["cu_seqlens"])
    with pytest.raises(
        ScoreError,
        match=r"sequence 0 \(request cmpl-.* (must have one entry per token, 104, got 83|was given 83 prompt_)",
    ):
        read([answers[1], answers[0], answers[2]], **STREAM)


def test_sglang_agrees_with_the_same_weights_in_transformers():
    answers = body("sglang-start-0")["answers"]
    teacher_logp = servers.read_sglang(answers, **STREAM)
    assert torch.equal(teacher_logp.isnan(), ~PREDICTED)
    assert (teacher_logp - LOGP)[PREDICTED].abs().max() < ROUNDING


def test_sglang_scores_a_response_alone():
    """From `logprob_start_len` on. Its first entry there has no score, as the first token of a sequence has none."""
    recorded = body("sglang-start-response")
    answers, starts = recorded["answers"], recorded["request"]["logprob_start_len"]
    teacher_logp = servers.read_sglang(answers, **STREAM, loss_mask=LOSS_MASK, starts=starts)
    assert torch.equal(teacher_logp.isnan(), ~LOSS_MASK)
    assert (teacher_logp - LOGP)[LOSS_MASK].abs().max() < ROUNDING
    short = "must have one entry per token, 104, got 41; ask with logprob_start_len=0"
    with pytest.raises(ScoreError, match=short):
        servers.read_sglang(answers, **STREAM, loss_mask=LOSS_MASK)
    whole = body("sglang-start-0")["answers"]
    long = "must have one entry per token, 41, got 104; pass the logprob_start_len that was sent as starts="
    with pytest.raises(ScoreError, match=long):
        servers.read_sglang(whole, **STREAM, loss_mask=LOSS_MASK, starts=starts)


def test_sglang_scores_nothing_of_a_prompt_without_a_start():
    answers = body("sglang-no-start")["answers"]
    with pytest.raises(ScoreError, match=r"input_token_logprobs must .* 104, got 0; ask with logprob_start_len=0"):
        servers.read_sglang(answers, **FIRST)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_likely_tokens_of_sglang_are_those_of_vllm(k):
    top = servers.read_sglang_topk(body("sglang-top-20-first")["answers"], **FIRST, k=k)
    wide = servers.read_vllm_topk(body("vllm-prompt_logprobs-20-first")["answers"], **FIRST, k=k)
    assert torch.equal(top.ids, wide.ids)
    assert_close(top.logp, wide.logp, equal_nan=True, rtol=0, atol=2 * ROUNDING)


def test_an_echo_of_sglang_holds_the_generated_token_too():
    """Its /v1/completions refuses `max_tokens: 0`, and echoes no ids: ask /generate."""
    answers = body("sglang-echo")["answers"]
    with pytest.raises(ScoreError, match="one entry per token, 104, got 105; an echo goes on into the completion"):
        servers.read_openai(answers, **FIRST, token_id=None)


def test_llama_cpp_pairs_each_token_with_the_logits_after_it():
    """Without a leading BOS its score of x[i] is log p(x[i] | x[: i + 1]), where log p(x[i] | x[:i]) is right.

    Counts and ids are right, so the readers take it. The scores are 9.1 and 7.1 nats a token too low in the two
    sequences, and tell nothing of the right ones.
    """
    recorded = body("llama_cpp-echo-wrong")
    answers, layout = recorded["answers"], stream(recorded)
    words = [text for answer in answers for text in answer["choices"][0]["logprobs"]["tokens"]]
    ids = dict(zip(words, recorded["ids"], strict=True))
    teacher_logp = servers.read_openai(answers, **layout, token_id=ids.__getitem__)
    right_logp = torch.tensor(recorded["right_logp"])
    predicted = kdloss.next_token_labels(**layout) != -100
    assert torch.equal(teacher_logp.isnan(), ~predicted)
    gaps = [(right_logp - teacher_logp)[a : b - 1].mean().item() for a, b in pairwise(recorded["cu_seqlens"])]
    assert gaps == pytest.approx([9.134, 7.090], abs=1e-3)
    correlation = torch.corrcoef(torch.stack([right_logp[predicted], teacher_logp[predicted]]))[0, 1]
    assert abs(correlation) < 0.1, correlation
    found = kdloss.check_alignment(right_logp, teacher_logp, loss_mask=predicted, cu_seqlens=layout["cu_seqlens"])
    assert (found.tokens, found.aligned, found.verdict) == (129, False, "nothing in common"), found
    report = kdloss.check_batch(right_logp, None, teacher_logp, loss_mask=predicted, cu_seqlens=layout["cu_seqlens"])
    wrong = [finding.check for finding in report.findings if finding.verdict == "wrong"]
    assert wrong == ["teacher alignment", "distance"], report


def test_the_right_teacher_is_found_sound():
    answers = body("vllm-prompt_logprobs-0")["answers"]
    teacher_logp = servers.read_vllm(answers, **STREAM)
    noisy = LOGP + 0.5 * torch.randn(len(LOGP), generator=torch.Generator().manual_seed(0)).abs().neg()
    given = {"loss_mask": LOSS_MASK, "cu_seqlens": STREAM["cu_seqlens"]}
    assert kdloss.check_alignment(noisy, teacher_logp, **given).aligned
    labels = kdloss.next_token_labels(**STREAM)
    report = kdloss.check_batch(LOGP, None, teacher_logp, labels=labels, **given)
    assert report.ok, report
    own = kdloss.to_token_positions(teacher_logp, cu_seqlens=STREAM["cu_seqlens"], fill=torch.nan)
    later = {"loss_mask": LOSS_MASK & ~own.isnan(), "cu_seqlens": STREAM["cu_seqlens"]}
    assert kdloss.check_alignment(noisy, own, **later).shift == 1
