"""A teacher behind a URL: vLLM, SGLang or an OpenAI-compatible server scores the tokens that the student sampled.

The readers of `kdloss.integrations.servers` check the answers and turn them into log-probs at prediction positions.
Servers score prompts at temperature 1, whatever the request says, so other sampling temperatures are refused.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import kdloss
from kdloss.integrations import servers
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
        """Log-probs (B, L) of the batch's tokens at prediction positions; NaN where there is none.

        A token of a prompt may lack one, because the loss does not read it.
        """
        lengths = batch.lengths.tolist()
        sequences = [row[:n] for row, n in zip(batch.input_ids.tolist(), lengths, strict=True)]
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            answers = list(pool.map(self.ask, sequences, range(len(sequences))))
        finally:
            pool.shutdown(cancel_futures=True)
        cu_seqlens = kdloss.cu_seqlens_from_lengths(torch.tensor(lengths))
        tokens = torch.tensor([x for row in sequences for x in row])
        mask = kdloss.response_mask(batch.prompt_lengths.cpu(), cu_seqlens=cu_seqlens, total_tokens=len(tokens))
        try:
            packed = self.read(answers, tokens, cu_seqlens=cu_seqlens, loss_mask=mask)
        except servers.ScoreError as error:
            raise TeacherError(f"POST {self.url}: {error}") from error
        rows = kdloss.unpack(packed, cu_seqlens=cu_seqlens, length=batch.input_ids.shape[1], fill=math.nan)
        return rows.to(batch.input_ids.device)

    def ask(self, tokens: Sequence[int], index: int = 0) -> Any:
        """The server's answer, parsed from JSON, for the sequence `index` of a batch."""
        request = f"sequence {index} of the batch ({len(tokens)} tokens, POST {self.url})"
        return self._post(json.dumps(self.body(list(tokens), self.model)).encode(), request)

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


def _sglang_body(tokens: list[int], model: str | None) -> dict:
    sampling = {"max_new_tokens": 0, "temperature": 1.0, "skip_special_tokens": False}
    return {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}


def _openai_body(tokens: list[int], model: str | None) -> dict:
    request = {"model": model, "prompt": tokens, "max_tokens": 0, "temperature": 1.0, "echo": True, "logprobs": 1}
    return request | {"return_tokens_as_token_ids": True}  # without ids, answers are refused


PROTOCOLS = {
    "vllm": ("/v1/completions", _vllm_body, servers.read_vllm),
    "sglang": ("/generate", _sglang_body, servers.read_sglang),
    "openai": ("/v1/completions", _openai_body, servers.read_openai),
}
