"""Tests the readers of scoring servers: values against the teacher's own logits in three protocols, and every fault."""

from __future__ import annotations

import copy
import doctest
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

import kdloss
from kdloss.integrations import servers
from kdloss.integrations.servers import ScoreError

RECORDED = Path(__file__).parents[1] / "examples" / "data"
V = 13
NAN = float("nan")


def same(found, expected):
    """Equal to float32 rounding, NaN (no score) in the same places."""
    assert_close(found, expected, equal_nan=True)


def vllm(tokens, rows, k):
    """`rows[i]` are the teacher's log-probs of every token at position i, None for the first."""
    entries = [None]
    for token, row in zip(tokens[1:], rows[1:], strict=True):
        top = row.topk(k).indices.tolist()
        entries.append({str(i): {"logprob": row[i].item(), "decoded_token": "x"} for i in dict.fromkeys([token, *top])})
    return {"id": f"cmpl-{len(tokens)}", "choices": [{"index": 0, "prompt_logprobs": entries}]}


def sglang(tokens, rows, k, start=0):
    scored = [[None, tokens[start], None]] if tokens else []
    likely = [None] if tokens else []
    for token, row in zip(tokens[start + 1 :], rows[start + 1 :], strict=True):
        scored.append([row[token].item(), token, None])
        likely.append([[row[i].item(), i, None] for i in row.topk(k).indices.tolist()])
    return {"meta_info": {"id": "9f", "input_token_logprobs": scored, "input_top_logprobs": likely}}


def openai(tokens, rows, k):
    values = [None] + [row[token].item() for token, row in zip(tokens[1:], rows[1:], strict=True)]
    likely = [None]
    likely += [{f"token_id:{i}": row[i].item() for i in row.topk(k).indices.tolist()} for row in rows[1:]]
    words = [f"token_id:{token}" for token in tokens]
    logprobs = {"tokens": words, "token_logprobs": values[: len(tokens)], "top_logprobs": likely[: len(tokens)]}
    return {"id": "cmpl-7", "choices": [{"index": 0, "logprobs": logprobs}]}


SERVERS = {
    "vllm": (vllm, servers.read_vllm, servers.read_vllm_topk),
    "sglang": (sglang, servers.read_sglang, servers.read_sglang_topk),
    "openai": (openai, servers.read_openai, servers.read_openai_topk),
}


class Batch:
    """A packed stream, the teacher's log-probs of all tokens at prediction positions, and servers' answers for it."""

    def __init__(self, lengths, seed=0, k=3):
        generator = torch.Generator().manual_seed(seed)
        self.k, self.cu_seqlens = k, kdloss.cu_seqlens_from_lengths(torch.tensor(lengths))
        total = sum(lengths)
        self.input_ids = torch.randint(V, (total,), generator=generator)
        self.loss_mask = torch.rand(total, generator=generator) < 0.5  # several turns, in a random pattern
        self.teacher = torch.randn(total, V, generator=generator).mul(2).log_softmax(-1)
        self.labels = kdloss.next_token_labels(self.input_ids, cu_seqlens=self.cu_seqlens)

    def answers(self, make, **options):
        own = []
        for start, stop in zip(self.cu_seqlens.tolist(), self.cu_seqlens.tolist()[1:], strict=False):
            rows = [None, *self.teacher[start : stop - 1]] if stop > start else []
            own.append(make(self.input_ids[start:stop].tolist(), rows, self.k, **options) if stop > start else None)
        return own

    @property
    def expected(self):
        """The teacher's log-probs of the next tokens; NaN where a sequence ends."""
        return kdloss.token_logprobs(self.teacher, self.labels).masked_fill(self.labels == -100, NAN)

    def layout(self, **options):
        return {"cu_seqlens": self.cu_seqlens, **options}


@pytest.mark.parametrize("server", SERVERS)
@settings(max_examples=40)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 99), masked=st.booleans())
def test_the_teachers_own_log_probs_come_out(server, lengths, seed, masked):
    make, read, read_topk = SERVERS[server]
    batch = Batch(lengths, seed)
    answers = batch.answers(make)
    layout = batch.layout(loss_mask=batch.loss_mask if masked else None)
    same(read(answers, batch.input_ids, **layout), batch.expected)
    top = read_topk(answers, batch.input_ids, k=batch.k, **layout)
    assert (top.logp.dtype, top.ids.dtype) == (torch.float32, torch.int64)
    best = batch.teacher.topk(batch.k)
    predicted = batch.labels != -100
    same(top.logp, torch.where(predicted[:, None], best.values, NAN))
    assert_close(top.ids, torch.where(predicted[:, None], best.indices, -1))


@pytest.mark.parametrize("server", SERVERS)
def test_what_is_not_trained_on_may_be_missing(server):
    make, read, read_topk = SERVERS[server]
    batch = Batch([6, 5, 4], seed=3)
    answers = batch.answers(make)
    for b, (start, stop) in enumerate([(0, 6), (6, 11), (11, 15)]):
        for position in range(1, stop - start):
            if not batch.loss_mask[start + position - 1]:
                forget(server, answers[b], position)
    layout = batch.layout(loss_mask=batch.loss_mask)
    trained = batch.loss_mask & (batch.labels != -100)
    assert 0 < trained.sum() < 12
    same(read(answers, batch.input_ids, **layout), torch.where(trained, batch.expected, NAN))
    top, best = read_topk(answers, batch.input_ids, k=3, **layout), batch.teacher.topk(3)
    assert_close(top.ids, torch.where(trained[:, None], best.indices, -1))
    same(top.logp, torch.where(trained[:, None], best.values, NAN))
    with pytest.raises(ScoreError, match=r"sequence \d .*is trained on, and its log-prob is None"):
        read(answers, batch.input_ids, **batch.layout())


def forget(server, answer, position):
    """Removes a token's scores from an answer."""
    if server == "vllm":
        answer["choices"][0]["prompt_logprobs"][position] = None
    elif server == "sglang":
        answer["meta_info"]["input_token_logprobs"][position][0] = None
        answer["meta_info"]["input_top_logprobs"][position] = None
    else:
        answer["choices"][0]["logprobs"]["token_logprobs"][position] = None
        answer["choices"][0]["logprobs"]["top_logprobs"][position] = None


def entries(server, answer, top=False):
    if server == "vllm":
        return answer["choices"][0]["prompt_logprobs"]
    if server == "sglang":
        return answer["meta_info"]["input_top_logprobs" if top else "input_token_logprobs"]
    return answer["choices"][0]["logprobs"]["top_logprobs" if top else "token_logprobs"]


FAULTS = {
    "cut off": (lambda s, a: entries(s, a).pop(), r"must have one entry per token, 5, got 4"),
    "too long": (lambda s, a: entries(s, a).append(entries(s, a)[-1]), r"must have one entry per token, 5, got 6"),
    "unscored": (lambda s, a: forget(s, a, 4), r"token 4 \(id \d+\) is trained on, and its log-prob is None"),
    "empty": (lambda s, a: a.clear(), "holds no"),
    "not asked for": (lambda s, a: entries(s, a).clear(), "must have one entry per token, 5, got 0"),
    "no choice": (lambda s, a: a.update(choices=[], meta_info=[]), "0 choices|holds no input_token_logprobs"),
    "two choices": (
        lambda s, a: a.update(choices=a["choices"] * 2) if s != "sglang" else a.clear(),
        "2 choices|holds no meta_info",
    ),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_raises_and_names_the_request(server, fault):
    make, read, _ = SERVERS[server]
    batch = Batch([6, 5, 4])
    answers = batch.answers(make)
    spoil, message = FAULTS[fault]
    spoil(server, answers[1])
    with pytest.raises(ScoreError, match=rf"^sequence 1 \((request .*, )?5 tokens\): .*({message})"):
        read(answers, batch.input_ids, **batch.layout())


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("value", [float("nan"), None])
def test_nan_is_no_log_prob(server, value):
    make, read, _ = SERVERS[server]
    batch = Batch([4])
    answers = batch.answers(make)
    if server == "vllm":
        for entry in entries(server, answers[0])[1:]:
            for score in entry.values():
                score["logprob"] = float("nan")
    elif server == "sglang":
        entries(server, answers[0])[2][0] = value
    else:
        entries(server, answers[0])[2] = value
    with pytest.raises(ScoreError, match=r"is trained on, and its log-prob is (nan|None)"):
        read(answers, batch.input_ids, **batch.layout())


@pytest.mark.parametrize("server", SERVERS)
def test_scores_of_other_tokens_raise(server):
    make, read, read_topk = SERVERS[server]
    batch = Batch([6, 5])
    answers = batch.answers(make)
    other = batch.input_ids.clone()
    at = 8
    while str(other[at].item()) in (entries("vllm", answers[1])[2] if server == "vllm" else ()) or (
        other[at] == batch.input_ids[at]
    ):
        other[at] = (other[at] + 1) % V
    named = {"vllm": "request cmpl-5", "sglang": "request 9f", "openai": "request cmpl-7"}[server]
    message = rf"sequence 1 \({named}, 5 tokens\): token 2 was sent as id {other[at]}, and ids? .* scored"
    for call in (read, lambda *a, **kw: read_topk(*a, k=3, **kw)):
        with pytest.raises(ScoreError, match=message):
            call(answers, other, **batch.layout())


@pytest.mark.parametrize("server", SERVERS)
def test_too_few_likely_tokens_raise(server):
    make, _, read_topk = SERVERS[server]
    batch = Batch([6, 5], k=2)
    with pytest.raises(ScoreError, match=r"sequence 0 .*[23] of its k = 4 most likely ids were given"):
        read_topk(batch.answers(make), batch.input_ids, k=4, **batch.layout())
    plain = batch.answers(make)
    if server != "vllm":
        for answer in plain:
            entries(server, answer, top=True).clear()
        with pytest.raises(ScoreError, match=r"sequence 0 .*top_logprobs must have one entry per token, 6, got 0"):
            read_topk(plain, batch.input_ids, k=2, **batch.layout())


@pytest.mark.parametrize("server", SERVERS)
def test_a_sequence_that_was_not_sent(server):
    make, read, read_topk = SERVERS[server]
    batch = Batch([4, 3])
    answers = [batch.answers(make)[0], None]
    mask = torch.arange(7) < 4
    assert read(answers, batch.input_ids, **batch.layout(loss_mask=mask))[3:].isnan().all()
    assert (read_topk(answers, batch.input_ids, k=2, **batch.layout(loss_mask=mask)).ids[3:] == -1).all()
    with pytest.raises(ScoreError, match=r"sequence 1 \(3 tokens\): there is no answer, and 2 of its tokens"):
        read(answers, batch.input_ids, **batch.layout())
    with pytest.raises(ValueError, match=r"answers must have one entry per sequence, 2, got 1"):
        read(answers[:1], batch.input_ids, **batch.layout(loss_mask=mask))


def test_vllm_offline_objects_and_bare_lists():
    batch = Batch([6, 5, 4])
    answers = batch.answers(vllm)
    objects = []
    for answer in answers:
        scores = [
            entry and {int(i): SimpleNamespace(**x) for i, x in entry.items()} for entry in entries("vllm", answer)
        ]
        objects.append(SimpleNamespace(request_id="17", prompt_logprobs=scores))
    for alike in (
        [answer["choices"][0] for answer in answers],
        [entries("vllm", answer) for answer in answers],
        [{"prompt_logprobs": entries("vllm", answer), "choices": [{}]} for answer in answers],  # chat completions
        objects,
    ):
        same(servers.read_vllm(alike, batch.input_ids, **batch.layout()), batch.expected)
    objects[2].prompt_logprobs = None
    message = r"sequence 2 \(request 17, 4 tokens\): the answer holds no prompt_logprobs"
    with pytest.raises(ScoreError, match=message):
        servers.read_vllm(objects, batch.input_ids, **batch.layout())


def test_the_set_of_likely_tokens_does_not_depend_on_the_sampled_one():
    batch = Batch([40], k=2)
    answers = batch.answers(vllm)
    assert {len(entry) for entry in entries("vllm", answers[0])[1:]} == {2, 3}
    top = servers.read_vllm_topk(answers, batch.input_ids, k=2, **batch.layout())
    assert_close(top.ids[:-1], batch.teacher.topk(2).indices[:-1])


def test_sglang_from_the_prompts_end_on():
    batch = Batch([6, 5, 4])
    prompts = torch.tensor([3, 2, 1])
    mask = kdloss.response_mask(prompts, cu_seqlens=batch.cu_seqlens, total_tokens=15)
    starts = (prompts - 1).tolist()
    answers = [
        sglang(batch.input_ids[a:b].tolist(), [None, *batch.teacher[a : b - 1]], 3, start=start)
        for a, b, start in zip([0, 6, 11], [6, 11, 15], starts, strict=True)
    ]
    layout = batch.layout(loss_mask=mask, starts=starts)
    same(servers.read_sglang(answers, batch.input_ids, **layout), torch.where(mask, batch.expected, NAN))
    top = servers.read_sglang_topk(answers, batch.input_ids, k=3, **layout)
    assert_close(top.ids, torch.where(mask[:, None], batch.teacher.topk(3).indices, -1))
    with pytest.raises(ScoreError, match=r"sequence 0 .*one entry per token, 6, got 4"):
        servers.read_sglang(answers, batch.input_ids, **batch.layout(loss_mask=mask))
    everything = batch.layout(starts=starts)
    with pytest.raises(ScoreError, match=r"sequence 0 .*token 1 .* is trained on"):
        servers.read_sglang(answers, batch.input_ids, **everything)
    with pytest.raises(ScoreError, match=r"starts must be in 0 .. 6, got 9"):
        servers.read_sglang(answers, batch.input_ids, **batch.layout(starts=9))


def test_openai_texts_need_their_ids():
    batch = Batch([5])
    answers = batch.answers(openai)
    block = answers[0]["choices"][0]["logprobs"]
    block["tokens"] = [f"word{int(text.removeprefix('token_id:'))}" for text in block["tokens"]]
    with pytest.raises(ScoreError, match=r"given as text, 'word\d+'.*return_tokens_as_token_ids"):
        servers.read_openai(answers, batch.input_ids, **batch.layout())
    ids = {f"word{i}": i for i in range(V)}
    for token_id in (ids.__getitem__, None):
        read = servers.read_openai(answers, batch.input_ids, token_id=token_id, **batch.layout())
        same(read, batch.expected)


@pytest.mark.parametrize("server", SERVERS)
def test_recorded_answers(server):
    rows = json.loads((RECORDED / f"{server}.json").read_text())
    tokens = [row["tokens"] for row in rows]
    cu_seqlens = kdloss.cu_seqlens_from_lengths(torch.tensor([len(x) for x in tokens]))
    input_ids = torch.tensor([x for row in tokens for x in row])
    mask = kdloss.response_mask(
        torch.tensor([row["prompt_length"] for row in rows]), cu_seqlens=cu_seqlens, total_tokens=input_ids.shape[0]
    )
    read = SERVERS[server][1]([row["answer"] for row in rows], input_ids, cu_seqlens=cu_seqlens)
    sglang_rows = json.loads((RECORDED / "sglang.json").read_text())
    own = [[entry[0] for entry in row["answer"]["meta_info"]["input_token_logprobs"]] for row in sglang_rows]
    same(read, torch.tensor([x for row in own for x in [*row[1:], NAN]]))
    assert (read[mask] > -0.1).all()  # this teacher knows the answers


def test_arguments_are_checked():
    batch = Batch([4])
    answers = batch.answers(vllm)
    with pytest.raises(TypeError, match=r"loss_mask must be torch.bool"):
        servers.read_vllm(answers, batch.input_ids, **batch.layout(loss_mask=batch.loss_mask.long()))
    with pytest.raises(ValueError, match=r"loss_mask must match input_ids \(4,\), got \(3,\)"):
        servers.read_vllm(answers, batch.input_ids, **batch.layout(loss_mask=batch.loss_mask[:3]))
    with pytest.raises(TypeError, match="input_ids must be int32 or int64"):
        servers.read_vllm(answers, batch.input_ids.float(), **batch.layout())
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        servers.read_vllm(answers, batch.input_ids, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="k must be > 0, got 0"):
        servers.read_vllm_topk(answers, batch.input_ids, k=0, **batch.layout())
    spoiled = copy.deepcopy(answers)
    spoiled[0]["choices"][0]["prompt_logprobs"][2] = ["nonsense"]
    with pytest.raises(ScoreError, match=r"prompt_logprobs\[2\] must be null or a .*, got list \['nonsense'\]"):
        servers.read_vllm(spoiled, batch.input_ids, **batch.layout())


def test_the_examples_run():
    found = doctest.testmod(servers)
    assert found.attempted
    assert not found.failed
