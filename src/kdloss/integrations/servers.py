"""Readers of scoring servers: from the answers of vLLM, SGLang or an OpenAI-compatible server to `teacher_logp`.

A server reports the log-prob of each token at the token's own position, and nothing for the first token of a sequence.
The losses want it one earlier, at the position that predicts it. The readers shift inside each sequence, check the
token ids against those that were sent, and raise where a trained token has no score: an answer that was cut off, or
that belongs to another sequence, must not pass for a teacher.

Nothing here talks to a server. One answer belongs to one sequence of the packed stream, in its order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import kdloss
from kdloss import _checks

from ._alignment import Alignment as Alignment
from ._alignment import check_alignment as check_alignment


class ScoreError(ValueError):
    """An answer does not score the sequence that it belongs to; the message names the request."""


class TopK(NamedTuple):
    """The teacher's k most likely next tokens, as `topk_forward_kl` and its kin take them."""

    logp: Tensor  # (T, K) float32, nats, most likely first; 0 where ids are -1
    ids: Tensor  # (T, K) int64, -1 where nothing was given


def numbered_token(text: str) -> int:
    """The id in "token_id:17", as vLLM writes a token under `return_tokens_as_token_ids`."""
    prefix, _, number = text.partition(":")
    if prefix != "token_id" or not number.isdecimal():
        raise ValueError(
            f"a token is given as text, {text!r}; have the server send ids (vLLM: return_tokens_as_token_ids=true), "
            "or pass token_id=, which turns such a text into its id"
        )
    return int(number)


def read_vllm(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
) -> Tensor:  # (T,)
    """Log-probs of the sampled tokens from vLLM's `prompt_logprobs`, at prediction positions.

    Asked with `{"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}` at /v1/completions, or offline with
    `SamplingParams(max_tokens=1, prompt_logprobs=0)`. vLLM scores prompts at temperature 1, whatever is asked.

    Args:
        answers: one a sequence: the JSON of a response, one of its `choices`, a `RequestOutput`, or the list
            `prompt_logprobs` itself. None for a sequence that was not sent, where none of its tokens is trained on.
        input_ids: (T,) the packed tokens that were sent.
        cu_seqlens: (B + 1,).
        loss_mask: (T,) bool, at prediction positions; any pattern, as of several turns. Where it is False a score may
            be missing. None: every token but the first of each sequence needs one.

    Returns:
        (T,) float32 on the device of `input_ids`, without gradient; 0 where there is no score. vLLM writes -9999 for
        -inf in JSON, and it is left as it is.

    Raises:
        ScoreError: an answer is missing, cut off, of other tokens, or lacks the score of a trained token.
        ValueError: the number of answers is not B, or shapes do not fit.
    """
    return _sampled(_vllm, answers, input_ids, cu_seqlens, loss_mask)


def read_vllm_topk(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    k: int,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
) -> TopK:
    """The k most likely tokens from vLLM's `prompt_logprobs=k`. Arguments and errors as in `read_vllm`.

    vLLM adds the token that was sent, so a position may have k + 1 entries: the k most likely are kept, a set that
    does not depend on what was sampled. Fewer than k at a trained token raise.
    """
    return _topk(_vllm, answers, input_ids, cu_seqlens, loss_mask, k)


def read_sglang(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    starts: int | Sequence[int] = 0,
) -> Tensor:  # (T,)
    """Log-probs of the sampled tokens from SGLang's `input_token_logprobs`, at prediction positions.

    Asked with `{"input_ids": token_ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": true,
    "logprob_start_len": start}` at /generate.

    Args:
        answers, input_ids, cu_seqlens, loss_mask: as in `read_vllm`; an answer is the JSON of a response or its list
            `input_token_logprobs`.
        starts: the `logprob_start_len` that was sent, one for all or one a sequence. An answer begins with that token,
            which has no score of its own: the prompt's length - 1 leaves out what is not trained on.

    Returns and raises as `read_vllm`.
    """
    return _sampled(_sglang(starts), answers, input_ids, cu_seqlens, loss_mask)


def read_sglang_topk(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    k: int,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    starts: int | Sequence[int] = 0,
) -> TopK:
    """The k most likely tokens from SGLang's `input_top_logprobs` (`"top_logprobs_num": k`).

    Arguments and errors as in `read_sglang`, of the whole JSON. Fewer than k at a trained token raise.
    """
    return _topk(_sglang(starts), answers, input_ids, cu_seqlens, loss_mask, k)


def read_openai(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    token_id: Callable[[str], int] | None = numbered_token,
) -> Tensor:  # (T,)
    """Log-probs of the sampled tokens from OpenAI-compatible completions with `echo`, at prediction positions.

    Asked with `{"prompt": token_ids, "max_tokens": 0, "echo": true, "logprobs": 1}` at /v1/completions.

    Args:
        answers, input_ids, cu_seqlens, loss_mask: as in `read_vllm`; an answer is the JSON of a response or one of its
            `choices`.
        token_id: the id of a token's text, which is all that this protocol sends: `tokenizer.convert_tokens_to_ids`
            where the server writes tokens as the tokenizer does. The default reads "token_id:17". None: ids are not
            checked, only how many there are.

    Returns and raises as `read_vllm`.
    """
    return _sampled(_openai(token_id), answers, input_ids, cu_seqlens, loss_mask)


def read_openai_topk(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    k: int,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    token_id: Callable[[str], int] = numbered_token,
) -> TopK:
    """The k most likely tokens from OpenAI-compatible completions with `echo` and `"logprobs": k`.

    Arguments and errors as in `read_openai`. Fewer than k at a trained token raise: two tokens of one text share an
    entry there, and the mass of one of them is lost.
    """
    return _topk(_openai(token_id), answers, input_ids, cu_seqlens, loss_mask, k)


@dataclass(frozen=True)
class _Request:
    """A sequence of the stream as it was sent, and which of its tokens need a score; at the tokens' own positions."""

    index: int
    tokens: list[int]
    needed: list[bool]
    answer: Any

    def fail(self, reason: str, cause: Exception | None = None) -> NoReturn:
        name = _request_id(self.answer)
        sequence = f"sequence {self.index} ({'' if name is None else f'request {name}, '}{len(self.tokens)} tokens)"
        raise ScoreError(f"{sequence}: {reason}") from cause

    def of_length(self, entries: Sequence[Any] | None, name: str, start: int = 0) -> list[Any]:
        """`entries`, one a token from `start` on, preceded by None for the tokens before it."""
        if entries is None:
            self.fail(f"the answer holds no {name}: was it asked for?")
        expected = len(self.tokens) - start
        if len(entries) != expected:
            self.fail(f"{name} must have one entry a token, {expected}, got {len(entries)}")
        return [None] * start + list(entries)

    def check_token(self, position: int, scored: int) -> None:
        if scored != self.tokens[position]:
            self.fail(f"token {position} was sent as id {self.tokens[position]}, and id {scored} was scored")


class _Scores(NamedTuple):
    """What an answer says at each token's own position."""

    logp: Sequence[float | None]
    top: Sequence[Sequence[tuple[int, float]]]  # (id, log-prob), in any order; empty where nothing was given


_Parser = Callable[[_Request, bool], _Scores]  # the flag: whether the most likely tokens are wanted, too


def _vllm(request: _Request, likely: bool) -> _Scores:
    answer = request.answer
    entries = (
        answer if isinstance(answer, list) else _field(_only_choice(request, "prompt_logprobs"), "prompt_logprobs")
    )
    logp: list[float | None] = []
    top: list[list[tuple[int, float]]] = []
    for position, entry in enumerate(request.of_length(entries, "prompt_logprobs")):
        scores = {int(token): _vllm_logprob(score) for token, score in (entry or {}).items()}
        token = request.tokens[position]
        if scores and token not in scores:
            request.fail(f"token {position} was sent as id {token}, and ids {sorted(scores)[:8]} were scored")
        logp.append(scores.get(token))
        top.append(list(scores.items()) if likely else [])
    return _Scores(logp, top)


def _vllm_logprob(score: Any) -> float:
    return float(score if isinstance(score, (int, float)) else _field(score, "logprob"))


def _sglang(starts: int | Sequence[int]) -> _Parser:
    def parse(request: _Request, likely: bool) -> _Scores:
        start = starts if isinstance(starts, int) else starts[request.index]
        if not 0 <= start <= len(request.tokens):
            request.fail(f"starts must be in 0 .. {len(request.tokens)}, got {start}")
        answer = request.answer
        scored = answer if isinstance(answer, list) else answer["meta_info"].get("input_token_logprobs")
        logp: list[float | None] = []
        for position, entry in enumerate(request.of_length(scored, "input_token_logprobs", start)):
            if entry is not None:
                request.check_token(position, entry[1])
            logp.append(None if entry is None else entry[0])
        if not likely:
            return _Scores(logp, [()] * len(logp))
        entries = request.of_length(answer["meta_info"].get("input_top_logprobs"), "input_top_logprobs", start)
        return _Scores(logp, [[(token, x) for x, token, *_ in entry or ()] for entry in entries])

    return parse


def _openai(token_id: Callable[[str], int] | None) -> _Parser:
    def parse(request: _Request, likely: bool) -> _Scores:
        block = _field(_only_choice(request, "logprobs"), "logprobs") or {}
        logp = request.of_length(block.get("token_logprobs"), "token_logprobs")
        if token_id is None:
            return _Scores(logp, [()] * len(logp))
        for position, text in enumerate(request.of_length(block.get("tokens"), "tokens")):
            request.check_token(position, token_id(text))
        if not likely:
            return _Scores(logp, [()] * len(logp))
        entries = request.of_length(block.get("top_logprobs"), "top_logprobs")
        return _Scores(logp, [[(token_id(text), x) for text, x in (entry or {}).items()] for entry in entries])

    return parse


def _only_choice(request: _Request, field: str) -> Any:
    """The answer itself where it has the field, else the one choice that it holds."""
    answer = request.answer
    if not isinstance(answer, Mapping) or answer.get(field) is not None or "choices" not in answer:
        return answer
    if len(answer["choices"]) != 1:
        request.fail(f"the answer has {len(answer['choices'])} choices: pass each choice as the answer of its sequence")
    return answer["choices"][0]


def _field(answer: Any, name: str) -> Any:
    return answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name)


def _request_id(answer: Any) -> object:
    if isinstance(answer, Mapping):
        meta = answer.get("meta_info")
        return answer.get("id", meta.get("id") if isinstance(meta, Mapping) else None)
    return getattr(answer, "request_id", None)


def _sampled(
    parse: _Parser, answers: Sequence[Any], input_ids: Tensor, cu_seqlens: Tensor, loss_mask: Tensor | None
) -> Tensor:
    own: list[float] = []
    for request in _requests(answers, input_ids, cu_seqlens, loss_mask):
        for position, x in enumerate(_parsed(parse, request, likely=False).logp):
            missing = x is None or x != x
            if missing and request.needed[position]:
                request.fail(f"token {position} (id {request.tokens[position]}) is trained on, and its log-prob is {x}")
            own.append(0.0 if x is None or missing else x)
    logp = torch.tensor(own, dtype=torch.float32, device=input_ids.device)
    return kdloss.to_prediction_positions(logp, cu_seqlens=cu_seqlens, fill=0.0)


def _topk(
    parse: _Parser, answers: Sequence[Any], input_ids: Tensor, cu_seqlens: Tensor, loss_mask: Tensor | None, k: int
) -> TopK:
    _checks.positive(k=operator.index(k))
    logps: list[list[float]] = []
    ids: list[list[int]] = []
    for request in _requests(answers, input_ids, cu_seqlens, loss_mask):
        for position, entries in enumerate(_parsed(parse, request, likely=True).top):
            likely = sorted((entry for entry in entries if entry[1] == entry[1]), key=lambda entry: -entry[1])[:k]
            if len(likely) < k and request.needed[position]:
                request.fail(
                    f"token {position} (id {request.tokens[position]}) is trained on, and {len(likely)} of its k = {k} "
                    "most likely ids were given"
                )
            gap = k - len(likely)
            logps.append([x for _, x in likely] + [0.0] * gap)
            ids.append([token for token, _ in likely] + [-1] * gap)
    logp = torch.tensor(logps, dtype=torch.float32, device=input_ids.device).reshape(-1, k)
    id_tensor = torch.tensor(ids, dtype=torch.int64, device=input_ids.device).reshape(-1, k)
    return TopK(
        kdloss.to_prediction_positions(logp, cu_seqlens=cu_seqlens, fill=0.0),
        kdloss.to_prediction_positions(id_tensor, cu_seqlens=cu_seqlens, fill=-1),
    )


def _parsed(parse: _Parser, request: _Request, *, likely: bool) -> _Scores:
    if request.answer is None:
        if any(request.needed):
            request.fail(f"there is no answer, and {sum(request.needed)} of its tokens are trained on")
        return _Scores([None] * len(request.tokens), [()] * len(request.tokens))
    try:
        return parse(request, likely)
    except ScoreError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"not an answer of this kind of server ({error!r})"
        request.fail(reason, error)


def _requests(
    answers: Sequence[Any], input_ids: Tensor, cu_seqlens: Tensor, loss_mask: Tensor | None
) -> Iterator[_Request]:
    _checks.integral(input_ids=input_ids)
    _checks.packed_stream("input_ids", input_ids, cu_seqlens)
    _checks.cumulative_lengths(cu_seqlens, total_tokens=input_ids.shape[0])
    if loss_mask is None:
        loss_mask = torch.ones_like(input_ids, dtype=torch.bool)
    _checks.boolean(loss_mask=loss_mask)
    _checks.same_shape("input_ids", input_ids, loss_mask=loss_mask)
    bounds = cu_seqlens.tolist()
    if len(answers) != len(bounds) - 1:
        raise ValueError(
            f"answers must have one entry a sequence, {len(bounds) - 1}, got {len(answers)}; None stands for a "
            "sequence that was not sent"
        )
    ids, trained = input_ids.tolist(), loss_mask.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        # a token is scored where the position before it is trained; nothing predicts the first
        needed = [False, *trained[start : stop - 1]] if stop > start else []
        yield _Request(index, ids[start:stop], needed, answers[index])
