"""Readers of scoring servers: turn answers of vLLM, SGLang or an OpenAI-compatible server into `teacher_logp`.

A server reports the log-prob of each token at the token's own position, and none for the first token of a sequence. The
losses need it one position earlier, where the token is predicted. The readers shift inside each sequence, compare the
token ids with those that were sent, and raise if a trained token has no score. A truncated answer, or the answer of
another sequence, is therefore an error and not a teacher.

Nothing here talks to a server. There is one answer per sequence of the packed stream, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import kdloss
from kdloss import _checks
from kdloss._docs import documented
from kdloss._losses.alignment import Alignment as Alignment, check_alignment as check_alignment

from . import _answers
from ._answers import ScoreError as ScoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Docstring texts (`_docs.py`): of the packed stream and the errors, and of each server's answers.
_STREAM = {
    "input_ids": "(T,) the packed tokens that were sent, int32 or int64.",
    "k": "number of tokens per position, >= 1.",
    "cu_seqlens": "(B + 1,) cumulative lengths of the sequences.",
    "loss_mask": """(T,) bool, at prediction positions, in any pattern (several turns, for example). A score may be
        missing where it is False. None: every token except the first of each sequence needs a score.""",
    "starts": """the `logprob_start_len` that was sent: one integer for all sequences, or one per sequence (list, array
        or tensor). An answer begins with that token, which has no score of its own. The prompt's length - 1 skips the
        tokens that are not trained on.""",
    "ScoreError": """an answer is missing, truncated or of other tokens, lacks the score of a trained token, contains a
        value that cannot be a log-prob (rounding up to 1e-3 above 0 counts as 0), or scores the first token of a
        sequence, which nothing predicts.""",
    "ValueError": "the number of answers is not B, or shapes do not fit.",
    "TypeError": "`answers` is not a list, or another argument has a wrong type.",
}
_TOPK = {
    "ScoreError": """an answer is missing, truncated or of other tokens, gives fewer than k tokens where a token is
        trained on, gives an id twice or a total probability above 1, contains a value that cannot be a log-prob
        (rounding up to 1e-3 above 0 counts as 0), or scores the first token of a sequence, which nothing predicts.""",
    "ValueError": "the number of answers is not B, shapes do not fit, or `k` is not > 0.",
}
_NOT_SENT = "None for a sequence that was not sent; none of its tokens may be trained on."
_VLLM = {
    "answers": f"""one per sequence: the JSON of a response, one of its `choices`, an object with the same fields (a
        `RequestOutput`, or a response of the `openai` client), or the list `prompt_logprobs` itself. {_NOT_SENT}"""
}
_SGLANG = {
    "answers": f"one per sequence: the JSON of a response, or the list `input_token_logprobs` itself. {_NOT_SENT}"
}
_SGLANG_TOPK = {"answers": f"one per sequence: the JSON of a response, whole. {_NOT_SENT}"}
_OPENAI = {
    "answers": f"""one per sequence: the JSON of a response, one of its `choices`, or an object with the same fields.
        {_NOT_SENT}""",
    "token_id": """maps a token's text to its id, because this protocol sends only texts. The default reads
        "token_id:17". Servers otherwise write decoded text (" are"): several tokens may share one, and
        `tokenizer.convert_tokens_to_ids` knows other texts ("Ġare"). It is not called if the answer holds
        `prompt_logprobs`; their ids are checked instead.""",
}


class TopK(NamedTuple):
    """The teacher's k most likely next tokens, as the top-k divergences (such as `topk_forward_kl`) take them.

    Attributes:
        logp: (T, K) float32 log-probs, nats, most likely first; NaN where `ids` are -1, where no divergence reads them.
        ids: (T, K) int64 token ids; -1 where the server gave none.
    """

    logp: Tensor
    ids: Tensor


def numbered_token(text: str) -> int:
    """The id in "token_id:17", which is how vLLM writes a token under `return_tokens_as_token_ids`.

    Args:
        text: the token's text in an answer.

    Returns:
        The id.

    Raises:
        ValueError: `text` has another form.

    Example:
        >>> from kdloss.integrations.servers import numbered_token
        >>> numbered_token("token_id:17")
        17
    """
    prefix, _, number = text.partition(":")
    if prefix != "token_id" or not number.isdecimal():
        raise ValueError(
            f"a token is given as text, {text!r}; have the server send ids (vLLM: return_tokens_as_token_ids=true), or "
            "pass token_id=, a function from the texts that this server writes to ids"
        )
    return int(number)


@documented(_STREAM, _VLLM)
def read_vllm(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
) -> Tensor:  # (T,)
    """Log-probs of the sampled tokens from vLLM's `prompt_logprobs`, at prediction positions.

    Request: `{"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}` to /v1/completions, or offline
    `SamplingParams(max_tokens=1, prompt_logprobs=0)`. vLLM scores prompts at temperature 1, whatever the request says.

    Args:
        {answers}
        {input_ids}
        {cu_seqlens}
        {loss_mask}

    Returns:
        (T,) float32 in nats, on the device of `input_ids`, without gradient; NaN where there is no score: at the
        last token of each sequence, and at untrained tokens that the server did not score. vLLM writes -9999 for -inf
        in JSON; it is not changed.

    Raises:
        {ScoreError}
        {ValueError}
        {TypeError}

    Example:
        >>> import torch
        >>> from kdloss.integrations.servers import read_vllm
        >>> answer = {"prompt_logprobs": [None, {"7": {"logprob": -3.0}}, {"2": {"logprob": -0.5}}]}
        >>> read_vllm([answer], torch.tensor([5, 7, 2]), cu_seqlens=torch.tensor([0, 3])).tolist()
        [-3.0, -0.5, nan]
    """
    return _sampled(_answers.vllm, answers, input_ids, cu_seqlens, loss_mask)


@documented(_STREAM, _TOPK, _VLLM)
def read_vllm_topk(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    k: int,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
) -> TopK:
    """The teacher's k most likely tokens from vLLM's `prompt_logprobs`, at prediction positions.

    Request: `{"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": k}` to /v1/completions, or offline
    `SamplingParams(max_tokens=1, prompt_logprobs=k)`. vLLM scores prompts at temperature 1, whatever the request says.
    It adds the token that was sent, so a position may have k + 1 entries. The k most likely ones are kept, and equal
    log-probs are ordered by the server's ranks, so the set does not depend on the sampled token.

    Args:
        {answers}
        {input_ids}
        {k}
        {cu_seqlens}
        {loss_mask}

    Returns:
        `TopK`, on the device of `input_ids`, without gradient.

    Raises:
        {ScoreError}
        {ValueError}
        {TypeError}
    """
    return _topk(_answers.vllm, answers, input_ids, cu_seqlens, loss_mask, k)


@documented(_STREAM, _SGLANG)
def read_sglang(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    starts: int | Sequence[int] | NDArray[np.integer] | Tensor = 0,
) -> Tensor:  # (T,)
    """Log-probs of the sampled tokens from SGLang's `input_token_logprobs`, at prediction positions.

    Request: `{"input_ids": token_ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": true,
    "logprob_start_len": start}` to /generate.

    Args:
        {answers}
        {input_ids}
        {cu_seqlens}
        {loss_mask}
        {starts}

    Returns:
        (T,) float32 in nats, on the device of `input_ids`, without gradient; NaN where there is no score: at the
        last token of each sequence, and at untrained tokens that the server did not score.

    Raises:
        {ScoreError}
        {ValueError}
        {TypeError}

    Example:
        >>> import torch
        >>> from kdloss.integrations.servers import read_sglang
        >>> answer = {"meta_info": {"input_token_logprobs": [[None, 5, None], [-3.0, 7, None], [-0.5, 2, None]]}}
        >>> read_sglang([answer], torch.tensor([5, 7, 2]), cu_seqlens=torch.tensor([0, 3])).tolist()
        [-3.0, -0.5, nan]
    """
    return _sampled(_answers.sglang, answers, input_ids, cu_seqlens, loss_mask, starts)


@documented(_STREAM, _TOPK, _SGLANG_TOPK)
def read_sglang_topk(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    k: int,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    starts: int | Sequence[int] | NDArray[np.integer] | Tensor = 0,
) -> TopK:
    """The teacher's k most likely tokens from SGLang's `input_top_logprobs`, at prediction positions.

    Request: `{"input_ids": token_ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": true,
    "logprob_start_len": start, "top_logprobs_num": k}` to /generate.

    Args:
        {answers}
        {input_ids}
        {k}
        {cu_seqlens}
        {loss_mask}
        {starts}

    Returns:
        `TopK`, on the device of `input_ids`, without gradient.

    Raises:
        {ScoreError}
        {ValueError}
        {TypeError}
    """
    return _topk(_answers.sglang, answers, input_ids, cu_seqlens, loss_mask, k, starts)


@documented(_STREAM, _OPENAI)
def read_openai(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    token_id: Callable[[str], int] | None = numbered_token,
) -> Tensor:  # (T,)
    """Log-probs of the sampled tokens from OpenAI-compatible completions with `echo`, at prediction positions.

    Request: `{"prompt": token_ids, "max_tokens": 0, "echo": true, "logprobs": 1, "return_tokens_as_token_ids": true}`
    to /v1/completions. vLLM adds `prompt_logprobs` by id to an echo; they are read as `read_vllm` reads them.

    Args:
        {answers}
        {input_ids}
        {cu_seqlens}
        {loss_mask}
        {token_id}
            Nor is it called if a choice holds `prompt_token_ids`. None: only the number of tokens is checked, not their
            ids, so scores of other tokens, or scores that are off by one, pass.

    Returns:
        (T,) float32 in nats, on the device of `input_ids`, without gradient; NaN where there is no score: at the
        last token of each sequence, and at untrained tokens that the server did not score.

    Raises:
        {ScoreError}
        {ValueError}
        {TypeError}

    Example:
        >>> import torch
        >>> from kdloss.integrations.servers import read_openai
        >>> block = {"tokens": ["token_id:5", "token_id:7", "token_id:2"], "token_logprobs": [None, -3.0, -0.5]}
        >>> answer = {"choices": [{"logprobs": block}]}
        >>> read_openai([answer], torch.tensor([5, 7, 2]), cu_seqlens=torch.tensor([0, 3])).tolist()
        [-3.0, -0.5, nan]
    """
    return _sampled(_answers.openai(token_id), answers, input_ids, cu_seqlens, loss_mask)


@documented(_STREAM, _TOPK, _OPENAI)
def read_openai_topk(
    answers: Sequence[Any],
    input_ids: Tensor,  # (T,)
    *,
    k: int,
    cu_seqlens: Tensor,  # (B + 1,)
    loss_mask: Tensor | None = None,  # (T,) bool
    token_id: Callable[[str], int] = numbered_token,
) -> TopK:
    """The teacher's k most likely tokens from OpenAI-compatible completions with `echo`, at prediction positions.

    Request: `{"prompt": token_ids, "max_tokens": 0, "echo": true, "logprobs": k, "return_tokens_as_token_ids": true}`
    to /v1/completions. vLLM adds `prompt_logprobs` by id to an echo; they are read as `read_vllm_topk` reads them. In
    other answers, tokens with the same text share one entry, which loses the mass of all but one; fewer than k tokens
    are then left.

    Args:
        {answers}
        {input_ids}
        {k}
        {cu_seqlens}
        {loss_mask}
        {token_id}

    Returns:
        `TopK`, on the device of `input_ids`, without gradient.

    Raises:
        {ScoreError}
        {ValueError}
        {TypeError}
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
        own += [math.nan if x is None else x for x in _answers.parsed(parse, request, likely=False).logp]
    logp = torch.tensor(own, dtype=torch.float32, device=input_ids.device)
    return kdloss.to_prediction_positions(logp, cu_seqlens=cu_seqlens, fill=math.nan)


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
            logps.append([x for _, x in row[:k]] + [math.nan] * gap)
            ids.append([token for token, _ in row[:k]] + [-1] * gap)
    logp = torch.tensor(logps, dtype=torch.float32, device=input_ids.device).reshape(-1, k)
    id_tensor = torch.tensor(ids, dtype=torch.int64, device=input_ids.device).reshape(-1, k)
    return TopK(
        kdloss.to_prediction_positions(logp, cu_seqlens=cu_seqlens, fill=math.nan),
        kdloss.to_prediction_positions(id_tensor, cu_seqlens=cu_seqlens, fill=-1),
    )


def _requests(
    answers: Any, input_ids: Tensor, cu_seqlens: Tensor, loss_mask: Tensor | None, starts: Any
) -> Iterator[_answers.Request]:
    """One request per sequence, after the checks of the arguments."""
    _checks.integral(input_ids=input_ids)
    _checks.packed_stream("input_ids", input_ids, cu_seqlens)
    _checks.cumulative_lengths(cu_seqlens.cpu(), total_tokens=input_ids.shape[0])
    if loss_mask is None:
        loss_mask = torch.ones_like(input_ids, dtype=torch.bool)
    _checks.boolean(loss_mask=loss_mask)
    _checks.same_shape("input_ids", input_ids, loss_mask=loss_mask)
    bounds = cu_seqlens.tolist()
    if not isinstance(answers, Sequence) or isinstance(answers, (str, bytes)):
        raise TypeError(f"answers must be a list with one answer per sequence, got {type(answers).__name__}")
    if len(answers) != len(bounds) - 1:
        raise ValueError(
            f"answers must have one entry per sequence, {len(bounds) - 1}, got {len(answers)}; None stands for a "
            "sequence that was not sent"
        )
    first = _one_per_sequence(starts, len(bounds) - 1)
    ids, trained = input_ids.tolist(), loss_mask.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        # a token needs a score if the position before it is trained; nothing predicts the first token
        needed = [False, *trained[start : stop - 1]] if stop > start else []
        request = _answers.Request(index, ids[start:stop], needed, first[index], answers[index])
        if not 0 <= request.start <= len(request.tokens):
            request.fail(f"starts must be in 0 .. {len(request.tokens)}, got {request.start}")
        yield request


def _one_per_sequence(starts: Any, sequences: int) -> list[int]:
    """`starts` (a number, a list or tuple, a NumPy array or a tensor) as a list with one entry per sequence."""
    found = starts.tolist() if hasattr(starts, "tolist") else starts
    found = list(found) if isinstance(found, (list, tuple)) else [found] * sequences
    for start in found:
        if not _answers.is_integer(start):
            raise TypeError(f"starts must be an integer, or one per sequence, got {type(start).__name__} {start!r}")
    if len(found) != sequences:
        raise ValueError(f"starts must be one number, or one per sequence, {sequences}, got {len(found)}")
    return [int(start) for start in found]
