"""Parses and checks the answers of scoring servers: the log-probs that each protocol reports, at the token's position.

The formats, taken from the servers' source code:

- vLLM's `prompt_logprobs`: a sequence with None for the first token, then one dictionary per token. Its keys are ids
  (strings in JSON); its values are numbers, or dictionaries or objects with a `logprob` and a `rank`. `FlatLogprobs` is
  such a sequence, with an empty dictionary instead of None. The token that was sent comes first, whatever its rank.
- SGLang's `input_token_logprobs`: one [log-prob, id, text] per token from `logprob_start_len` on; the first log-prob is
  None. `input_top_logprobs`: per token, a list of such entries or None.
- Completions of OpenAI's protocol: parallel lists of texts, log-probs, and dictionaries by text. vLLM adds its
  `prompt_logprobs` to an echo, and those are read instead.

A set of k likely tokens may not depend on the token that was sent. Where log-probs are exactly equal, as in bf16, the
server's own order decides: the ranks of vLLM, the order of the list elsewhere. A server that writes the sent token
first and gives no ranks hides that token's place, so it comes last among its equals. This is its place if the server
added it to its top k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn, TypeVar

# In nats above 0. A float32 log-softmax exceeds 0 by a few 1e-6 at most; a larger value is not a log-prob.
_ROUNDING = 1e-3
# Log-probs below -16 add almost no mass, and bf16 rounds the others by 1/32 at most, so rounding cannot add 10 %.
_MOST_MASS = 1.1
_Row = TypeVar("_Row", bound=tuple[Any, ...])


class ScoreError(ValueError):
    """An answer does not score its sequence correctly; the message names the request."""


class Scores(NamedTuple):
    """The scores in an answer, at each token's own position."""

    logp: list[float | None]  # None or NaN: no score
    top: list[list[tuple[int, float]]]  # (id, log-prob), most likely first; empty if not given or not requested


@dataclass(frozen=True)
class Request:
    """A sequence as it was sent, and which of its tokens need a score; at the tokens' own positions."""

    index: int
    tokens: list[int]
    needed: list[bool]
    start: int  # index of the first token that the answer covers
    answer: Any

    def fail(self, reason: str, cause: Exception | None = None) -> NoReturn:
        """Raise a `ScoreError` that names the sequence and the request."""
        name, said = _request_id(self.answer), _refusal(self.answer)
        sequence = f"sequence {self.index} ({'' if name is None else f'request {name}, '}{len(self.tokens)} tokens)"
        raise ScoreError(f"{sequence}: {reason}{'' if said is None else f'; the server said {said}'}") from cause

    def named(self, position: int) -> str:
        """How errors refer to the token at `position`."""
        return f"token {position} (id {self.tokens[position]})"

    def of_length(self, entries: Any, name: str, longer: str = "", shorter: str = "") -> list[Any]:
        """`entries`, checked to be one per token from `start` on, with None prepended for each token before `start`.

        `longer` and `shorter` end the error with what to do about too many or too few entries.
        """
        if entries is None:
            self.fail(f"the answer holds no {name}: was it asked for?")
        if not _is_list(entries):
            self.fail(f"{name} must be a list with one entry per token, got {_shown(entries)}")
        expected = len(self.tokens) - self.start
        if len(entries) != expected:
            hint = longer if len(entries) > expected else shorter if _refusal(self.answer) is None else ""
            self.fail(f"{name} must have one entry per token, {expected}, got {len(entries)}{hint}")
        return [None] * self.start + list(entries)

    def check_token(self, position: int, scored: Any, source: str = "") -> None:
        """Check that the server scored the id that was sent; `source` says where `scored` comes from."""
        sent = self.tokens[position]
        if not is_integer(scored) or scored != sent:
            self.fail(f"token {position} was sent as id {sent}, and id {scored!r} was scored{source}")

    def check_prompt(self, ids: Any) -> bool:
        """Check the prompt ids that the server returns; False if it returns none."""
        if not _is_list(ids):
            return False
        if len(ids) != len(self.tokens):
            self.fail(f"{len(self.tokens)} tokens were sent, and the server was given {len(ids)} prompt_token_ids")
        for position, token in enumerate(ids):
            self.check_token(position, token)
        return True

    def logp(self, position: int, value: Any) -> float | None:
        """The log-prob of a token; None or NaN if it is missing and not needed."""
        x = self._number(position, value)
        if (x is None or x != x) and self.needed[position]:
            self.fail(f"{self.named(position)} is trained on, and its log-prob is {x}")
        if position == 0 and x and x == x:
            self.fail(
                f"{self.named(0)} has a log-prob, {x}, and nothing comes before it: the log-probs are not at the "
                "tokens' own positions, or the server added a token in front"
            )
        return x

    def top(self, position: int, entries: Iterable[tuple[Any, Any]]) -> list[tuple[int, float]]:
        """The likely tokens at a position, most likely first, without those that have no score.

        Equal log-probs keep the order of `entries`.
        """
        row: dict[int, float] = {}
        for token, value in entries:
            if not is_integer(token) or not 0 <= token < 2**63:
                self.fail(
                    f"the likely tokens at {self.named(position)} must have ids in 0 .. 2^63, got {_shown(token)}"
                )
            if token in row:
                self.fail(
                    f"the likely tokens at {self.named(position)} have id {token} twice: does every text have an id of "
                    "its own?"
                )
            x = value if type(value) is float and value <= 0 else self._number(position, value)  # the fast path first
            row[token] = math.nan if x is None else x
        ranked = sorted(((int(token), x) for token, x in row.items() if x == x), key=itemgetter(1), reverse=True)
        mass = sum(map(math.exp, map(itemgetter(1), ranked)))
        if mass > _MOST_MASS:
            self.fail(f"the likely tokens at {self.named(position)} have a probability of {mass:.3g} together")
        return ranked

    def choice(self, field: str) -> Any:
        """The object that has the field: the answer, or its only choice."""
        answer = self.answer
        if _is_list(answer) or isinstance(answer, (str, bytes, Real)):
            self.fail(f"an answer must be the server's response, parsed, or one of its choices, got {_shown(answer)}")
        choices = get(answer, "choices")
        if get(answer, field) is not None or choices is None:
            return answer
        if not _is_list(choices) or len(choices) != 1:
            found = f"{len(choices)} choices" if _is_list(choices) else f"choices {_shown(choices)}"
            self.fail(f"the answer has {found}, expected 1: pass each choice as the answer of its sequence")
        return choices[0]

    def _number(self, position: int, x: Any) -> float | None:
        """`x` checked to be a log-prob; rounding above 0 becomes 0."""
        if x is None:
            return None
        value = x if type(x) is float else _real(x)
        if value is None or value > _ROUNDING:
            self.fail(f"a log-prob at {self.named(position)} must be a number <= 0, got {_shown(x)}")
        return min(value, 0.0)


Parser = Callable[[Request, bool], Scores]  # the flag: also parse the most likely tokens


def vllm(request: Request, likely: bool) -> Scores:
    """Parse vLLM's `prompt_logprobs`."""
    if _is_list(request.answer):
        entries = request.answer
    else:
        part = request.choice("prompt_logprobs")
        entries = get(part, "prompt_logprobs")
        given = get(part, "prompt_token_ids")
        request.check_prompt(get(request.answer, "prompt_token_ids") if given is None else given)
    logp: list[float | None] = []
    top: list[list[tuple[int, float]]] = []
    for position, entry in enumerate(request.of_length(entries, "prompt_logprobs")):
        if entry is not None and not isinstance(entry, Mapping):
            request.fail(f"prompt_logprobs[{position}] must be null or a dictionary by id, got {_shown(entry)}")
        token = request.tokens[position]
        own = None if entry is None else entry.get(str(token), entry.get(token))
        if entry and own is None:
            request.fail(f"token {position} was sent as id {token}, and ids {_shown(list(entry))} were scored")
        logp.append(request.logp(position, None if own is None else _vllm_logprob(own)))
        top.append(request.top(position, _vllm_row(request, position, entry)) if likely and entry else [])
    return Scores(logp, top)


def _vllm_row(request: Request, position: int, entry: Mapping[Any, Any]) -> Iterable[tuple[int, Any]]:
    try:
        ids = list(map(int, entry))
    except (TypeError, ValueError) as error:
        request.fail(f"prompt_logprobs[{position}] must be by token id, got {_shown(list(entry))}", error)
    ranks = [None if isinstance(score, Real) else get(score, "rank") for score in entry.values()]
    rows = _sent_last(request, position, zip(ids, map(_vllm_logprob, entry.values()), ranks, strict=True))
    if all(map(is_integer, ranks)):
        rows.sort(key=itemgetter(2))
    return [row[:2] for row in rows]


def _sent_last(request: Request, position: int, rows: Iterable[_Row]) -> list[_Row]:
    """The rows (id, log-prob, ...) of a position in the server's order; the sent token goes last if it comes first."""
    found = list(rows)
    return found[1:] + found[:1] if found and found[0][0] == request.tokens[position] else found


def _vllm_logprob(score: Any) -> Any:
    return score if isinstance(score, Real) else get(score, "logprob")


def sglang(request: Request, likely: bool) -> Scores:
    """Parse SGLang's `input_token_logprobs` and `input_top_logprobs`."""
    answer = request.answer
    meta = None
    if not _is_list(answer):
        meta = get(request.choice("meta_info"), "meta_info")
        if meta is None:
            request.fail(f"the answer holds no meta_info: is it from /generate? Got {_shown(answer)}")
    elif likely:
        request.fail("the answer is a list, which holds no input_top_logprobs: pass the whole response")
    scored = answer if meta is None else get(meta, "input_token_logprobs")
    logp = []
    hints = "; pass the logprob_start_len that was sent as starts=", f"; ask with logprob_start_len={request.start}"
    for position, entry in enumerate(request.of_length(scored, "input_token_logprobs", *hints)):
        x, token = _sglang_entry(request, position, entry, "input_token_logprobs") if entry else (None, None)
        if entry:
            request.check_token(position, token)
        logp.append(request.logp(position, x))
    if not likely:
        return Scores(logp, [[]] * len(logp))
    top = []
    for position, row in enumerate(request.of_length(get(meta, "input_top_logprobs"), "input_top_logprobs")):
        pairs = (_sglang_entry(request, position, entry, "input_top_logprobs") for entry in row or ())
        top.append(request.top(position, ((token, x) for x, token in pairs)))
    return Scores(logp, top)


def _sglang_entry(request: Request, position: int, entry: Any, name: str) -> tuple[Any, Any]:
    if not _is_list(entry) or len(entry) < 2:
        request.fail(f"entries of {name} must be [log-prob, id, text], got {_shown(entry)} at token {position}")
    return entry[0], entry[1]


def openai(token_id: Callable[[str], int] | None) -> Parser:
    """The parser of OpenAI-compatible completions; `token_id` maps a token's text to its id, None: no check of ids."""

    def parse(request: Request, likely: bool) -> Scores:
        part = request.choice("logprobs")
        if get(part, "prompt_logprobs") is not None:
            return vllm(request, likely)
        block = get(part, "logprobs")
        if isinstance(block, (str, bytes, Real)) or _is_list(block):
            request.fail(f"logprobs must hold token_logprobs and tokens, got {_shown(block)}")
        known = request.check_prompt(get(part, "prompt_token_ids"))
        echoed = "; an echo goes on into the completion if max_tokens > 0"
        values = request.of_length(get(block, "token_logprobs"), "token_logprobs", echoed)
        if token_id is not None and not known:
            for position, text in enumerate(request.of_length(get(block, "tokens"), "tokens")):
                request.check_token(position, token_id(text), _made_of(text))
        logp = [request.logp(position, x) for position, x in enumerate(values)]
        if token_id is None or not likely:
            return Scores(logp, [[]] * len(logp))
        top = []
        for position, row in enumerate(request.of_length(get(block, "top_logprobs"), "top_logprobs")):
            if row is not None and not isinstance(row, Mapping):
                request.fail(f"top_logprobs[{position}] must be null or a dictionary by text, got {_shown(row)}")
            pairs = ((token_id(text), x) for text, x in (row or {}).items())
            top.append(request.top(position, _sent_last(request, position, pairs)))
        return Scores(logp, top)

    return parse


def _made_of(text: Any) -> str:
    """Where an id comes from that `token_id` made of a text, for an error."""
    decoded = not str(text).startswith("token_id:")
    way_out = "; have the server send ids (vLLM: return_tokens_as_token_ids=true)"
    return f", which token_id made of the text {text!r}{way_out if decoded else ''}"


def parsed(parse: Parser, request: Request, *, likely: bool) -> Scores:
    """Parse an answer; any error while parsing becomes a `ScoreError`."""
    if request.answer is None:
        if any(request.needed):
            request.fail(f"there is no answer, and {sum(request.needed)} of its tokens are trained on")
        return Scores([None] * len(request.tokens), [[]] * len(request.tokens))
    try:
        return parse(request, likely)
    except ScoreError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"not an answer of this kind of server ({error!r})"
        request.fail(reason, error)


def get(holder: Any, name: str) -> Any:
    """A field of a dictionary or an attribute of an object; None if it does not exist."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes))


def _real(x: Any) -> float | None:
    return None if isinstance(x, bool) or not isinstance(x, Real) else float(x)


def is_integer(x: Any) -> bool:
    return type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool))


def _shown(x: Any) -> str:
    text = repr(x)
    return text if isinstance(x, Real) else f"{type(x).__name__} {text if len(text) <= 80 else text[:80] + '...'}"


def _request_id(answer: Any) -> object:
    found = (get(answer, "id"), get(answer, "request_id"), get(get(answer, "meta_info"), "id"))
    return next((x for x in found if x is not None), None)


def _refusal(answer: Any) -> str | None:
    """The error that a server sends instead of an answer, or with an empty one."""
    error, end = get(answer, "error"), get(get(answer, "meta_info"), "finish_reason")
    if get(answer, "object") == "error":
        error = answer
    if error is None and get(end, "type") == "abort":
        error = end
    message = error if isinstance(error, str) else get(error, "message")
    return None if message is None else _shown(message).removeprefix("str ")
