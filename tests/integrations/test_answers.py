"""Tests what the readers of scoring servers accept as a log-prob, an id or an answer: each format, and nothing else."""

from __future__ import annotations

import json
from collections.abc import MutableSequence
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import kdloss
from kdloss.integrations import servers
from kdloss.integrations.servers import ScoreError

K, NAN = 2, float("nan")


def same(found, expected):
    """Equal bits, NaN (no score) in the same places."""
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected, np.float32))


def vllm(tokens, own, top, start=0):
    rows = []
    for token, x, likely in zip(tokens, own, top, strict=True):
        row = {str(token): {}} | {str(t): {"logprob": value, "rank": 1, "decoded_token": "y"} for t, value in likely}
        rows.append(row | {str(token): {"logprob": x, "rank": 9, "decoded_token": "x"}})
    return {"id": "r-1", "choices": [{"prompt_logprobs": [None, *rows[1:]] if tokens else []}]}


def sglang(tokens, own, top, start=0):
    scored = [[x, t, None] for t, x in zip(tokens, own, strict=True)][start:]
    likely = [[[x, t, None] for t, x in row] for row in top][start:]
    if scored:
        scored[0][0], likely[0] = None, None
    return {"meta_info": {"id": "r-1", "input_token_logprobs": scored, "input_top_logprobs": likely}}


def openai(tokens, own, top, start=0):
    block = {
        "tokens": [f"token_id:{t}" for t in tokens],
        "token_logprobs": [None, *own[1:]][: len(tokens)],
        "top_logprobs": [None, *({f"token_id:{t}": x for t, x in row} for row in top[1:])][: len(tokens)],
    }
    return {"id": "r-1", "choices": [{"logprobs": block}]}


SERVERS = {
    "vllm": (vllm, servers.read_vllm, servers.read_vllm_topk),
    "sglang": (sglang, servers.read_sglang, servers.read_sglang_topk),
    "openai": (openai, servers.read_openai, servers.read_openai_topk),
}
TOKENS = [5, 7, 2, 9]
OWN = [None, -1.0, -3.0, -2.0]
TOP = [[], [(7, -1.0), (30, -1.5)], [(31, -0.5), (32, -2.5)], [(9, -2.0), (33, -2.25)]]


def answer(server, own=OWN, top=TOP):
    return SERVERS[server][0](TOKENS, own, top)


def stream(**options):
    return {"input_ids": torch.tensor(TOKENS), "cu_seqlens": torch.tensor([0, 4]), **options}


def both(server, answers, **options):
    _, read, read_topk = SERVERS[server]
    return read(answers, **stream(**options)), read_topk(answers, k=K, **stream(**options))


@st.composite
def batches(draw):
    """Lengths, trained tokens (in any pattern), starts of SGLang's answers, and a seed for the values."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    trained = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    return lengths, trained, draw(st.integers(0, 2**16))


@pytest.mark.parametrize("server", SERVERS)
@settings(max_examples=60)
@given(batch=batches())
def test_a_json_answer_comes_out_where_it_is_needed(server, batch):
    """The oracle goes token by token in NumPy: position t of a sequence gets the server's score of token t + 1.

    Scores that no trained position needs are omitted at random, and whole prompts by SGLang's start.
    """
    lengths, trained, seed = batch
    make, read, read_topk = SERVERS[server]
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    expected, ids = np.full(total, NAN, np.float32), np.full((total, K), -1)
    top_logp = np.full((total, K), NAN, np.float32)
    answers, tokens, starts, at = [], [], [], 0
    for n, mask in zip(lengths, trained, strict=True):
        sent = rng.permutation(40)[:n].tolist()
        own = (-1.5 - rng.exponential(3.0, n)).astype(np.float32).tolist()
        top = [
            [(int(t), float(np.float32(x))) for t, x in zip(rng.permutation(40)[:K], (-0.8, -4.0), strict=True)]
            for _ in sent
        ]
        top = [[(t, own[i] if t == sent[i] else x) for t, x in row] for i, row in enumerate(top)]
        needed = [i + 1 for i in range(n - 1) if mask[i]]
        start = int(rng.integers(0, needed[0])) if server == "sglang" and needed else 0
        for i in range(n):
            kept = i in needed or (i > start and rng.random() < 0.5)
            if not kept:
                own[i], top[i] = None, []
        made = make(sent, own, top, start)
        if server == "vllm":
            rows = made["choices"][0]["prompt_logprobs"]
            rows[:] = [row if own[i] is not None else None for i, row in enumerate(rows)]
        answers.append(json.loads(json.dumps(made)) if needed or rng.random() < 0.7 else None)
        for t in range(n - 1):
            if answers[-1] is not None and own[t + 1] is not None:
                expected[at + t] = own[t + 1]
                row = dict(top[t + 1]) | ({sent[t + 1]: own[t + 1]} if server == "vllm" else {})
                best = sorted(row.items(), key=lambda entry: -entry[1])[:K]
                ids[at + t, : len(best)] = [token for token, _ in best]
                top_logp[at + t, : len(best)] = [x for _, x in best]
        tokens, starts, at = tokens + sent, [*starts, start], at + n
    layout = {
        "input_ids": torch.tensor(tokens, dtype=torch.int64),
        "cu_seqlens": torch.tensor(np.cumsum([0, *lengths])),
        "loss_mask": torch.tensor([x for mask in trained for x in mask], dtype=torch.bool),
        **({"starts": starts} if server == "sglang" else {}),
    }
    found = read(answers, **layout)
    np.testing.assert_array_equal(found.numpy(), expected)
    likely = read_topk(answers, k=K, **layout)
    np.testing.assert_array_equal(likely.ids.numpy(), ids)
    np.testing.assert_array_equal(likely.logp.numpy(), top_logp)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(-(10**400)),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(["7", "logprob", "id", "choices", ""]), x),
    max_leaves=6,
)


def nodes(x):
    """Every (container, key) in a JSON value."""
    for key, value in list(x.items()) if isinstance(x, dict) else list(enumerate(x)):
        yield x, key
        if isinstance(value, (dict, list)):
            yield from nodes(value)


@pytest.mark.parametrize("server", SERVERS)
@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_answer_raises_or_harms_one_token_at_most(server, data):
    """One node of the JSON is replaced by another value: the only error is ScoreError, and no result is above 0."""
    made = answer(server)
    container, key = data.draw(st.sampled_from(list(nodes(made))))
    container[key] = data.draw(JUNK)
    _, read, read_topk = SERVERS[server]
    calls = {
        (-1.0, -3.0, -2.0): lambda: read([made], **stream()),
        (-1.0, -0.5, -2.0): lambda: read_topk([made], k=K, **stream()).logp[:, 0],
    }
    for true, call in calls.items():
        with suppress(ScoreError):
            *found, last = call().tolist()
            assert all(x <= 0 for x in found)
            assert sum(x != y for x, y in zip(found, true, strict=True)) <= 1
            assert last != last


NO_LOG_PROB = [0.9, 0.002, 3, float("inf"), True, False, "-0.5", [-0.5], np.bool_(True), 1j]


@pytest.mark.parametrize("value", NO_LOG_PROB, ids=repr)
@pytest.mark.parametrize("server", SERVERS)
def test_what_is_no_log_prob_is_refused_wherever_it_stands(server, value):
    _, read, read_topk = SERVERS[server]
    message = r"^sequence 0 \(request r-1, 4 tokens\): a log-prob at token 2 \(id 2\) must be a number <= 0, got .*"
    spoiled = answer(server, own=[None, -1.0, value, -2.0])
    untrained = {"loss_mask": torch.tensor([True, False, True, False])}
    for options in ({}, untrained):
        with pytest.raises(ScoreError, match=message):
            read([spoiled], **stream(**options))
    spoiled = answer(server, top=[*TOP[:2], [(31, value), (32, -2.5)], TOP[3]])
    with pytest.raises(ScoreError, match=message):
        read_topk([spoiled], k=K, **stream())


@pytest.mark.parametrize("server", SERVERS)
def test_numbers_that_are_log_probs(server):
    """Rounding above 0 counts as 0; -inf, NumPy's numbers and integers are numbers."""
    own = SERVERS[server][1]([answer(server, own=[None, 9e-4, float("-inf"), np.float32(-2)])], **stream())
    same(own, [0.0, float("-inf"), -2.0, NAN])
    assert not own[0].signbit()
    certain = [[], [(7, np.float64(3e-7)), (30, -40)], *TOP[2:]]
    own, top = both(server, [answer(server, own=[None, 3e-7, -3, -2.0], top=certain)])
    same(own, [0.0, -3.0, -2.0, NAN])
    assert top.logp[0].tolist() == [0.0, -40.0]


@pytest.mark.parametrize("server", SERVERS)
def test_a_score_of_the_first_token_shows_a_shift(server):
    """Scores at prediction positions, for example: if the last token is not trained on, only the first one shows it."""
    shifted = answer(server, own=[-1.0, -3.0, -2.0, None])
    if server == "vllm":
        shifted["choices"][0]["prompt_logprobs"][0] = {"5": {"logprob": -1.0}}
    elif server == "sglang":
        shifted["meta_info"]["input_token_logprobs"][0][0] = -1.0
    else:
        shifted["choices"][0]["logprobs"]["token_logprobs"][0] = -1.0
    mask = torch.tensor([True, True, False, False])
    for read in SERVERS[server][1], lambda *a, **kw: SERVERS[server][2](*a, k=K, **kw):
        with pytest.raises(ScoreError, match=r"token 0 \(id 5\) has a log-prob, -1.0, and nothing comes before it"):
            read([shifted], **stream(loss_mask=mask))
    for unscored in (0.0, NAN):
        alike = json.loads(json.dumps(shifted).replace("-1.0", str(unscored).replace("nan", "NaN")))
        assert SERVERS[server][1]([alike], **stream(loss_mask=mask))[0] == -3.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([(31, -0.5), (31, -0.5)], "have id 31 twice"),
        ([(-1, -0.5), (32, -2.5)], r"must have ids in 0 .. 2\^63, got -1"),
        ([("31", -0.5), (32, -2.5)], r"must have ids in 0 .. 2\^63, got str '31'"),
        ([(31.0, -0.5), (32, -2.5)], r"must have ids in 0 .. 2\^63, got 31.0"),
        ([(2**63, -0.5), (32, -2.5)], r"must have ids in 0 .. 2\^63, got 9223372036854775808"),
        ([(True, -0.5), (32, -2.5)], r"must have ids in 0 .. 2\^63, got True"),
        ([(31, -0.1), (32, -0.2)], r"have a probability of 1.72 together"),
    ],
)
def test_likely_tokens_are_distinct_ids_of_one_distribution(row, message):
    spoiled = answer("sglang", top=[*TOP[:2], row, TOP[3]])
    with pytest.raises(ScoreError, match=rf"\(request r-1, .*the likely tokens at token 2 \(id 2\) {message}"):
        servers.read_sglang_topk([spoiled], k=K, **stream())
    assert servers.read_sglang([spoiled], **stream())[0] == -1.0


def test_two_texts_of_one_id_and_keys_that_are_no_ids():
    spoiled = answer("openai", top=[*TOP[:2], [(31, -0.5), ("031", -2.5)], TOP[3]])
    with pytest.raises(ScoreError, match="have id 31 twice: does every text have an id of its own"):
        servers.read_openai_topk([spoiled], k=K, **stream())
    spoiled = answer("vllm", top=[*TOP[:2], [("the", -0.5)], TOP[3]])
    with pytest.raises(ScoreError, match=r"prompt_logprobs\[2\] must be by token id, got list \['2', 'the'\]"):
        servers.read_vllm_topk([spoiled], k=K, **stream())


@pytest.mark.parametrize("scored", [True, 1.0, "1", None], ids=repr)
def test_an_id_is_an_integer(scored):
    own = [[None, 5, None], [-1.0, scored, None]]
    with pytest.raises(ScoreError, match=rf"token 1 was sent as id 1, and id {scored!r} was scored"):
        servers.read_sglang([own], torch.tensor([5, 1]), cu_seqlens=torch.tensor([0, 2]))


def test_bf16_scores_of_a_flat_teacher_are_a_distribution():
    """The worst case of bf16: every log-prob is rounded up, by 3 % of the mass for log-probs of -8 to -16."""
    ids = np.arange(4096)
    x = -np.log(len(ids)) + 1 / 32
    row = {str(i): {"logprob": float(x)} for i in ids}
    top = servers.read_vllm_topk([[None, row]], torch.tensor([5, 7]), k=3, cu_seqlens=torch.tensor([0, 2]))
    assert top.ids[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "starts",
    [1, [1], (1,), np.int64(1), np.array(1), np.array([1], np.int32), torch.tensor(1), torch.tensor([1])],
    ids=repr,
)
def test_starts_are_a_number_or_one_a_sequence(starts):
    late = sglang(TOKENS, OWN, TOP, start=1)
    layout = stream(loss_mask=torch.tensor([False, True, True, False]), starts=starts)
    same(servers.read_sglang([late], **layout), [NAN, -3.0, -2.0, NAN])
    assert servers.read_sglang_topk([late], k=K, **layout).ids.tolist() == [[-1, -1], [31, 32], [9, 33], [-1, -1]]


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        ([1, 1], ValueError, "starts must be one number, or one per sequence, 1, got 2"),
        ([], ValueError, "starts must be one number, or one per sequence, 1, got 0"),
        (np.array([1, 5, 7]), ValueError, "starts must be one number, or one per sequence, 1, got 3"),
        (1.0, TypeError, "starts must be an integer, or one per sequence, got float 1.0"),
        (torch.tensor([1.0]), TypeError, "got float 1.0"),
        (np.array([True]), TypeError, "got bool True"),
        ("1", TypeError, "got str '1'"),
        (None, TypeError, "got NoneType None"),
        ([[1]], TypeError, r"got list \[1\]"),
        (5, ScoreError, r"sequence 0 \(request r-1, 4 tokens\): starts must be in 0 .. 4, got 5"),
        ([-1], ScoreError, r"starts must be in 0 .. 4, got -1"),
    ],
)
def test_other_starts_are_refused_by_name(starts, error, message):
    late = sglang(TOKENS, OWN, TOP, start=1)
    with pytest.raises(error, match=message):
        servers.read_sglang([late], **stream(starts=starts))


@pytest.mark.parametrize("server", SERVERS)
def test_what_is_not_an_answer(server):
    _, read, read_topk = SERVERS[server]
    for call in read, lambda *a, **kw: read_topk(*a, k=K, **kw):
        for wrong in ("oops", b"oops", 3.0):
            shown = rf"got (\w+ )?{wrong!r}"
            with pytest.raises(ScoreError, match=rf"sequence 0 \(4 tokens\): an answer must be the server's .*{shown}"):
                call([wrong], **stream())
        for refused in (
            {"error": {"message": "too long", "code": 400}},
            {"object": "error", "message": "too long"},
            {"error": "too long"},
        ):
            with pytest.raises(ScoreError, match=r"sequence 0 .* holds no .*; the server said 'too long'$"):
                call([refused], **stream())
        for answers in (answer(server), "text", iter([answer(server)]), SimpleNamespace()):
            with pytest.raises(TypeError, match="answers must be a list with one answer per sequence, got"):
                call(answers, **stream())
        with pytest.raises(ScoreError, match=r"sequence 0 \(4 tokens\): .* 4, got 1|sequence 0 \(4 tokens\): .*list"):
            call([[answer(server)]], **stream())


def test_where_a_list_will_do_and_where_not():
    whole = answer("sglang")
    bare = whole["meta_info"]["input_token_logprobs"]
    same(servers.read_sglang([bare], **stream()), servers.read_sglang([whole], **stream()))
    with pytest.raises(ScoreError, match=r"a list, which holds no input_top_logprobs: pass the whole response"):
        servers.read_sglang_topk([bare], k=K, **stream())
    servers.read_sglang_topk([whole], k=K, **stream())
    with pytest.raises(ScoreError, match=r"entries of input_token_logprobs must be \[log-prob, id, text\], got -1.0"):
        servers.read_sglang([[None, -1.0, -3.0, -2.0]], **stream())
    with pytest.raises(ScoreError, match=r"must be the server's response, parsed, or one of its choices, got list"):
        servers.read_openai([[None, -1.0, -3.0, -2.0]], **stream())
    with pytest.raises(ScoreError, match=r"logprobs must hold token_logprobs and tokens, got list"):
        servers.read_openai([{"choices": [{"logprobs": [None, -1.0, -3.0, -2.0]}]}], **stream())
    with pytest.raises(ScoreError, match=r"prompt_logprobs must be a list with one entry per token, got dict"):
        servers.read_vllm([{"prompt_logprobs": {"7": -1.0}}], **stream())


@pytest.mark.parametrize("server", ["vllm", "openai"])
def test_each_of_several_choices_is_the_answer_of_a_sequence(server):
    _, read, _ = SERVERS[server]
    (choice,) = answer(server)["choices"]
    with pytest.raises(ScoreError, match=r"2 choices, expected 1: pass each choice as the answer of its sequence"):
        read([{"choices": [choice, choice]}], **stream())
    same(read([choice], **stream()), read([answer(server)], **stream()))


def test_a_request_that_sglang_aborted():
    meta = {"id": "r-1", "input_token_logprobs": [], "finish_reason": {"type": "abort", "message": "out of memory"}}
    with pytest.raises(ScoreError, match=r"\(request r-1, .* 4, got 0; the server said 'out of memory'"):
        servers.read_sglang([{"meta_info": meta}], **stream())


def test_minus_infinity_in_sglangs_json_is_null_and_raises_where_it_is_trained_on():
    spoiled = answer("sglang", own=[None, -1.0, None, -2.0], top=[*TOP[:2], [(31, -0.5), (32, None)], TOP[3]])
    mask = torch.tensor([True, False, True, False])
    same(servers.read_sglang([spoiled], **stream(loss_mask=mask)), [-1.0, NAN, -2.0, NAN])
    top = servers.read_sglang_topk([spoiled], k=K, **stream(loss_mask=mask))
    assert top.ids[1].tolist() == [31, -1]
    same(top.logp[1], [-0.5, NAN])
    with pytest.raises(ScoreError, match=r"token 2 \(id 2\) is trained on, and its log-prob is None"):
        servers.read_sglang([spoiled], **stream())
    mended = answer("sglang", top=[*TOP[:2], [(31, -0.5), (32, None)], TOP[3]])
    with pytest.raises(ScoreError, match=r"token 2 \(id 2\) is trained on, and 1 of its k = 2 most likely ids"):
        servers.read_sglang_topk([mended], k=K, **stream())


@pytest.mark.parametrize("k", [True, 2.0, "2", None], ids=repr)
@pytest.mark.parametrize("server", SERVERS)
def test_k_is_an_integer(server, k):
    with pytest.raises(TypeError, match=f"k must be an integer, got {type(k).__name__} "):
        SERVERS[server][2]([answer(server)], k=k, **stream())
    assert SERVERS[server][2]([answer(server)], k=np.int64(1), **stream()).ids.shape == (4, 1)


def test_top_k_of_texts_needs_their_ids():
    with pytest.raises(TypeError, match="token_id must turn a token's text into its id, got None"):
        servers.read_openai_topk([answer("openai")], k=K, token_id=None, **stream())
    with pytest.raises(ScoreError, match=r"token 0 was sent as id 5, and id None was scored"):
        servers.read_openai([answer("openai")], token_id={}.get, **stream())


class FlatLogprobs(MutableSequence):
    """Like vLLM's class of this name: flat lists, read as a sequence of dictionaries; an empty one stands for None."""

    def __init__(self, rows):
        self.rows = [dict(row or {}) for row in rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if not isinstance(i, int):
            raise TypeError(i)
        return {int(t): SimpleNamespace(**x) for t, x in self.rows[i].items()}

    __setitem__ = __delitem__ = insert = None


def test_python_objects_of_vllm_and_of_the_openai_client():
    as_json = answer("vllm")
    rows = as_json["choices"][0]["prompt_logprobs"]
    flat, named = FlatLogprobs(rows), dict.fromkeys(("id", "object", "error"))
    expected = both("vllm", [as_json])
    for alike in (
        flat,
        tuple(rows),
        SimpleNamespace(request_id="17", prompt_token_ids=TOKENS, prompt_logprobs=flat),
        SimpleNamespace(**named, choices=[SimpleNamespace(prompt_logprobs=rows)]),  # client.completions.create
        {"request_id": "17", "choices": [{}], "prompt_logprobs": rows},  # /inference/v1/generate
    ):
        found = both("vllm", [alike])
        same(found[0], expected[0])
        assert torch.equal(found[1].ids, expected[1].ids)
    block = answer("openai")["choices"][0]["logprobs"]
    client = SimpleNamespace(**named, choices=[SimpleNamespace(logprobs=SimpleNamespace(**block))])
    found, expected = both("openai", [client]), both("openai", [answer("openai")])
    same(found[0], expected[0])
    same(found[1].logp, expected[1].logp)
    cut = SimpleNamespace(request_id="17", prompt_logprobs=FlatLogprobs(rows[:-1]))
    with pytest.raises(ScoreError, match=r"\(request 17, 4 tokens\): prompt_logprobs must have one .* 4, got 3"):
        servers.read_vllm([cut], **stream())


@pytest.mark.parametrize("server", ["vllm", "openai"])
def test_the_ids_that_a_server_says_it_was_given(server):
    """vLLM's `return_token_ids`, for two cases: a large k makes other sequences' tokens match, or texts are not ids."""
    read = SERVERS[server][1]
    said = answer(server)
    said["choices"][0]["prompt_token_ids"] = TOKENS
    if server == "openai":
        said["choices"][0]["logprobs"]["tokens"] = ["▁a", "b", "c", "d"]
    same(read([said], **stream()), [-1.0, -3.0, -2.0, NAN])
    said["choices"][0]["prompt_token_ids"] = [6, *TOKENS[1:]]
    with pytest.raises(ScoreError, match=r"\(request r-1, 4 tokens\): token 0 was sent as id 5, and id 6 was scored"):
        read([said], **stream())
    said["choices"][0]["prompt_token_ids"] = [1, *TOKENS]
    with pytest.raises(ScoreError, match=r"4 tokens were sent, and the server was given 5 prompt_token_ids"):
        read([said], **stream())


def test_an_echo_that_goes_on_into_the_completion():
    longer = openai([*TOKENS, 3], [*OWN, -1.0], [*TOP, [(3, -1.0)]])
    with pytest.raises(ScoreError, match=r"one entry per token, 4, got 5; an echo goes on .* max_tokens > 0"):
        servers.read_openai([longer], **stream())


def listed(server, ranked, values, sent, asked):
    """What a server with the top `asked` of `ranked` answers when `sent` was sampled.

    vLLM writes the sent token first and then the others of its top k, with their ranks. The rank of a token that it
    adds counts all tokens that are at least as likely. "openai" is such a list by text, without ranks. SGLang adds
    nothing.
    """
    top = ranked[:asked]
    if server == "sglang":
        meta = {"input_token_logprobs": [[None, 5, None], [values[sent], sent, None]]}
        return {"meta_info": meta | {"input_top_logprobs": [None, [[values[t], t, None] for t in top]]}}
    first = dict.fromkeys([sent, *top])
    if server == "openai":
        row = {f"token_id:{t}": values[t] for t in first}
        block = {"tokens": ["token_id:5", f"token_id:{sent}"], "token_logprobs": [None, values[sent]]}
        return {"choices": [{"logprobs": block | {"top_logprobs": [None, row]}}]}
    at_least = sum(x >= values[sent] for x in values.values())
    rank = {sent: at_least} | {t: i + 1 for i, t in enumerate(top)}
    return {"prompt_logprobs": [None, {str(t): {"logprob": values[t], "rank": rank[t]} for t in first}]}


@pytest.mark.parametrize("server", SERVERS)
@settings(max_examples=100)
@given(levels=st.lists(st.sampled_from([-2.0, -2.5, -3.0]), min_size=6, max_size=6), data=st.data())
def test_exact_ties_do_not_let_the_sampled_token_choose_the_set(server, levels, data):
    """bf16 makes log-probs equal. Whatever was sent, the k ids are the first k of the server's own order."""
    values = dict(zip(data.draw(st.permutations(range(10, 16))), levels, strict=True))
    ranked = sorted(values, key=lambda t: -values[t])  # as a server breaks ties: in any fixed order
    asked = data.draw(st.integers(1, 5))
    # an answer without ranks hides which of its top k was sent, so all of them are read
    k = asked if server == "openai" else data.draw(st.integers(1, asked))
    for sent in values:
        made = listed(server, ranked, values, sent, asked)
        layout = {"input_ids": torch.tensor([5, sent]), "cu_seqlens": torch.tensor([0, 2])}
        top = SERVERS[server][2]([made], k=k, **layout)
        assert sorted(top.ids[0].tolist()) == sorted(ranked[:k])
        assert top.logp[0].tolist() == [values[t] for t in ranked[:k]]


def test_without_ranks_the_sent_token_is_the_last_of_its_equals():
    """As in a list of numbers by id. Where the token is not first in the list, the server has kept its own order."""
    layout = {"input_ids": torch.tensor([5, 7]), "cu_seqlens": torch.tensor([0, 2]), "k": 2}
    for row, ids in [
        ({7: -2.0, 30: -1.0, 31: -2.0}, [30, 31]),
        ({7: -1.5, 30: -1.0, 31: -2.0}, [30, 7]),
        ({30: -1.0, 7: -2.0, 31: -2.0}, [30, 7]),
    ]:
        assert servers.read_vllm_topk([[None, row]], **layout).ids[0].tolist() == ids
        by_text = {f"token_id:{token}": x for token, x in row.items()}
        block = {"tokens": ["token_id:5", "token_id:7"], "token_logprobs": [None, row[7]]}
        echo = {"choices": [{"logprobs": block | {"top_logprobs": [None, by_text]}}]}
        assert servers.read_openai_topk([echo], **layout).ids[0].tolist() == ids


def test_missing_scores_leave_no_trace_and_a_wider_mask_shows_them():
    """NaN, not the 0 of a certain teacher: a loss over the tokens that have scores is finite, over others it is NaN."""
    late = sglang(TOKENS, OWN, TOP, start=1)
    mask = torch.tensor([False, True, True, False])
    teacher_logp = servers.read_sglang([late], **stream(loss_mask=mask, starts=1))
    top = servers.read_sglang_topk([late], k=K, **stream(loss_mask=mask, starts=1))
    logits = torch.zeros(4, 40, requires_grad=True)
    logp = kdloss.token_logprobs(logits, torch.tensor([7, 2, 9, -100]))
    loss = kdloss.distillation_loss(logp, logp.detach(), teacher_logp, loss_mask=mask).loss
    divergence = kdloss.topk_forward_kl(logits, top.logp, top.ids, tail="bucket")
    (loss + kdloss.token_mean(divergence, loss_mask=mask)).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[~mask].eq(0).all()
    assert logits.grad[mask].ne(0).any(-1).all()
    wider = torch.tensor([True, True, True, False])
    assert kdloss.distillation_loss(logp, logp.detach(), teacher_logp, loss_mask=wider).loss.isnan()
