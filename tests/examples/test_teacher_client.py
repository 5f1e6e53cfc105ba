"""Holds the teacher client to recorded answers on loopback: alignment, retries, errors that name the request."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from opd.rollout import Batch, score
from opd.teacher_client import TeacherEndpoint, TeacherError
from torch.testing import assert_close

DATA = Path(__file__).parent / "data"
KINDS = ("vllm", "sglang", "openai")
PATHS = {"vllm": "/v1/completions", "sglang": "/generate", "openai": "/v1/completions"}


class Replay(ThreadingHTTPServer):
    """Answers a request with the recording of its tokens; `faults` are served first, one per request."""

    daemon_threads = True

    def __init__(self, kind: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.faults, self.requests = kind, [], []
        self.rows = json.loads((DATA / f"{kind}.json").read_text())
        self.answers = {tuple(row["tokens"]): row["answer"] for row in self.rows}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def batch(self) -> Batch:
        lengths = [len(row["tokens"]) for row in self.rows]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for b, row in enumerate(self.rows):
            ids[b, : lengths[b]] = torch.tensor(row["tokens"])
        prompts = torch.tensor([row["prompt_length"] for row in self.rows])
        return Batch(ids, torch.tensor(lengths), prompts, torch.zeros(ids.shape), torch.zeros(len(lengths)))


class Handler(BaseHTTPRequestHandler):
    server: Replay

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), sent))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang up":
            self.connection.close()
            return
        if isinstance(fault, int):
            self.send_response(fault)
            self.end_headers()
            self.wfile.write(b'{"error": "the server is unwell"}')
            return
        tokens = sent.get("prompt") or sent.get("input_ids")
        answer = json.loads(json.dumps(self.server.answers[tuple(tokens)]))
        if callable(fault):
            fault(answer)
        body = json.dumps(answer).encode()
        self.send_response(200)
        if fault == "cut inside a letter":  # without a length that would reveal it
            self.end_headers()
            self.wfile.write('{"text": "über'.encode()[:11])
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=KINDS)
def server(request, monkeypatch) -> Iterator[Replay]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Replay(request.param) as replay:
        threading.Thread(target=replay.serve_forever, args=(0.01,), daemon=True).start()
        yield replay
        replay.shutdown()


def client(server: Replay, **options) -> TeacherEndpoint:
    return TeacherEndpoint(server.url + "/", kind=server.kind, model="tiny/teacher", pause=0.001, timeout=10, **options)


def test_the_server_and_the_local_teacher_agree(server, load):
    batch = server.batch()
    served, local = client(server)(batch), score(load("teacher", trained=False), batch)
    at = torch.arange(1, batch.input_ids.shape[1] + 1)
    response = (at >= batch.prompt_lengths[:, None]) & (at < batch.lengths[:, None])
    assert served.shape == local.shape
    assert torch.equal(served.isnan(), at >= batch.lengths[:, None])  # nothing is predicted there
    assert_close(served[response], local[response], atol=2e-4, rtol=1e-4)


def test_what_is_asked_for(server):
    client(server, api_key="secret", concurrency=1)(server.batch())
    assert [path for path, _, _ in server.requests] == [PATHS[server.kind]] * 3
    _, headers, sent = server.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    asked = {
        "vllm": {"model": "tiny/teacher", "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0},
        "sglang": {"return_logprob": True, "logprob_start_len": 0},
        "openai": {"model": "tiny/teacher", "max_tokens": 0, "temperature": 1.0, "echo": True, "logprobs": 1},
    }[server.kind]
    asked |= {"return_tokens_as_token_ids": True} if server.kind == "openai" else {}
    assert asked.items() <= sent.items()
    assert server.rows[0]["tokens"] in sent.values()


@pytest.mark.parametrize("faults", [[503, 429], ["cut"], ["cut inside a letter"], ["hang up", "hang up", 500]], ids=str)
def test_passing_troubles_are_retried(server, faults):
    expected = client(server)(server.batch())
    server.requests.clear()
    server.faults = list(faults)
    assert_close(client(server)(server.batch()), expected, equal_nan=True)
    assert len(server.requests) == 3 + len(faults)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (503, "HTTP 503"),
        ("cut", "IncompleteRead|JSONDecodeError"),
        ("cut inside a letter", "UnicodeDecodeError"),
        ("hang up", "Remote|Connection"),
    ],
)
def test_lasting_troubles_end_with_the_request_named(server, fault, reason):
    tokens = server.rows[1]["tokens"]
    server.faults = [fault] * 10
    request = rf"sequence 4 of the batch \({len(tokens)} tokens, POST {server.url}/"
    with pytest.raises(TeacherError, match=rf"{request}.*after 3 .*({reason})"):
        client(server, attempts=3).ask(tokens, 4)
    assert len(server.requests) == 3


def test_a_refusal_is_not_retried(server):
    server.faults = [400]
    with pytest.raises(TeacherError, match=r"HTTP 400: .*unwell"):
        client(server).ask(server.rows[0]["tokens"])
    assert len(server.requests) == 1


def entries(kind: str, answer: dict) -> list:
    if kind == "sglang":
        return answer["meta_info"]["input_token_logprobs"]
    choice = answer["choices"][0]
    return choice["prompt_logprobs"] if kind == "vllm" else choice["logprobs"]["token_logprobs"]


def spoil_the_second(server: Replay, fault) -> str:
    """Scores a batch of three of which the second answer is spoiled: the error names it, and nothing is asked again."""
    server.faults = [None, fault]
    n = len(server.rows[1]["tokens"])
    with pytest.raises(
        TeacherError, match=rf"^POST {server.url}.*: sequence 1 \((request .*, )?{n} tokens\): "
    ) as raised:
        client(server, concurrency=1)(server.batch())
    assert len(server.requests) == 3
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "got"), [(lambda e: e.pop(), -1), (lambda e: e.append(e[-1]), 1)], ids=["short", "long"]
)
def test_a_wrong_length_raises_and_is_not_retried(server, change, got):
    n = len(server.rows[1]["tokens"])
    error = spoil_the_second(server, lambda answer: change(entries(server.kind, answer)))
    assert f"must have one entry per token, {n}, got {n + got}" in error


def test_an_answer_without_a_score_raises(server):
    inside = server.rows[1]["prompt_length"] + 1

    def none_at(position: int, answer: dict) -> None:
        unscored = [None, server.rows[1]["tokens"][position], None] if server.kind == "sglang" else None
        entries(server.kind, answer)[position] = unscored

    assert f"token {inside} " in spoil_the_second(server, partial(none_at, inside))
    expected = client(server, concurrency=1)(server.batch())
    server.faults = [None, partial(none_at, inside - 2)]  # a token of the prompt, which no loss reads
    found = client(server, concurrency=1)(server.batch())
    assert found[1, inside - 3].isnan()
    expected[1, inside - 3] = torch.nan
    assert torch.equal(found.nan_to_num(1.0), expected.nan_to_num(1.0))


def test_an_empty_answer_raises(server):
    assert "holds no" in spoil_the_second(server, lambda answer: answer.clear())


def test_scores_of_other_tokens_raise(server):
    """Whatever the protocol: every id that the server scored is one that was not sent, and the count is right."""

    def of_other_tokens(answer: dict) -> None:
        found = entries(server.kind, answer)
        if server.kind == "vllm":
            found[1:] = [{str(int(token) + 1): score for token, score in entry.items()} for entry in found[1:]]
        elif server.kind == "sglang":
            found[:] = [[x, token + 1, text] for x, token, text in found]
        else:
            block = answer["choices"][0]["logprobs"]
            block["tokens"] = [f"token_id:{int(text.removeprefix('token_id:')) + 1}" for text in block["tokens"]]

    assert "was sent as id" in spoil_the_second(server, of_other_tokens)


@pytest.mark.parametrize("server", ["openai"], indirect=True)
def test_an_openai_server_that_writes_texts_is_refused(server):
    """As one that does not know `return_tokens_as_token_ids`: its ids cannot be checked."""

    def texts(answer: dict) -> None:
        answer["choices"][0]["logprobs"]["tokens"] = [" are"] * len(server.rows[1]["tokens"])

    assert "a token is given as text, ' are'; have the server send ids" in spoil_the_second(server, texts)


def test_other_temperatures_are_refused():
    with pytest.raises(ValueError, match="score prompts at temperature 1"):
        TeacherEndpoint("http://127.0.0.1:1", kind="vllm", temperature=0.7)


def test_a_batch_goes_out_side_by_side(server):
    client(server, concurrency=3)(server.batch())
    assert Counter(len(sent.get("prompt") or sent["input_ids"]) for _, _, sent in server.requests) == Counter(
        len(row["tokens"]) for row in server.rows
    )
