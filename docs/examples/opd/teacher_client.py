"""A teacher behind a URL: vLLM, SGLang or an OpenAI-compatible server scores the tokens that the student sampled.

Servers report a token's log-prob at the token's own position and nothing for the first one; the loss wants it one
earlier, at the position that predicts it. Servers score prompts at temperature 1, whatever the request says, so other
sampling temperatures are refused.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import kdloss
from opd.rollout import Batch

RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
RETRIED_ERRORS = (OSError, http.client.HTTPException, ValueError)  # no connection, timeout, truncated or garbled answer


class TeacherError(RuntimeError):
    """The server did not score a sequence; the message names the request."""


class TeacherEndpoint:
    """Scores whole batches over HTTP: a request a sequence, `concurrency` at a time, each tried `attempts` times."""

    def __init__(
        self,
        url: str,
        *,
        kind: str,
        model: str | None = None,
        api_key: str | None = None,
        temperature: float = 1.0,
        timeout: float = 120.0,
        attempts: int = 5,
        pause: float = 0.5,
        concurrency: int = 16,
    ):
        if temperature != 1.0:
            raise ValueError(f"servers score prompts at temperature 1, got {temperature}: use a local teacher")
        path, self.body, self.read = PROTOCOLS[kind]
        self.url, self.model = url.rstrip("/") + path, model
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.timeout, self.attempts, self.pause, self.concurrency = timeout, attempts, pause, concurrency

    def __call__(self, batch: Batch) -> Tensor:
        """Log-probs (B, L) of the batch's tokens at prediction positions; 0 where nothing is predicted."""
        lengths = batch.lengths.tolist()
        sequences = [row[:n] for row, n in zip(batch.input_ids.tolist(), lengths, strict=True)]
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            scores = list(pool.map(self.score, sequences, range(len(sequences))))
        finally:
            pool.shutdown(cancel_futures=True)
        cu_seqlens = kdloss.cu_seqlens_from_lengths(torch.tensor(lengths))
        own = torch.tensor([x for row in scores for x in row], dtype=torch.float32)
        packed = kdloss.to_prediction_positions(own, cu_seqlens=cu_seqlens, fill=0.0)
        return kdloss.unpack(packed, cu_seqlens=cu_seqlens, length=batch.input_ids.shape[1]).to(batch.input_ids.device)

    def score(self, tokens: Sequence[int], index: int = 0) -> list[float]:
        """Log-probs of `tokens` at their own positions, 0.0 for the first."""
        request = f"sequence {index} of the batch ({len(tokens)} tokens, POST {self.url})"
        answer = self._post(json.dumps(self.body(list(tokens), self.model)).encode(), request)
        try:
            logp = self.read(answer, tokens)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"no log-probs where expected: {error!r}"
            raise TeacherError(f"{request}: {reason}; got {json.dumps(answer)[:200]}") from error
        return [0.0, *logp]

    def _post(self, body: bytes, request: str) -> Any:
        call = urllib.request.Request(self.url, body, self.headers)
        for attempt in range(1, self.attempts + 1):
            try:
                with urllib.request.urlopen(call, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_beginning(error)}"
                if error.code not in RETRIED_STATUS:
                    raise TeacherError(f"{request}: {reason}") from error
            except RETRIED_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.attempts:
                time.sleep(min(30.0, self.pause * 2 ** (attempt - 1)))
        raise TeacherError(f"{request}: gave up after {self.attempts} attempts, the last one: {reason}")


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(200).decode(errors="replace")
    except RETRIED_ERRORS as broken:
        return f"(its body did not come: {broken})"


def _vllm_body(tokens: list[int], model: str | None) -> dict:
    return {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}


def _vllm_read(answer: dict, tokens: Sequence[int]) -> list[float]:
    entries = _of_length(answer["choices"][0]["prompt_logprobs"], tokens)
    return [_number(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], tokens[1:], strict=True)]


def _sglang_body(tokens: list[int], model: str | None) -> dict:
    sampling = {"max_new_tokens": 0, "temperature": 1.0, "skip_special_tokens": False}
    return {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}


def _sglang_read(answer: dict, tokens: Sequence[int]) -> list[float]:
    entries = _of_length(answer["meta_info"]["input_token_logprobs"], tokens)
    scored = [entry[1] for entry in entries]
    if scored != list(tokens):
        raise ValueError(f"the server scored other tokens: {scored[:8]}... for {list(tokens)[:8]}...")
    return [_number(entry[0]) for entry in entries[1:]]


def _openai_body(tokens: list[int], model: str | None) -> dict:
    return {"model": model, "prompt": tokens, "max_tokens": 0, "temperature": 1.0, "echo": True, "logprobs": 1}


def _openai_read(answer: dict, tokens: Sequence[int]) -> list[float]:
    return [_number(x) for x in _of_length(answer["choices"][0]["logprobs"]["token_logprobs"], tokens)[1:]]


PROTOCOLS = {
    "vllm": ("/v1/completions", _vllm_body, _vllm_read),
    "sglang": ("/generate", _sglang_body, _sglang_read),
    "openai": ("/v1/completions", _openai_body, _openai_read),
}


def _of_length(entries: list, tokens: Sequence[int]) -> list:
    if len(entries) != len(tokens):
        raise ValueError(f"expected {len(tokens)} log-probs, one a token, got {len(entries)}")
    return entries


def _number(x: float | None) -> float:
    if x is None or x != x:
        raise ValueError(f"a log-prob is {x}")
    return float(x)
