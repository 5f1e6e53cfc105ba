"""Readers of scoring servers: from the answers of vLLM, SGLang or an OpenAI-compatible server to `teacher_logp`.

A server reports the log-prob of each token at the token's own position, and nothing for the first token of a sequence.
The losses want it one earlier, at the position that predicts it. The readers shift inside each sequence, check the
token ids against those that were sent, and raise where a trained token has no score: an answer that was cut off, or
that belongs to another sequence, must not pass for a teacher.

Nothing here talks to a server. One answer belongs to one sequence of the packed stream, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import kdloss
from kdloss import _checks

from . import _answers
from ._alignment import Alignment as Alignment, check_alignment as check_alignment
from ._answers import ScoreError as ScoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
        answers: one a sequence: the JSON of a response, one of its `choices`, an object with the same fields (a
            `RequestOutput`, the `openai` client's), or the list `prompt_logprobs` itself. None for a sequence that was
            not sent, where none of its tokens is trained on.
        input_ids: (T,) the packed tokens that were sent.
        cu_seqlens: (B + 1,).
        loss_mask: (T,) bool, at prediction positions; any pattern, as of several turns. Where it is False a score may
            be missing. None: every token but the first of each sequence needs one.

    Returns:
        (T,) float32 on the device of `input_ids`, without gradient; 0 where there is no score. vLLM writes -9999 for
        -inf in JSON, and it is left as it is.

    Raises:
        ScoreError: an answer is missing, cut off, of other tokens, lacks the score of a trained token, holds what no
            log-prob can be (rounding of 1e-3 above 0 counts as 0), or scores the first token, which nothing predicts.
        ValueError: the number of answers is not B, or shapes do not fit.
        TypeError: `answers` is no list, or an argument is of another type.
    """
    return _sampled(_answers.vllm, answers, input_ids, cu_seqlens, loss_mask)


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
    does not depend on what was sampled. Fewer than k at a trained token raise, as do an id twice and a probability
    above 1 together.
    """
    return _topk(_answers.vllm, answers, input_ids, cu_seqlens, loss_mask, k)


def read_sglang(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    starts: int | Sequence[int] | NDArray[np.integer] | Tensor = 0,
) -> Tensor:  # (T,)
    """Log-probs of the sampled tokens from SGLang's `input_token_logprobs`, at prediction positions.

    Asked with `{"input_ids": token_ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": true,
    "logprob_start_len": start}` at /generate.

    Args:
        answers, input_ids, cu_seqlens, loss_mask: as in `read_vllm`; an answer is the JSON of a response or its list
            `input_token_logprobs`.
        starts: the `logprob_start_len` that was sent, one for all or one a sequence (list, array or tensor of
            integers). An answer begins with that token, which has no score of its own: the prompt's length - 1 leaves
            out what is not trained on.

    Returns and raises as `read_vllm`.
    """
    return _sampled(_answers.sglang, answers, input_ids, cu_seqlens, loss_mask, starts)


def read_sglang_topk(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    k: int,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    starts: int | Sequence[int] | NDArray[np.integer] | Tensor = 0,
) -> TopK:
    """The k most likely tokens from SGLang's `input_top_logprobs` (`"top_logprobs_num": k`).

    Arguments and errors as in `read_sglang`, of the whole JSON. Fewer than k at a trained token raise.
    """
    return _topk(_answers.sglang, answers, input_ids, cu_seqlens, loss_mask, k, starts)


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
            checked, only how many there are. Not asked where a choice holds `prompt_token_ids`, which are checked.

    Returns and raises as `read_vllm`.
    """
    return _sampled(_answers.openai(token_id), answers, input_ids, cu_seqlens, loss_mask)


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
    if token_id is None:
        raise TypeError("token_id must turn a token's text into its id, got None: without ids there is no top k")
    return _topk(_answers.openai(token_id), answers, input_ids, cu_seqlens, loss_mask, k)


def _sampled(
    parse: _answers.Parser,
    answers: Any,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    loss_mask: Tensor | None,
    starts: Any = 0,
) -> Tensor:
    own: list[float] = []
    for request in _requests(answers, input_ids, cu_seqlens, loss_mask, starts):
        own += [0.0 if x is None or x != x else x for x in _answers.parsed(parse, request, likely=False).logp]
    logp = torch.tensor(own, dtype=torch.float32, device=input_ids.device)
    return kdloss.to_prediction_positions(logp, cu_seqlens=cu_seqlens, fill=0.0)


def _topk(
    parse: _answers.Parser,
    answers: Any,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    loss_mask: Tensor | None,
    k: Any,
    starts: Any = 0,
) -> TopK:
    if not _answers.is_integer(k):
        raise TypeError(f"k must be an integer, got {type(k).__name__} {k!r}")
    _checks.positive(k=int(k))
    logps: list[list[float]] = []
    ids: list[list[int]] = []
    for request in _requests(answers, input_ids, cu_seqlens, loss_mask, starts):
        for position, row in enumerate(_answers.parsed(parse, request, likely=True).top):
            if len(row) < k and request.needed[position]:
                request.fail(
                    f"{request.named(position)} is trained on, and {len(row)} of its k = {k} most likely ids were given"
                )
            gap = k - len(row)
            logps.append([x for _, x in row[:k]] + [0.0] * gap)
            ids.append([token for token, _ in row[:k]] + [-1] * gap)
    logp = torch.tensor(logps, dtype=torch.float32, device=input_ids.device).reshape(-1, k)
    id_tensor = torch.tensor(ids, dtype=torch.int64, device=input_ids.device).reshape(-1, k)
    return TopK(
        kdloss.to_prediction_positions(logp, cu_seqlens=cu_seqlens, fill=0.0),
        kdloss.to_prediction_positions(id_tensor, cu_seqlens=cu_seqlens, fill=-1),
    )


def _requests(
    answers: Any, input_ids: Tensor, cu_seqlens: Tensor, loss_mask: Tensor | None, starts: Any
) -> Iterator[_answers.Request]:
    _checks.integral(input_ids=input_ids)
    _checks.packed_stream("input_ids", input_ids, cu_seqlens)
    _checks.cumulative_lengths(cu_seqlens.cpu(), total_tokens=input_ids.shape[0])
    if loss_mask is None:
        loss_mask = torch.ones_like(input_ids, dtype=torch.bool)
    _checks.boolean(loss_mask=loss_mask)
    _checks.same_shape("input_ids", input_ids, loss_mask=loss_mask)
    bounds = cu_seqlens.tolist()
    if not isinstance(answers, Sequence) or isinstance(answers, (str, bytes)):
        raise TypeError(f"answers must be a list with one answer a sequence, got {type(answers).__name__}")
    if len(answers) != len(bounds) - 1:
        raise ValueError(
            f"answers must have one entry a sequence, {len(bounds) - 1}, got {len(answers)}; None stands for a "
            "sequence that was not sent"
        )
    first = _one_a_sequence(starts, len(bounds) - 1)
    ids, trained = input_ids.tolist(), loss_mask.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        # a token is scored where the position before it is trained; nothing predicts the first
        needed = [False, *trained[start : stop - 1]] if stop > start else []
        request = _answers.Request(index, ids[start:stop], needed, first[index], answers[index])
        if not 0 <= request.start <= len(request.tokens):
            request.fail(f"starts must be in 0 .. {len(request.tokens)}, got {request.start}")
        yield request


def _one_a_sequence(starts: Any, sequences: int) -> list[int]:
    """`starts` as a list: of a number, a list or tuple of numbers, a NumPy array or a tensor."""
    found = starts.tolist() if hasattr(starts, "tolist") else starts
    found = list(found) if isinstance(found, (list, tuple)) else [found] * sequences
    for start in found:
        if not _answers.is_integer(start):
            raise TypeError(f"starts must be an integer, or one a sequence, got {type(start).__name__} {start!r}")
    if len(found) != sequences:
        raise ValueError(f"starts must be one number, or one a sequence, {sequences}, got {len(found)}")
    return [int(start) for start in found]
