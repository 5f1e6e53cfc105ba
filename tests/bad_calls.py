"""Holds the calls that must raise, for every public function: what is wrong, the exception and its message.

Each starts from the "base" call of `cases.TABLE`. Every message names the argument, what was expected and what came.
`every_function/test_errors.py` also passes non-tensors where tensors belong; those calls are not listed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cases import CU, LEFT, LENGTHS, MASK, OF_CU, OF_MASK, TABLE, Arguments, T, put


class Bad(NamedTuple):
    """A call that must raise: the good one with `changes`. In `message`, "..." matches anything."""

    what: str
    changes: Arguments
    error: type[Exception]
    message: str


SHORT = torch.zeros(T - 1, dtype=torch.float64)
INTEGERS = torch.ones(T, dtype=torch.int64)
ELSEWHERE = torch.zeros(T, dtype=torch.float64, device="meta")


BAD: dict[str, list[Bad]] = {}


def base(name: str) -> Arguments:
    return TABLE[name].variants["base"]


def bad_floats(first: str, *others: str) -> Iterator[Bad]:
    """`first` sets the shape and device of the others."""
    for name in (first, *others):
        came = f"{name} must have a floating-point dtype, got torch.int64"
        yield Bad(f"{name} holds integers", {name: INTEGERS}, TypeError, came)
    for name in others:
        came = f"{name} must match {first} (17,), got (16,)"
        if name == "advantages":
            came += "; they are per token: expand one value per sequence with broadcast_to_tokens(...total_tokens=17)"
        yield Bad(f"{name} is short", {name: SHORT}, ValueError, came)
        came = f"{name} must be on {first}'s device cpu, got meta"
        yield Bad(f"{name} is elsewhere", {name: ELSEWHERE}, ValueError, came)


def bad_mask(first: str, name: str = "loss_mask") -> Iterator[Bad]:
    came = f"{name} must be torch.bool, got torch.float64; convert it with {name}.bool()"
    yield Bad(f"{name} is float", {name: MASK.double()}, TypeError, came)
    came = f"{name} must be torch.bool, got torch.int64; convert it with {name}.bool()"
    yield Bad(f"{name} is integer", {name: MASK.long()}, TypeError, came)
    yield Bad(f"{name} is short", {name: MASK[1:]}, ValueError, f"{name} must match {first} (17,), got (16,)")
    came = f"{name} must be on {first}'s device cpu, got meta"
    yield Bad(f"{name} is elsewhere", {name: MASK.to("meta")}, ValueError, came)


def bad_per_token(first: str, *others: str) -> list[Bad]:
    return [*bad_floats(first, *others), *bad_mask(first)]


def bad_cu_seqlens(**switch: Any) -> Iterator[Bad]:
    """`switch` holds the options without which the function does not read `cu_seqlens`."""
    only = [f" for {key}" for key in switch if key != "cu_seqlens"]

    def bad(what: str, cu_seqlens: Any, error: type[Exception], message: str) -> Bad:
        return Bad(
            "".join([f"cu_seqlens {what}", *only]), switch | {"cu_seqlens": cu_seqlens}, error, f"cu_seqlens {message}"
        )

    yield bad("is float", CU.double(), TypeError, "must be int32 or int64, got torch.float64")
    yield bad("is two-dimensional", CU.reshape(2, 3), ValueError, "must be (B + 1,) with B >= 0, got (2, 3)")
    yield bad("starts late", CU.clamp(min=1), ValueError, "must start at 0, got 1")
    yield bad("ends early", CU.clamp(max=16), ValueError, "must end at the number of tokens 17, got 16")
    yield bad("decreases", CU[[0, 3, 2, 5]], ValueError, "must not decrease, got [0, 6, 5, 17]")
    yield bad("is of no sequence", CU[:1], ValueError, "has no sequence, but there are 17 tokens")


def bad_stream(name: str, *, of: str, **switch: Any) -> list[Bad]:
    """The calls of `bad_cu_seqlens`, and a stream that is not flat or is on another device."""
    padded = {k: x[None] for k, x in base(of).items() if isinstance(x, Tensor) and x.shape == (T,)}
    came = f"{name} must be a flat (T,) stream beside cu_seqlens, got (1, 17); ...arange(0, B*L + 1, L)"
    only = "".join(f" for {key}" for key in switch if key != "cu_seqlens")
    elsewhere = f"cu_seqlens must be on {name}'s device cpu, got meta"
    return [
        *bad_cu_seqlens(**switch),
        Bad(f"{name} is not flat{only}", padded | switch, ValueError, came),
        Bad(f"cu_seqlens is elsewhere{only}", switch | {"cu_seqlens": CU.to("meta")}, ValueError, elsewhere),
    ]


def bad_numbers(name: str, *, bound: str, wrong: tuple[float, ...], **switch: Any) -> Iterator[Bad]:
    """Numbers out of range, and values that are not numbers: text (from YAML) and bool."""
    for x in wrong:
        yield Bad(f"{name} is {x}", switch | {name: x}, ValueError, f"{name} must be {bound}, got {x}")
    yaml = f"{name} must be a Python number, got str '5e-3' (YAML reads 5e-3 as text: write 5.0e-3)"
    yield Bad(f"{name} is text", switch | {name: "5e-3"}, TypeError, yaml)
    yield Bad(f"{name} is bool", switch | {name: True}, TypeError, f"{name} must be a Python number, got bool True")


def positive(name: str, **switch: Any) -> list[Bad]:
    return list(bad_numbers(name, bound="> 0", wrong=(0.0, -1.0, math.nan), **switch))


def non_negative(name: str, **switch: Any) -> list[Bad]:
    return list(bad_numbers(name, bound=">= 0", wrong=(-0.1, math.nan), **switch))


def finite(name: str, **switch: Any) -> list[Bad]:
    return list(bad_numbers(name, bound="finite", wrong=(math.inf, -math.inf, math.nan), **switch))


def unit_interval(name: str, **switch: Any) -> list[Bad]:
    above = Bad(f"{name} is 1.5", switch | {name: 1.5}, ValueError, f"{name} must be in 0 .. 1, got 1.5")
    return [*non_negative(name, **switch), above]


def flag(name: str) -> Iterator[Bad]:
    for x in ("no", 1, None):
        yield Bad(f"{name} is {x}", {name: x}, TypeError, f"{name} must be true or false, got {x!r}")


def bad_normalizer() -> list[Bad]:
    came = "normalizer must be a number or a 0-dim tensor, got shape (1,)"
    return [
        *non_negative("normalizer")[:1],
        *finite("normalizer"),
        Bad("normalizer has an axis", {"normalizer": torch.ones(1)}, ValueError, came),
        *(
            Bad(
                f"normalizer is a tensor of {x}",
                {"normalizer": torch.tensor(x)},
                ValueError,
                f"normalizer must be {what}",
            )
            for x, what in (
                (-3.0, ">= 0, got -3.0"),
                (-3, ">= 0, got -3"),
                (math.inf, "finite, got inf"),
            )
        ),
    ]


def bad_temperatures() -> Iterator[Bad]:
    for x in (-1.0, 0.0, math.nan, math.inf):
        came = f"temperature must be > 0 and finite, got {x}"
        one, each = torch.tensor(x), put(torch.ones(T), 2, x)
        yield Bad(f"temperature is a tensor of {x}", {"temperature": one}, ValueError, came)
        yield Bad(f"a temperature is {x}", {"temperature": each}, ValueError, came)


def bad_distill_weights(first: str) -> Iterator[Bad]:
    name = "distill_loss_weight"
    came = f"{name} must have a floating-point dtype, got torch.int64"
    yield Bad("weights are integers", {name: INTEGERS}, TypeError, came)
    for x in (math.nan, math.inf):
        yield Bad(f"a tensor of {x}", {name: torch.tensor(x)}, ValueError, f"{name} must be finite, got {x}")
    yield Bad("weights are short", {name: SHORT}, ValueError, f"{name} must match {first} (17,), got (16,)")
    came = f"{name} must be on {first}'s device cpu, got meta"
    yield Bad("weights are elsewhere", {name: ELSEWHERE}, ValueError, came)


GROUP = Bad(
    "group is an object",
    {"group": object()},
    TypeError,
    "group must be a torch.distributed.ProcessGroup or None, got object",
)

BAD["cu_seqlens_from_lengths"] = [
    Bad("float", {"lengths": LENGTHS.double()}, TypeError, "lengths must be int32 or int64, got torch.float64"),
    Bad("two-dimensional", {"lengths": LENGTHS[None]}, ValueError, "lengths must be (B,), got (1, 5)"),
    Bad("negative", {"lengths": LENGTHS - 1}, ValueError, "lengths must be >= 0, got [4, -1, 0, 3, 6]"),
    Bad(
        "past int32",
        {"lengths": torch.tensor([2**30, 2**30], dtype=torch.int32)},
        ValueError,
        "lengths must sum to at most 2147483647 as int32, got 2147483648; use int64",
    ),
]

BAD["segment_ids"] = [
    *bad_cu_seqlens(),
    Bad("total_tokens", {"total_tokens": 18}, ValueError, "cu_seqlens must end at the number of tokens 18, got 17"),
]

for _name in ("segment_sum", "segment_mean"):
    BAD[_name] = [*bad_per_token("x"), *bad_stream("x", of=_name), GROUP]

BAD["broadcast_to_tokens"] = [
    *bad_cu_seqlens(),
    Bad("short", {"x": SHORT[:4]}, ValueError, "x must have one entry per sequence (5,), got (4,)"),
    Bad("elsewhere", {"x": ELSEWHERE[:5]}, ValueError, "x must be on cu_seqlens's device cpu, got meta"),
]

BAD["next_token_labels"] = [
    Bad("float", {"input_ids": SHORT}, TypeError, "input_ids must be int32 or int64, got torch.float64"),
    *bad_stream("input_ids", of="next_token_labels"),
    GROUP,
]

PROMPTS = base("response_mask")["prompt_lengths"]
BAD["response_mask"] = [
    *bad_cu_seqlens(),
    Bad("float", {"prompt_lengths": PROMPTS.double()}, TypeError, "prompt_lengths must be int32 or int64, got ..."),
    Bad(
        "short",
        {"prompt_lengths": PROMPTS[1:]},
        ValueError,
        "prompt_lengths must have one entry per sequence (5,), got (4,)",
    ),
    Bad("negative", {"prompt_lengths": PROMPTS - 1}, ValueError, "prompt_lengths must be >= 0, got [1, -1, 0, ..."),
    Bad(
        "elsewhere",
        {"prompt_lengths": PROMPTS.to("meta")},
        ValueError,
        "prompt_lengths must be on cu_seqlens's device cpu, got meta",
    ),
]

for _name in ("to_prediction_positions", "to_token_positions"):
    BAD[_name] = [
        *bad_cu_seqlens(),
        Bad("0-dim", {"x": torch.tensor(1.0)}, ValueError, "x must be (T, ...), got ()"),
        Bad("elsewhere", {"x": ELSEWHERE}, ValueError, "x must be on cu_seqlens's device cpu, got meta"),
    ]


def bad_layout(first: str) -> Iterator[Bad]:
    """Of `lengths`, `mask` and `cu_seqlens`, which name the tokens of padded rows; the base call passes `first`."""
    one = "exactly one of lengths, mask and cu_seqlens must be given, got"
    both = "lengths and mask" if first == "lengths" else "mask and cu_seqlens"
    yield Bad("no tokens named", {first: None}, ValueError, f"{one} none")
    yield Bad("tokens named twice", {"mask": LEFT}, ValueError, f"{one} {both}")
    came = "mask must be torch.bool, got torch.int64; convert it with mask.bool()"
    yield Bad("mask is integer", {first: None, "mask": LEFT.long()}, TypeError, came)


BAD["pack"] = [
    Bad("float", {"lengths": LENGTHS.double()}, TypeError, "lengths must be int32 or int64, got torch.float64"),
    Bad("one axis", {"padded": SHORT}, ValueError, "padded must be (B, L, ...), got (16,)"),
    Bad("short", {"lengths": LENGTHS[1:]}, ValueError, "lengths must match the rows of padded (5,), got (4,)"),
    Bad(
        "too long",
        {"padded": torch.zeros(5, 6)},
        ValueError,
        "lengths must fit rows of 6 entries, got sequences of [5, 0, 1, 4, 7]",
    ),
    Bad("negative", {"lengths": LENGTHS - 1}, ValueError, "lengths must be >= 0, got [4, -1, 0, 3, 6]"),
    Bad("another sum", {"total_tokens": 18}, ValueError, "lengths must sum to total_tokens = 18, got 17"),
    Bad("elsewhere", {"lengths": LENGTHS.to("meta")}, ValueError, "lengths must be on padded's device cpu, got meta"),
    *bad_layout("lengths"),
    Bad(
        "mask short", OF_MASK | {"mask": LEFT[1:]}, ValueError, "mask must match the rows of padded (5, 7), got (4, 7)"
    ),
    Bad(
        "mask elsewhere",
        OF_MASK | {"mask": LEFT.to("meta")},
        ValueError,
        "mask must be on padded's device cpu, got meta",
    ),
    Bad(
        "another number of tokens",
        OF_MASK | {"total_tokens": 18},
        ValueError,
        "mask must sum to total_tokens = 18, got 17",
    ),
    Bad(
        "another end",
        OF_CU | {"total_tokens": 18},
        ValueError,
        "cu_seqlens must end at the number of tokens 18, got 17",
    ),
    Bad(
        "cu_seqlens of other rows",
        OF_CU | {"cu_seqlens": torch.tensor([0, 10, 17])},
        ValueError,
        "cu_seqlens must have one sequence per row (6,), got (3,)",
    ),
    Bad(
        "cu_seqlens too long",
        OF_CU | {"padded": torch.zeros(5, 6)},
        ValueError,
        "cu_seqlens must fit rows of 6 entries, got sequences of [5, 0, 1, 4, 7]",
    ),
    Bad(
        "cu_seqlens elsewhere",
        OF_CU | {"cu_seqlens": CU.to("meta")},
        ValueError,
        "cu_seqlens must be on padded's device cpu, got meta",
    ),
]

BAD["unpack"] = [
    *bad_cu_seqlens(),
    Bad("0-dim", {"packed": torch.tensor(1.0)}, ValueError, "packed must be (T, ...), got ()"),
    Bad("too short", {"length": 6}, ValueError, "length must hold the longest sequence 7, got 6"),
    Bad("elsewhere", {"packed": ELSEWHERE}, ValueError, "packed must be on cu_seqlens's device cpu, got meta"),
    *bad_layout("cu_seqlens"),
    Bad("length", {"length": None}, ValueError, "length must be given without mask, got None"),
    Bad(
        "length beside mask",
        OF_MASK | {"cu_seqlens": None, "length": 8},
        ValueError,
        "length must be left out with mask, whose rows have 7 entries, got 8",
    ),
    Bad("mask is flat", {"cu_seqlens": None, "mask": LEFT[0]}, ValueError, "mask must be (B, L), got (7,)"),
    Bad(
        "mask of other tokens",
        {"cu_seqlens": None, "mask": LEFT | True},
        ValueError,
        "mask must sum to the 17 tokens of packed, got 35",
    ),
    Bad(
        "mask elsewhere",
        {"cu_seqlens": None, "mask": LEFT.to("meta")},
        ValueError,
        "mask must be on packed's device cpu, got meta",
    ),
    Bad(
        "lengths of other tokens",
        {"cu_seqlens": None, "lengths": LENGTHS + 1},
        ValueError,
        "lengths must sum to the 17 tokens of packed, got 22",
    ),
    Bad(
        "lengths elsewhere",
        {"cu_seqlens": None, "lengths": LENGTHS.to("meta")},
        ValueError,
        "lengths must be on packed's device cpu, got meta",
    ),
]


LABELS = base("token_logprobs")["labels"]
HEAD = base("linear_token_logprobs")["weight"]
BIAS = TABLE["linear_token_logprobs"].variants["bias"]["bias"]


def bad_head(head: str) -> list[Bad]:
    """Bad labels and options; `head` sets the rows and the device."""
    outside = LABELS.clone()
    outside[2] = 7
    below = LABELS.clone()
    below[2] = -1
    return [
        Bad(
            "labels are int32",
            {"labels": LABELS.int()},
            TypeError,
            "labels must be torch.int64, got torch.int32; convert them with labels.long()",
        ),
        Bad(
            "labels are float",
            {"labels": LABELS.double()},
            TypeError,
            "labels must be torch.int64, got torch.float64; convert them with labels.long()",
        ),
        Bad("labels are short", {"labels": LABELS[1:]}, ValueError, "labels must be (17,) or (17, K), got (16,)"),
        Bad("labels are (1, T)", {"labels": LABELS[None]}, ValueError, "labels must be (17,) or (17, K), got (1, 17)"),
        Bad(
            "labels are elsewhere",
            {"labels": LABELS.to("meta")},
            ValueError,
            f"labels must be on {head}'s device cpu, got meta",
        ),
        Bad("a label is V", {"labels": outside}, ValueError, "labels must be -100 (ignored) or in 0 .. 6, got 7"),
        Bad("a label is -1", {"labels": below}, ValueError, "labels must be -100 (ignored) or in 0 .. 6, got -1"),
        Bad(
            "a label is padding",
            {"labels": outside - (outside == 7).long(), "vocab_size": 6},
            ValueError,
            "labels must be -100 (ignored) or in 0 .. 5, got 6",
        ),
        *positive("temperature"),
        Bad("temperature is inf", {"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
        *bad_temperatures(),
        Bad(
            "temperatures are short",
            {"temperature": SHORT},
            ValueError,
            "temperature must be a number, 0-dim or (17,), got (16,)",
        ),
        Bad(
            "temperatures are integers",
            {"temperature": INTEGERS},
            TypeError,
            "temperature must have a floating-point dtype, got torch.int64",
        ),
        Bad(
            "temperatures are elsewhere",
            {"temperature": ELSEWHERE},
            ValueError,
            "temperature must be on ...'s device cpu, got meta",
        ),
        *positive("softcap"),
        Bad(
            "softcap is inf",
            {"softcap": math.inf},
            ValueError,
            "softcap must be finite, got inf; pass None for no softcap",
        ),
        Bad("vocab_size is 0", {"vocab_size": 0}, ValueError, "vocab_size must be in 1 .. 7, ..., got 0"),
        Bad("vocab_size is 8", {"vocab_size": 8}, ValueError, "vocab_size must be in 1 .. 7, ..., got 8"),
        Bad("vocab_size is float", {"vocab_size": 5.0}, TypeError, "vocab_size must be an int, got float"),
        Bad("vocab_size is bool", {"vocab_size": True}, TypeError, "vocab_size must be an int, got bool"),
        Bad("shard is an object", {"shard": object()}, TypeError, "shard must be a VocabShard or None, got object"),
        Bad("impl is wrong", {"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'torch', 'triton', got 'cuda'"),
    ]


_BAD_HEAD = [
    *bad_head("hidden"),
    Bad(
        "impl is triton", {"impl": "triton"}, ValueError, 'impl="triton" takes float32..., got hidden in torch.float64'
    ),
    Bad("hidden holds integers", {"hidden": INTEGERS}, TypeError, "hidden must have a floating-point dtype, got ..."),
    Bad("hidden is flat", {"hidden": torch.zeros(T)}, ValueError, "hidden must be (T, D), got (17,)"),
    Bad("weight holds integers", {"weight": INTEGERS}, TypeError, "weight must have a floating-point dtype, got ..."),
    Bad(
        "weight is transposed",
        {"weight": HEAD.T},
        ValueError,
        "weight must be (V, D) with D = 5 of hidden, got (5, 7)",
    ),
    Bad("weight is empty", {"weight": HEAD[:0]}, ValueError, "weight must be (V, D) ..., got (0, 5)"),
    Bad(
        "weight is a layer",
        {"weight": torch.nn.Linear(5, 7)},
        TypeError,
        "weight must be a tensor, got Linear; use weight, bias, softcap, logit_scale = kdloss.output_head(module)",
    ),
    Bad(
        "weight is elsewhere",
        {"weight": HEAD.to("meta")},
        ValueError,
        "weight must be on hidden's device cpu, got meta",
    ),
    Bad("bias holds integers", {"bias": INTEGERS}, TypeError, "bias must have a floating-point dtype, got torch.int64"),
    Bad("bias is short", {"bias": BIAS[1:]}, ValueError, "bias must match the rows of weight (7,), got (6,)"),
    Bad("bias is elsewhere", {"bias": BIAS.to("meta")}, ValueError, "bias must be on hidden's device cpu, got meta"),
    *(bad for bad in bad_mask("hidden") if "short" not in bad.what),
    Bad("loss_mask is short", {"loss_mask": MASK[1:]}, ValueError, "loss_mask must match ...hidden (17,), got (16,)"),
    Bad(
        "loss_mask is True where labels are ignored",
        {"loss_mask": torch.arange(T) > 2},
        ValueError,
        "loss_mask must be False where labels are -100 (ignored), got True at 7 of 14 trained tokens; pass loss_mask & "
        "(labels != -100), or response_mask(prompt_lengths, cu_seqlens=cu_seqlens) in place of a mask at token "
        "positions, which is one position late",
    ),
    *finite("logit_scale"),
    Bad("bound is low", {"max_trained_tokens": 8}, ValueError, "max_trained_tokens must hold the 9 ...tokens, got 8"),
    Bad("bound is negative", {"max_trained_tokens": -1}, ValueError, "max_trained_tokens must be >= 0, got -1"),
    Bad("bound is float", {"max_trained_tokens": 9.0}, TypeError, "max_trained_tokens must be an int, got float"),
]

_BAD_LOGITS = [
    *bad_head("logits"),
    Bad(
        "impl is triton",
        {"impl": "triton"},
        ValueError,
        'impl="triton" takes float32, bfloat16 and float16, got logits in torch.float64',
    ),
    Bad("logits hold integers", {"logits": INTEGERS}, TypeError, "logits must have a floating-point dtype, got ..."),
    Bad(
        "no vocabulary",
        {"logits": base("token_logprobs")["logits"][:, :0]},
        ValueError,
        "logits must be (..., V) with V >= 1, got (17, 0)",
    ),
]

for _suffix in ("", "_and_entropy"):
    BAD[f"token_logprobs{_suffix}"] = _BAD_LOGITS
    BAD[f"linear_token_logprobs{_suffix}"] = _BAD_HEAD


def bad_divergence(head: str) -> list[Bad]:
    """Bad options; `head` sets the rows and the device."""
    integers = "temperature must have a floating-point dtype, got torch.int64"
    short = "temperature must be a number, 0-dim or (17,), got (16,)"
    elsewhere = f"temperature must be on {head}'s device cpu, got meta"
    return [
        *positive("temperature"),
        Bad("temperature is inf", {"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
        *bad_temperatures(),
        Bad("temperatures are short", {"temperature": SHORT}, ValueError, short),
        Bad("temperatures are integers", {"temperature": INTEGERS}, TypeError, integers),
        Bad("temperatures are elsewhere", {"temperature": ELSEWHERE}, ValueError, elsewhere),
        Bad("vocab_size is 8", {"vocab_size": 8}, ValueError, "vocab_size must be in 1 .. 7, ..., got 8"),
        Bad("vocab_size is float", {"vocab_size": 5.0}, TypeError, "vocab_size must be an int, got float"),
        Bad("shard is an object", {"shard": object()}, TypeError, "shard must be a VocabShard or None, got object"),
        Bad("impl is wrong", {"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'torch', 'triton', got 'cuda'"),
    ]


def bad_share(name: str, at_0: str, at_1: str) -> list[Bad]:
    """Bad shares of a mixture; at 0 and 1 the message names the function to use instead."""
    bound = f"{name} must be in 0 < {name} < 1, got"
    yaml = f"{name} must be a Python number, got str '5e-1'..."
    return [
        Bad(f"{name} is 0", {name: 0}, ValueError, f"{bound} 0; use {at_0}"),
        Bad(f"{name} is 1", {name: 1.0}, ValueError, f"{bound} 1.0; {at_1}"),
        Bad(f"{name} is -1", {name: -1}, ValueError, f"{bound} -1"),
        Bad(f"{name} is NaN", {name: math.nan}, ValueError, f"{name} must be finite, got nan"),
        Bad(f"{name} is text", {name: "5e-1"}, TypeError, yaml),
    ]


WIDE = torch.zeros(T, 9, dtype=torch.float64)
_BAD_DIVERGENCE = [
    *bad_divergence("logits"),
    Bad(
        "impl is triton", {"impl": "triton"}, ValueError, 'impl="triton" takes float32..., got logits in torch.float64'
    ),
    Bad("logits hold integers", {"logits": INTEGERS}, TypeError, "logits must have a floating-point dtype, got ..."),
    Bad("no vocabulary", {"logits": WIDE[:, :0]}, ValueError, "logits must be (..., V) with V >= 1, got (17, 0)"),
    Bad("teacher holds integers", {"teacher_logits": INTEGERS}, TypeError, "teacher_logits must ...got torch.int64"),
    Bad("teacher is short", {"teacher_logits": WIDE[1:, :7]}, ValueError, "teacher_logits must match ..., got (16, 7)"),
    Bad(
        "teacher is elsewhere",
        {"teacher_logits": WIDE[:, :7].to("meta")},
        ValueError,
        "teacher_logits must be on logits's device cpu, got meta",
    ),
    Bad(
        "teacher is padded",
        {"teacher_logits": WIDE},
        ValueError,
        "teacher_logits must have the student's vocabulary of 7, got 9; ...pass the true vocab_size",
    ),
]

IDS_OF_K = base("topk_forward_kl")["teacher_topk_ids"]
LOGP_OF_K = base("topk_forward_kl")["teacher_topk_logp"]
_ID_HIGH, _ID_LOW, _ID_TWICE = IDS_OF_K.clone(), IDS_OF_K.clone(), IDS_OF_K.clone()
_ID_HIGH[2, 1], _ID_LOW[2, 1], _ID_TWICE[2] = 7, -2, torch.tensor([3, -1, 3, -1])
_BAD_TOPK = [
    *bad_divergence("logits"),
    Bad(
        "impl is triton", {"impl": "triton"}, ValueError, 'impl="triton" takes float32..., got logits in torch.float64'
    ),
    Bad("logits hold integers", {"logits": INTEGERS}, TypeError, "logits must have a floating-point dtype, got ..."),
    Bad("no vocabulary", {"logits": WIDE[:, :0]}, ValueError, "logits must be (..., V) with V >= 1, got (17, 0)"),
    Bad("tail is wrong", {"tail": "drop"}, ValueError, "tail must be one of 'bucket', ..., got 'drop'"),
    Bad("integers", {"teacher_topk_logp": IDS_OF_K}, TypeError, "teacher_topk_logp must ...got torch.int64"),
    Bad("one row", {"teacher_topk_logp": LOGP_OF_K[0]}, ValueError, "teacher_topk_logp must be (17, K) ..., got (4,)"),
    Bad("K is 0", {"teacher_topk_logp": WIDE[:, :0]}, ValueError, "teacher_topk_logp must ...K >= 1, got (17, 0)"),
    Bad("float ids", {"teacher_topk_ids": WIDE}, TypeError, "teacher_topk_ids must be int32 or int64, got ...float64"),
    Bad("few ids", {"teacher_topk_ids": IDS_OF_K[:, 1:]}, ValueError, "teacher_topk_ids must match ..., got (17, 3)"),
    Bad("an id is V", {"teacher_topk_ids": _ID_HIGH}, ValueError, "teacher_topk_ids must be -1 ...in 0 .. 6, got 7"),
    Bad("an id is -2", {"teacher_topk_ids": _ID_LOW}, ValueError, "teacher_topk_ids must be -1 ...in 0 .. 6, got -2"),
    Bad(
        "an id is twice",
        {"teacher_topk_ids": _ID_TWICE},
        ValueError,
        "teacher_topk_ids must be distinct ...got 3 twice",
    ),
    Bad(
        "log-probs elsewhere",
        {"teacher_topk_logp": LOGP_OF_K.to("meta"), "teacher_topk_ids": IDS_OF_K.to("meta")},
        ValueError,
        "teacher_topk_logp must be on logits's device cpu, got meta",
    ),
]

TEACHER_HIDDEN = base("linear_forward_kl")["teacher_hidden"]
TEACHER_HEAD = base("linear_forward_kl")["teacher_weight"]


def bad_side(side: str, head: Tensor) -> Iterator[Bad]:
    """One of the two heads; `side` is "" or "teacher_"."""
    width = head.shape[1]
    for name in ("hidden", "weight", "bias"):
        came = f"{side}{name} must have a floating-point dtype, got torch.int64"
        yield Bad(f"{side}{name} holds integers", {f"{side}{name}": INTEGERS}, TypeError, came)
    came = f"{side}hidden must be (T, D), got (17,)"
    yield Bad(f"{side}hidden is flat", {f"{side}hidden": SHORT.new_zeros(T)}, ValueError, came)
    came = f"{side}weight must be (V, D) with D = {width} of {side}hidden, got ({width}, 7)"
    yield Bad(f"{side}weight is transposed", {f"{side}weight": head.T}, ValueError, came)
    came = f"{side}bias must match the rows of {side}weight (7,), got (6,)"
    yield Bad(f"{side}bias is short", {f"{side}bias": BIAS[1:]}, ValueError, came)
    came = f"{side}weight must be a tensor, got Linear; use weight, bias, ... = kdloss.output_head(module)"
    yield Bad(f"{side}weight is a layer", {f"{side}weight": torch.nn.Linear(width, 7)}, TypeError, came)
    for name, x in (("weight", head), ("bias", BIAS)):
        came = f"{side}{name} must be on hidden's device cpu, got meta"
        yield Bad(f"{side}{name} is elsewhere", {f"{side}{name}": x.to("meta")}, ValueError, came)
    yield from positive(f"{side}softcap")
    came = f"{side}softcap must be finite, got inf; pass None for no softcap"
    yield Bad(f"{side}softcap is inf", {f"{side}softcap": math.inf}, ValueError, came)
    yield from finite(f"{side}logit_scale")


_BAD_LINEAR_DIVERGENCE = [
    *bad_divergence("hidden"),
    Bad(
        "impl is triton", {"impl": "triton"}, ValueError, 'impl="triton" takes float32..., got hidden in torch.float64'
    ),
    *bad_side("", HEAD),
    *bad_side("teacher_", TEACHER_HEAD),
    *(bad for bad in bad_mask("hidden") if "short" not in bad.what),
    Bad("loss_mask is short", {"loss_mask": MASK[1:]}, ValueError, "loss_mask must match ...hidden (17,), got (16,)"),
    Bad(
        "teacher is short",
        {"teacher_hidden": TEACHER_HIDDEN[1:]},
        ValueError,
        "teacher_hidden must match ..., got (16, 4)",
    ),
    Bad(
        "teacher is elsewhere",
        {"teacher_hidden": TEACHER_HIDDEN.to("meta")},
        ValueError,
        "teacher_hidden must be on hidden's device cpu, got meta",
    ),
    Bad(
        "teacher is padded",
        {"teacher_weight": torch.cat([TEACHER_HEAD, TEACHER_HEAD])},
        ValueError,
        "teacher_weight must have the student's vocabulary of 7, got 14; ...pass the true vocab_size",
    ),
]

_SHARES = {
    "forward_kl": [],
    "reverse_kl": [],
    "generalized_jsd": ("beta", "{}forward_kl", "use {}reverse_kl"),
    "skewed_forward_kl": ("alpha", "{}forward_kl", "the divergence is 0 there for any student"),
    "skewed_reverse_kl": ("alpha", "{}reverse_kl", "the divergence is 0 there for any student"),
    "total_variation": [],
}
for _prefix, _bad in (("", _BAD_DIVERGENCE), ("topk_", _BAD_TOPK), ("linear_", _BAD_LINEAR_DIVERGENCE)):
    for _name, _share in _SHARES.items():
        if f"{_prefix}{_name}" in TABLE:
            _ends = bad_share(*(text.format(_prefix) for text in _share)) if _share else []
            BAD[f"{_prefix}{_name}"] = [*_bad, *_ends]
for _name in ("total_variation", "linear_total_variation"):  # without a kernel
    BAD[_name] = [bad for bad in BAD[_name] if not bad.what.startswith("impl is")]
    for _impl in ("triton", "cuda"):
        came = f"impl must be one of 'auto', 'torch', got '{_impl}'"
        BAD[_name].append(Bad(f"impl is {_impl}", {"impl": _impl}, ValueError, came))

_OTHER_WIDTH = "behaviour_logits must have the student's vocabulary of 7, got 9; ...pass the true vocab_size"
BAD["reverse_kl_baseline"] = [
    *(bad for bad in _BAD_DIVERGENCE if not bad.what.startswith("impl is")),
    Bad("kind is wrong", {"kind": "mean"}, ValueError, "kind must be one of 'value', 'optimal', got 'mean'"),
    Bad(
        "behaviour holds integers",
        {"behaviour_logits": INTEGERS},
        TypeError,
        "behaviour_logits must ...got torch.int64",
    ),
    Bad("behaviour is short", {"behaviour_logits": WIDE[1:, :7]}, ValueError, "behaviour_logits must ...got (16, 7)"),
    Bad(
        "behaviour is elsewhere",
        {"behaviour_logits": WIDE[:, :7].to("meta")},
        ValueError,
        "behaviour_logits ...got meta",
    ),
    Bad("behaviour is padded", {"behaviour_logits": WIDE}, ValueError, _OTHER_WIDTH),
    Bad(
        "behaviour is narrow",
        {"behaviour_logits": WIDE[:, :4], "vocab_size": 5},
        ValueError,
        "vocab_size must be in 1 .. 4, ..., got 5",
    ),
]


BAD["topk_generalized_jsd"].append(
    Bad("tail is generalized", {"tail": "generalized"}, ValueError, "tail must be ...JSD, got 'generalized': ...")
)

# top K and samples: two samples a row would be (17, 2), so a tensor of that shape matches no labels (17,)
_SAMPLED_ALONE = [
    Bad("teacher holds integers", {"teacher_logp": INTEGERS}, TypeError, "teacher_logp must ...got torch.int64"),
    Bad("teacher is short", {"teacher_logp": SHORT}, ValueError, "teacher_logp must match labels (17,), got (16,)"),
    Bad("teacher is elsewhere", {"teacher_logp": ELSEWHERE}, ValueError, "teacher_logp must be on ...cpu, got meta"),
    Bad("old_logp holds integers", {"old_logp": INTEGERS}, TypeError, "old_logp must ...got torch.int64"),
    Bad("old_logp is wide", {"old_logp": WIDE[:, :2]}, ValueError, "old_logp must match labels (17,), got (17, 2)"),
    Bad("old_logp is elsewhere", {"old_logp": ELSEWHERE}, ValueError, "old_logp must be on ...cpu, got meta"),
    *positive("max_ratio"),
]
_BAD_SUPPORT = [bad for bad in _BAD_TOPK if {*bad.changes} <= {"teacher_topk_logp", "teacher_topk_ids"}]
BAD["topk_sampled_reverse_kl"] = [
    *(bad for bad in _BAD_LOGITS if "softcap" not in bad.changes),
    *_BAD_SUPPORT,
    *_SAMPLED_ALONE,
]
BAD["linear_topk_sampled_reverse_kl"] = [
    *_BAD_HEAD,
    *(bad._replace(message=bad.message.replace("logits's", "hidden's")) for bad in _BAD_SUPPORT),
    *_SAMPLED_ALONE,
]

_LINEAR_TOPK = [
    *(bad for bad in _BAD_LINEAR_DIVERGENCE if not any(name.startswith("teacher") for name in bad.changes)),
    *(bad._replace(message=bad.message.replace("logits's", "hidden's")) for bad in _BAD_SUPPORT),
    *(bad for bad in _BAD_TOPK if "tail" in bad.changes),
]
for _name in ("forward_kl", "reverse_kl", "generalized_jsd"):
    # what only one of the three refuses is said of logits too, with the names of the functions from there
    _alone = [bad for bad in BAD[f"topk_{_name}"] if bad not in _BAD_TOPK]
    BAD[f"linear_topk_{_name}"] = [
        *_LINEAR_TOPK,
        *(bad._replace(message=bad.message.replace("topk_", "linear_topk_")) for bad in _alone),
    ]

_NO_OPTION = {"softcap", "impl"}
BAD["topk_diagnostics"] = [
    *(bad for bad in _BAD_LOGITS if not _NO_OPTION & {*bad.changes}),
    *_BAD_SUPPORT,
    *(bad for bad in bad_mask("logits") if "short" not in bad.what),
    Bad("loss_mask is short", {"loss_mask": MASK[1:]}, ValueError, "loss_mask must match ...logits (17,), got (16,)"),
    *(bad for bad in _BAD_HEAD if bad.what == "loss_mask is True where labels are ignored"),
]

for _name in ("kl_k1", "kl_k2", "kl_k3"):
    BAD[_name] = bad_per_token("logp", "teacher_logp")
BAD["reverse_kl_reward"] = [*bad_per_token("logp", "teacher_logp"), *positive("clip")]
BAD["discounted_returns"] = [
    *bad_per_token("rewards"),
    *bad_stream("rewards", of="discounted_returns"),
    *unit_interval("discount"),
    GROUP,
]

for _name in ("forward_kl_reward", "squared_hellinger_reward", "total_variation_reward", "jsd_reward"):
    BAD[_name] = [*bad_per_token("logp", "teacher_logp"), *positive("clip")]
BAD["jsd_reward"] += bad_share("beta", "forward_kl_reward", "use reverse_kl_reward")

BAD["trust_region_mask"] = [
    *bad_per_token("logp", "old_logp", "advantages"),
    *non_negative("max_divergence"),
    Bad("measure", {"measure": "js"}, ValueError, "measure must be one of 'tv', 'kl', got 'js'"),
]
BAD["stale_sequence_mask"] = [
    *bad_per_token("logp", "old_logp", "advantages"),
    *bad_stream("logp", of="stale_sequence_mask"),
    *non_negative("max_divergence"),
    GROUP,
]
BAD["top_entropy_mask"] = [*bad_per_token("entropy"), *unit_interval("fraction"), GROUP]
BAD["informative_token_mask"] = [
    *bad_per_token("entropy", "divergence"),
    *bad_stream("entropy", of="informative_token_mask"),
    *unit_interval("fraction"),
    GROUP,
]

BAD["gate_kd_reward"] = bad_per_token("kd_reward", "advantages")
BAD["modulate_advantages"] = [
    *bad_per_token("advantages", "kd_reward"),
    *unit_interval("mix"),
    *non_negative("clip"),
]
BAD["prefix_weights"] = [
    *bad_per_token("kd_reward"),
    *bad_stream("kd_reward", of="prefix_weights"),
    *non_negative("gain"),
    GROUP,
]

_FROM = base("align_responses")["from_mask"]
BAD["align_responses"] = [
    Bad("0-dim", {"x": torch.tensor(1.0)}, ValueError, "x must be (T, ...), got ()"),
    Bad(
        "from_mask short", {"from_mask": _FROM[1:]}, ValueError, "from_mask must match the tokens of x (25,), got (24,)"
    ),
    Bad(
        "from_mask float",
        {"from_mask": _FROM.double()},
        TypeError,
        "from_mask must be torch.bool, got torch.float64;...",
    ),
    Bad("to_mask integer", {"to_mask": MASK.long()}, TypeError, "to_mask must be torch.bool, got torch.int64; ..."),
    Bad("to_mask has two axes", {"to_mask": MASK[None]}, ValueError, "to_mask must be (T',), got (1, 17)"),
    Bad("to_mask elsewhere", {"to_mask": MASK.to("meta")}, ValueError, "to_mask must be on x's device cpu, got meta"),
    Bad(
        "from_cu_seqlens float",
        {"from_cu_seqlens": CU.double()},
        TypeError,
        "from_cu_seqlens must be int32 or int64, got torch.float64",
    ),
    Bad(
        "from_cu_seqlens ends early",
        {"from_cu_seqlens": CU},
        ValueError,
        "from_cu_seqlens must end at the number of tokens 25, got 17",
    ),
    Bad(
        "to_cu_seqlens ends early",
        {"to_cu_seqlens": CU.clamp(max=16)},
        ValueError,
        "to_cu_seqlens must end at the number of tokens 17, got 16",
    ),
    Bad(
        "sequences",
        {"to_cu_seqlens": torch.tensor([0, 17])},
        ValueError,
        "to_cu_seqlens must have the 5 sequences of from_cu_seqlens, got 1",
    ),
    Bad(
        "other responses",
        {"to_mask": MASK & (torch.arange(T) != 12)},
        ValueError,
        "to_mask must have as many response positions as from_mask in every sequence, got 4 against 5 in sequence 4",
    ),
]

GROUPED = base("leave_one_out_advantages")["rewards"]
IDS = TABLE["leave_one_out_advantages"].variants["ids"]["group_ids"]
_BAD_GROUPS = [
    Bad("integers", {"rewards": IDS}, TypeError, "rewards must have a floating-point dtype, got torch.int64"),
    Bad("two axes", {"rewards": GROUPED[None]}, ValueError, "rewards must be (B,), got (1, 12)"),
    Bad("no group", {"group_size": None}, ValueError, "exactly one of group_size ... given, got none"),
    Bad("two groups", {"group_ids": IDS}, ValueError, "exactly one of ..., got group_size and group_ids"),
    Bad("size is float", {"group_size": 4.0}, TypeError, "group_size must be an int, got float"),
    Bad("size is bool", {"group_size": True}, TypeError, "group_size must be an int, got bool"),
    Bad("size is 5", {"group_size": 5}, ValueError, "group_size must be >= 1 and divide the 12 rewards, got 5"),
    Bad("size is 0", {"group_size": 0}, ValueError, "group_size must be >= 1 and divide the 12 rewards, got 0"),
    Bad(
        "float ids", {"group_size": None, "group_ids": GROUPED}, TypeError, "group_ids must be int32 or int64, got ..."
    ),
    Bad(
        "few ids",
        {"group_size": None, "group_ids": IDS[1:]},
        ValueError,
        "group_ids must match rewards (12,), got (11,)",
    ),
    Bad(
        "ids elsewhere",
        {"group_size": None, "group_ids": IDS.to("meta")},
        ValueError,
        "group_ids must be on rewards's device cpu, got meta",
    ),
]

BAD["leave_one_out_advantages"] = _BAD_GROUPS
BAD["group_relative_advantages"] = [*_BAD_GROUPS, *non_negative("eps"), *flag("scale_by_std")]

BAD["fold_kd_reward"] = [
    *bad_floats("advantages", "kd_reward"),
    *finite("rl_loss_weight"),
    *finite("distill_loss_weight"),
    *bad_distill_weights("advantages"),
]


def bad_statistic(**switch: Any) -> list[Bad]:
    """A statistic that is none, and bounds that do not go with it."""
    came = "max_statistic must be a number with statistic='k2', got None"
    more = "max_statistic must be None with statistic='ratio', got 0.5"
    return [
        Bad("statistic", {"statistic": "k1"}, ValueError, "statistic must be one of 'ratio', 'k2', 'k3', got 'k1'"),
        Bad("no max_statistic", switch | {"statistic": "k2"}, ValueError, came),
        Bad("max_statistic of a ratio", {"max_statistic": 0.5}, ValueError, more),
        *non_negative("max_statistic", statistic="k3", **switch),
    ]


BAD["truncated_importance_weights"] = [*bad_per_token("prox_logp", "old_logp"), *positive("max_weight")]
BAD["masked_importance_weights"] = [
    *bad_per_token("prox_logp", "old_logp"),
    *positive("max_weight"),
    *non_negative("min_weight"),
    Bad("crossed", {"min_weight": 6}, ValueError, "min_weight must not exceed max_weight = 5.0, got 6"),
    *bad_statistic(),
]
BAD["sequence_importance_weights"] = [
    *bad_per_token("prox_logp", "old_logp"),
    *bad_stream("prox_logp", of="sequence_importance_weights"),
    *positive("max_weight"),
    *non_negative("min_weight"),
    Bad("crossed", {"min_weight": 2}, ValueError, "min_weight must not exceed max_weight = 1.5, got 2"),
    Bad("aggregate", {"aggregate": "max"}, ValueError, "aggregate must be one of 'sum', 'mean', got 'max'"),
    Bad("action", {"action": "clip"}, ValueError, "action must be one of 'truncate', 'mask', got 'clip'"),
    *bad_statistic(action="mask"),
    Bad(
        "a statistic that truncates",
        {"statistic": "k2", "max_statistic": 0.5},
        ValueError,
        "action must be \"mask\" with statistic='k2', got 'truncate'",
    ),
    GROUP,
]

_BAD_PG = bad_per_token("logp", "old_logp", "advantages", "weights")

_BAD_CLIPS = [*non_negative("clip_low"), *non_negative("clip_high")]

_BAD_DUAL_CLIP = list(bad_numbers("dual_clip", bound="> 1", wrong=(1.0, 0.0, math.nan)))

BAD["importance_sampled_surrogate"] = [*_BAD_PG, *positive("max_ratio")]

BAD["clipped_surrogate"] = [*_BAD_PG, *_BAD_CLIPS, *_BAD_DUAL_CLIP]
BAD["sequence_clipped_surrogate"] = [*_BAD_PG, *bad_stream("logp", of="sequence_clipped_surrogate"), *_BAD_CLIPS, GROUP]
BAD["cispo_surrogate"] = [*_BAD_PG, *_BAD_CLIPS]
BAD["sapo_surrogate"] = [
    *_BAD_PG,
    *(
        bad
        for name in ("tau_positive", "tau_negative")
        for bad in (
            *positive(name),
            Bad(f"{name} is inf", {name: math.inf}, ValueError, f"{name} must be finite, got inf"),
        )
    ),
]
BAD["token_mean"] = [*bad_per_token("x"), *bad_normalizer()]
BAD["sequence_mean"] = [*bad_per_token("x"), *bad_stream("x", of="sequence_mean"), *bad_normalizer(), GROUP]

_BAD_COUNT = [
    Bad("float", {"loss_mask": MASK.double()}, TypeError, "loss_mask must be torch.bool, got torch.float64; ..."),
    GROUP,
]
BAD["global_token_count"] = _BAD_COUNT
BAD["global_sequence_count"] = [
    *_BAD_COUNT,
    *bad_stream("loss_mask", of="global_sequence_count"),
    Bad(
        "split_group is an object",
        {"split_group": object()},
        TypeError,
        "split_group must be a ...ProcessGroup or None, got object",
    ),
]

BAD["sft_loss"] = [*bad_per_token("logp"), *bad_normalizer()]

_BAD_REDUCTION = [
    Bad(
        "reduction is wrong",
        {"reduction": "mean"},
        ValueError,
        "reduction must be one of 'token_mean', 'sequence_mean', got 'mean'",
    ),
    Bad(
        "cu_seqlens is missing",
        {"reduction": "sequence_mean"},
        ValueError,
        'cu_seqlens must be given where reduction="sequence_mean"',
    ),
    *bad_normalizer(),
]

_BAD_RL = [*_BAD_CLIPS, *_BAD_DUAL_CLIP]

_BAD_KD = [*bad_mask("logp", "kd_mask"), *positive("kd_reward_clip"), *positive("kd_max_ratio")]

_BAD_DISCOUNT = [
    *unit_interval("kd_discount", cu_seqlens=CU),
    Bad(
        "kd_discount needs cu_seqlens",
        {"kd_discount": 0.5},
        ValueError,
        "cu_seqlens must be given where kd_discount is not 0 (it is 0.5)",
    ),
    Bad(
        "kd_discount with kd_baseline",
        {"kd_discount": 0.5, "cu_seqlens": CU, "kd_baseline": torch.zeros(T)},
        ValueError,
        "kd_baseline must be None where kd_discount is not 0 (it is 0.5): a return holds the rewards of later tokens",
    ),
]

BAD["grpo_loss"] = [
    *bad_per_token("logp", "old_logp", "advantages", "prox_logp", "weights"),
    *bad_stream("logp", of="grpo_loss", reduction="sequence_mean", cu_seqlens=CU),
    *_BAD_RL,
    *_BAD_REDUCTION,
    GROUP,
]

BAD["distillation_loss"] = [
    *bad_per_token("logp", "old_logp", "teacher_logp", "kd_baseline"),
    *bad_stream("logp", of="distillation_loss", reduction="sequence_mean", cu_seqlens=CU),
    *bad_stream("logp", of="distillation_loss", kd_discount=0.5, cu_seqlens=CU),
    *_BAD_KD,
    *_BAD_DISCOUNT,
    *_BAD_REDUCTION,
    GROUP,
]

_BAD_TERMS = [
    *_BAD_RL,
    *_BAD_KD,
    *finite("rl_loss_weight"),
    *finite("distill_loss_weight"),
    *flag("direct_penalty"),
    # hyperparameters of a skipped term are still checked: a schedule may raise its weight later
    *(
        Bad(f"{bad.what}, the term skipped", bad.changes | {weight: 0}, bad.error, bad.message)
        for weight, calls in (
            ("rl_loss_weight", _BAD_RL),
            ("distill_loss_weight", [*positive("kd_reward_clip"), *positive("kd_max_ratio")]),
        )
        for bad in calls
    ),
    *bad_distill_weights("logp"),
    Bad(
        "rl_loss_weight is a tensor",
        {"rl_loss_weight": torch.tensor(1.0)},
        TypeError,
        "rl_loss_weight must be a Python number, got Tensor ...",
    ),
    Bad(
        "advantages are missing",
        {"advantages": None},
        ValueError,
        "advantages must be given where rl_loss_weight is not 0 (it is 1.0)",
    ),
    Bad(
        "the teacher is missing",
        {"teacher_logp": None},
        ValueError,
        "teacher_logp must be given where distill_loss_weight is not 0 (it is 0.005)",
    ),
    *(
        Bad(
            f"direct_penalty with {name}",
            {"direct_penalty": True, name: 0.5},
            ValueError,
            f"{name} must be {off} with direct_penalty=True, which has no reward, got 0.5",
        )
        for name, off in (("kd_reward_clip", None), ("kd_max_ratio", None))
    ),
    Bad(
        "direct_penalty with kd_baseline",
        {"direct_penalty": True, "kd_baseline": torch.zeros(T)},
        ValueError,
        "kd_baseline must be None with direct_penalty=True, which has no reward, got a tensor",
    ),
]

BAD["kdrl_loss"] = [
    *bad_per_token("logp", "old_logp", "teacher_logp", "advantages", "prox_logp", "weights", "kd_baseline"),
    *bad_stream("logp", of="kdrl_loss", reduction="sequence_mean", cu_seqlens=CU),
    *bad_stream("logp", of="kdrl_loss", kd_discount=0.5, cu_seqlens=CU),
    *_BAD_TERMS,
    *_BAD_DISCOUNT,
    *(
        Bad(f"{bad.what}, the term skipped", bad.changes | {"distill_loss_weight": 0}, bad.error, bad.message)
        for bad in _BAD_DISCOUNT
    ),
    *_BAD_REDUCTION,
    GROUP,
    Bad(
        "direct_penalty with kd_discount",
        {"direct_penalty": True, "kd_discount": 0.5, "cu_seqlens": CU},
        ValueError,
        "kd_discount must be 0 with direct_penalty=True, which has no reward, got 0.5",
    ),
]

BAD["kdrl_token_loss"] = [
    *bad_per_token("logp", "old_logp", "teacher_logp", "advantages", "prox_logp", "weights"),
    *_BAD_TERMS,
]

BAD["diagnostics"] = bad_per_token("logp", "old_logp", "teacher_logp", "entropy")

_BAD_STEP = non_negative("step")
BAD["schedules.constant"] = [*_BAD_STEP, *finite("value")]
BAD["schedules.linear_floor"] = [
    *_BAD_STEP,
    *non_negative("slope"),
    *finite("start"),
    *finite("slope")[:1],
    *finite("floor"),
]
BAD["schedules.cosine"] = [*_BAD_STEP, *positive("total_steps"), *finite("start"), *finite("end")]
BAD["schedules.switch"] = [*_BAD_STEP, *non_negative("at"), *finite("before"), *finite("after")]
