"""Holds one table of calls to every public function. Tests in `every_function` run over it and over `bad_calls.py`.

`TABLE[name]` has named arguments in float64, in several variants per function: "base" is the call that bad calls start
from, and together the variants set every keyword to a value other than its default. Per-token inputs share one packed
stream of five sequences: one empty, one of a single token, one fully masked, one with a hole. Untrained positions of
every float tensor hold NaN, inf and -inf. Tokens are off-policy, and some are clipped from either side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """The calls of one function, and what its docstring says of the gradient."""

    variants: dict[str, Arguments]
    gradient: str = "detached"  # "attached", "detached", "integer" (integers or bool) or "number" (no tensors)
    differentiable: tuple[str, ...] = ()  # the arguments that gradient flows to, and no others
    attached: tuple[str, ...] = ("",)  # the fields of the result that carry gradient; "" is a bare tensor
    compiled: tuple[str, ...] = ()  # variants that are compiled
    copies: bool = False  # only moves entries, and keeps their dtype


def variants(base: Arguments, **changes: Arguments) -> dict[str, Arguments]:
    return {"base": base} | {name: base | change for name, change in changes.items()}


# --- the packed stream -----------------------------------------------------------------------------------------------

_RANDOM = torch.Generator().manual_seed(2506_02208)

LENGTHS = torch.tensor([5, 0, 1, 4, 7])
CU = torch.tensor([0, 5, 5, 6, 10, 17])
CU32 = CU.to(torch.int32)
B, T = 5, 17
MASK = torch.tensor([x == "1" for x in "01110 1 0000 0110111".replace(" ", "")])
NOTHING = torch.zeros(T, dtype=torch.bool)
# Where the distillation reward applies. Elsewhere `DEAF_TEACHER` holds NaN, even at trained tokens.
KD_MASK = torch.arange(T) % 3 != 2


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=_RANDOM, dtype=torch.float64)


def garbage(x: Tensor, keep: Tensor = MASK) -> Tensor:
    """`x` with NaN, inf and -inf in turn where `keep` is False."""
    filler = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64).repeat(keep.numel())[: keep.numel()]
    filler = filler.reshape(keep.shape + (1,) * (x.ndim - keep.ndim))
    return torch.where(keep.reshape(filler.shape), x, filler)


def put(x: Tensor, index: int, value: float) -> Tensor:
    """`x` with `value` at one place."""
    return x.masked_fill(torch.arange(x.shape[0]) == index, value)


def trained(*values: float) -> Tensor:
    """(T,) with the given values at the nine trained tokens and garbage elsewhere."""
    return garbage(torch.zeros(T, dtype=torch.float64).masked_scatter(MASK, torch.tensor(values, dtype=torch.float64)))


LOGP = garbage(uniform(-3, -0.1, T))
TEACHER = garbage(uniform(-4, -0.1, T))
# Ratios 1.6, 0.5, 1.05 | 3.3 | 0.9, 0.7, 2.5, 1.3, 0.15: with these signs both clips act, and so does a dual clip.
LOG_RATIO = trained(0.45, -0.7, 0.05, 1.2, -0.1, -0.35, 0.9, 0.25, -1.9)
ADVANTAGES = trained(1.2, -0.8, 0.3, 1.5, 0.0, 0.7, -0.4, 2.0, -1.1)
OLD = LOGP - LOG_RATIO
PROX = OLD + garbage(uniform(-0.4, 0.4, T))
WEIGHTS = put(garbage(uniform(0.3, 1.9, T)), 15, 0)
# an infinite advantage that a weight of exactly 0 removes
SILENCED = put(ADVANTAGES, 15, math.inf)
DISTILL_WEIGHTS = put(garbage(uniform(0.001, 0.9, T)), 15, 0)
DEAF_TEACHER = garbage(TEACHER, KD_MASK | ~MASK)
EXCLUDING_TEACHER = put(TEACHER, 12, -math.inf)


def rows(arguments: Arguments) -> Arguments:
    """The per-token arguments as (4, 4), for functions without sequences, which take any shape."""
    return {k: x[:16].reshape(4, 4) for k, x in arguments.items() if isinstance(x, Tensor) and x.shape == (T,)}


# The denominators that reductions and objectives take.
NORMALIZERS: dict[str, Arguments] = {
    "normalizer is a number": {"normalizer": 7.5},
    "normalizer is an integer tensor": {"normalizer": torch.tensor(11)},
    "normalizer is a float tensor": {"normalizer": torch.tensor(6.25, dtype=torch.float64)},
    "normalizer is 0": {"normalizer": 0},
    "normalizer is a tensor of 0": {"normalizer": torch.tensor(0.0, dtype=torch.float64)},
    "nothing is trained": {"loss_mask": NOTHING},
}

TABLE: dict[str, Entry] = {}

# --- packing ---------------------------------------------------------------------------------------------------------

TABLE["cu_seqlens_from_lengths"] = Entry(
    gradient="integer",
    variants=variants({"lengths": LENGTHS}, int32={"lengths": LENGTHS.int()}, empty={"lengths": LENGTHS[:0]}),
    compiled=("base",),
)

TABLE["segment_ids"] = Entry(
    gradient="integer",
    variants=variants(
        {"cu_seqlens": CU, "total_tokens": T},
        int32={"cu_seqlens": CU32},
        read={"total_tokens": None},
        empty={"cu_seqlens": CU[:1], "total_tokens": 0},
        only_empty_sequences={"cu_seqlens": CU[:1].repeat(3), "total_tokens": 0},
    ),
    compiled=("base",),
)

_SEGMENTS = {"x": garbage(uniform(-2, 2, T)), "loss_mask": MASK, "cu_seqlens": CU}
for _name in ("segment_sum", "segment_mean"):
    TABLE[_name] = Entry(
        gradient="attached",
        differentiable=("x",),
        variants=variants(_SEGMENTS, int32={"cu_seqlens": CU32}, nothing={"loss_mask": NOTHING}),
        compiled=("base",),
    )

_PER_SEQUENCE = {"x": garbage(uniform(-1, 1, B), LENGTHS > 0), "cu_seqlens": CU, "total_tokens": T}
TABLE["broadcast_to_tokens"] = Entry(
    gradient="attached",
    differentiable=("x",),
    copies=True,
    variants=variants(
        _PER_SEQUENCE,
        int32={"cu_seqlens": CU32},
        read={"total_tokens": None},
        of_bool={"x": torch.tensor([True, False, True, False, False])},
        of_integers={"x": torch.arange(5)},
    ),
    compiled=("base", "of_bool"),
)

INPUT_IDS = torch.randint(0, 7, (T,), generator=_RANDOM)
TABLE["next_token_labels"] = Entry(
    gradient="integer",
    variants=variants(
        {"input_ids": INPUT_IDS, "cu_seqlens": CU},
        int32={"input_ids": INPUT_IDS.int(), "cu_seqlens": CU32},
        ignore_index={"ignore_index": -1},
    ),
    compiled=("ignore_index",),
)

PROMPTS = torch.tensor([2, 0, 1, 4, 0])  # one fills its sequence, one is empty
TABLE["response_mask"] = Entry(
    gradient="integer",
    variants=variants(
        {"prompt_lengths": PROMPTS, "cu_seqlens": CU, "total_tokens": T},
        int32={"prompt_lengths": PROMPTS.int(), "cu_seqlens": CU32},
        read={"total_tokens": None},
        too_long={"prompt_lengths": PROMPTS + 9},
    ),
    compiled=("base",),
)

for _name in ("to_prediction_positions", "to_token_positions"):
    TABLE[_name] = Entry(
        gradient="attached",
        differentiable=("x",),
        copies=True,
        variants=variants(
            {"x": uniform(-3, 0, T), "cu_seqlens": CU, "fill": 0.5},
            int32={"cu_seqlens": CU32},
            trailing_axis={"x": uniform(-3, 0, T, 3)},
            of_integers={"x": INPUT_IDS, "fill": -100},
            of_bool={"x": MASK, "fill": False},
        ),
        compiled=("base", "of_integers"),
    )

# Tokens of the same lengths on the right, on the left, and anywhere in their rows.
LEFT = torch.arange(7) >= 7 - LENGTHS[:, None]
HOLES = torch.tensor([[x == "1" for x in row] for row in ["1011011", "0000000", "0001000", "1011010", "1111111"]])
OF_MASK: Arguments = {"lengths": None, "mask": LEFT}
OF_CU: Arguments = {"lengths": None, "cu_seqlens": CU}

TABLE["pack"] = Entry(
    gradient="attached",
    differentiable=("padded",),
    copies=True,
    variants=variants(
        {
            "padded": garbage(uniform(-1, 1, B, 7), torch.arange(7) < LENGTHS[:, None]),
            "lengths": LENGTHS,
            "total_tokens": T,
        },
        int32={"lengths": LENGTHS.int()},
        trailing_axis={"padded": uniform(-1, 1, B, 8, 2)},
        of_integers={"padded": torch.arange(35).reshape(5, 7)},
        empty={"padded": uniform(0, 1, 0, 7), "lengths": LENGTHS[:0], "total_tokens": 0},
        read={"total_tokens": None},
        cu_seqlens=OF_CU | {"total_tokens": None},
        left={"padded": garbage(uniform(-1, 1, B, 7), LEFT)} | OF_MASK,
        holes=OF_MASK | {"padded": garbage(uniform(-1, 1, B, 7, 2), HOLES), "mask": HOLES, "total_tokens": None},
        empty_mask=OF_MASK | {"padded": uniform(0, 1, 3, 0), "mask": MASK[:0].reshape(3, 0), "total_tokens": None},
    ),
    compiled=("base", "of_integers", "left"),
)

TABLE["unpack"] = Entry(
    gradient="attached",
    differentiable=("packed",),
    copies=True,
    variants=variants(
        {"packed": uniform(-1, 1, T), "cu_seqlens": CU, "length": 7},
        int32={"cu_seqlens": CU32},
        fill={"fill": -1.5, "length": 9},
        trailing_axis={"packed": uniform(-1, 1, T, 2)},
        of_integers={"packed": INPUT_IDS, "fill": -100},
        of_bool={"packed": MASK},
        empty={"packed": uniform(0, 1, 0), "cu_seqlens": CU[:1].repeat(3), "fill": 2.0},
        lengths={"cu_seqlens": None, "lengths": LENGTHS},
        left={"cu_seqlens": None, "mask": LEFT, "length": None},
        holes={"cu_seqlens": None, "mask": HOLES, "fill": -1.0, "packed": uniform(-1, 1, T, 2)},
        nothing={"cu_seqlens": None, "mask": ~LEFT & LEFT, "packed": uniform(0, 1, 0)},
    ),
    compiled=("fill", "of_bool", "left"),
)

# --- log-probs -------------------------------------------------------------------------------------------------------

V, D, K = 7, 5, 3
_LABELS = torch.randint(0, 5, (T,), generator=_RANDOM).masked_fill(~MASK, -100)
_K_LABELS = torch.randint(0, 5, (T, K), generator=_RANDOM).masked_fill(~MASK[:, None], -100)
_K_LABELS[12, 1] = -100  # one label of a trained row is ignored
_LOGITS = garbage(uniform(-3, 3, T, V))
_NO_MASS = _LOGITS.masked_fill(MASK[:, None] & (torch.arange(V) > 4), -math.inf)
_TEMPERATURES = garbage(uniform(0.5, 2, T))
_FROM_LOGITS = variants(
    {"logits": _LOGITS, "labels": _LABELS},
    temperature={"temperature": 0.7},
    temperature_tensor={"temperature": _TEMPERATURES},
    temperature_scalar_tensor={"temperature": torch.tensor(1.5, dtype=torch.float64)},
    softcap={"softcap": 2.0, "temperature": 1.3},
    vocab_size={"logits": garbage(_LOGITS, torch.arange(V).expand(T, V) < 5), "vocab_size": 5},
    no_mass={"logits": _NO_MASS},
    k_labels={"labels": _K_LABELS},
    full={
        "labels": _K_LABELS,
        "temperature": _TEMPERATURES,
        "softcap": 2.5,
        "vocab_size": 5,
        "impl": "torch",
    },
    rows={"logits": _LOGITS[:16].reshape(4, 4, V), "labels": _LABELS[:16].reshape(4, 4)},
    nothing={"labels": torch.full((T,), -100)},
)


_HIDDEN, _HEAD, _BIAS = garbage(uniform(-1, 1, T, D)), uniform(-1, 1, V, D), uniform(-1, 1, V)
# Masked tokens keep a label here, one outside every vocabulary.
_DENSE = torch.where(MASK, _LABELS, 10**9)
_FROM_HIDDEN = variants(
    {"hidden": _HIDDEN, "weight": _HEAD, "labels": _LABELS},
    loss_mask={"labels": _DENSE, "loss_mask": MASK},
    both={"loss_mask": MASK & (torch.arange(T) % 2 == 0)},
    bias={"bias": _BIAS},
    temperature={"temperature": 0.7},
    temperature_tensor={"temperature": _TEMPERATURES},
    temperature_scalar_tensor={"temperature": torch.tensor(1.5, dtype=torch.float64)},
    softcap={"softcap": 1.5},
    logit_scale={"logit_scale": -0.6, "bias": _BIAS},
    vocab_size={"vocab_size": 5, "bias": put(_BIAS, 6, math.nan), "weight": garbage(_HEAD, torch.arange(V) < 5)},
    max_trained_tokens={"max_trained_tokens": 9},
    loose_bound={"max_trained_tokens": 40, "loss_mask": MASK},
    k_labels={"labels": _K_LABELS},
    full={
        "labels": _K_LABELS,
        "loss_mask": MASK & (torch.arange(T) != 2),
        "bias": _BIAS,
        "temperature": _TEMPERATURES,
        "softcap": 2.5,
        "logit_scale": 1.7,
        "vocab_size": 5,
        "max_trained_tokens": 12,
        "impl": "torch",
    },
    nothing={"loss_mask": NOTHING},
)


for _suffix, _attached in (("", ("",)), ("_and_entropy", ("logp", "entropy"))):
    TABLE[f"token_logprobs{_suffix}"] = Entry(
        gradient="attached",
        differentiable=("logits",),
        attached=_attached,
        variants=_FROM_LOGITS,
        compiled=("base", "full"),
    )
    TABLE[f"linear_token_logprobs{_suffix}"] = Entry(
        gradient="attached",
        differentiable=("hidden", "weight", "bias"),
        attached=_attached,
        variants=_FROM_HIDDEN,
        compiled=("base", "full"),
    )

# --- divergences -----------------------------------------------------------------------------------------------------

_STUDENT, _TEACHER_LOGITS = uniform(-3, 3, T, V), uniform(-3, 3, T, V)
_TAUS = uniform(0.5, 2, T)
_EXCLUDED = torch.arange(V) % 3 == 1
_WIDE_TEACHER = torch.cat([_TEACHER_LOGITS[:, :5], uniform(5, 6, T, 4)], -1)
_FORMS: dict[str, Arguments] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.2},
    "total_variation": {},
}


def _on_rows(arguments: Arguments) -> Arguments:
    """(17, ...) tensors as (4, 4, ...)."""
    return {
        k: x[:16].reshape(4, 4, *x.shape[1:]) if isinstance(x, Tensor) and x.shape[:1] == (T,) else x
        for k, x in arguments.items()
    }


for _name, _share in _FORMS.items():
    _student = {"logits": _STUDENT.masked_fill(_EXCLUDED, -math.inf)}
    _teacher = {"teacher_logits": _TEACHER_LOGITS.masked_fill(_EXCLUDED, -math.inf)}
    _base = {"logits": _STUDENT, "teacher_logits": _TEACHER_LOGITS, **_share}
    TABLE[_name] = Entry(
        gradient="attached",
        differentiable=("logits",),
        variants=variants(
            _base,
            temperature={"temperature": 0.7},
            temperature_tensor={"temperature": _TAUS},
            excluded_on_both_sides=_student | _teacher,
            **({} if _name == "reverse_kl" else {"excluded_by_the_teacher": _teacher}),
            **({} if _name == "forward_kl" else {"excluded_by_the_student": _student}),
            full={
                "logits": garbage(_STUDENT, torch.arange(V).expand(T, V) < 5),
                "teacher_logits": _WIDE_TEACHER,
                "vocab_size": 5,
                "temperature": torch.tensor(1.5, dtype=torch.float64),
                "impl": "torch",
            },
            rows=_on_rows(_base),
        ),
        compiled=("base", "full"),
    )

# Drawn from a generator of its own: the tensors below keep their values.
_BEHAVIOUR = 3 * torch.rand(T, V, generator=torch.Generator().manual_seed(19), dtype=torch.float64)
_BASELINE = {"logits": _STUDENT, "teacher_logits": _TEACHER_LOGITS, "kind": "optimal"}
_WITHOUT = {name: x.masked_fill(_EXCLUDED, -math.inf) for name, x in _BASELINE.items() if isinstance(x, Tensor)}
TABLE["reverse_kl_baseline"] = Entry(
    variants=variants(
        _BASELINE,
        value={"kind": "value"},
        behaviour={"behaviour_logits": _BEHAVIOUR},
        behaviour_that_excludes={"behaviour_logits": _BEHAVIOUR.masked_fill(_EXCLUDED, -math.inf)},
        temperature={"temperature": 0.7, "behaviour_logits": _BEHAVIOUR},
        temperature_tensor={"temperature": _TAUS},
        excluded_on_both_sides=_WITHOUT,
        excluded_by_the_student={"logits": _WITHOUT["logits"]},
        excluded_by_the_teacher={"teacher_logits": _WITHOUT["teacher_logits"]},
        value_excluded_by_the_teacher={"teacher_logits": _WITHOUT["teacher_logits"], "kind": "value"},
        certain={"logits": _STUDENT.masked_fill(torch.arange(V) != 3, -math.inf)},
        full={
            "logits": garbage(_STUDENT, torch.arange(V).expand(T, V) < 5),
            "teacher_logits": _WIDE_TEACHER,
            "behaviour_logits": _BEHAVIOUR[:, :6],
            "vocab_size": 5,
            "temperature": torch.tensor(1.5, dtype=torch.float64),
        },
        rows=_on_rows(_BASELINE | {"behaviour_logits": _BEHAVIOUR}),
    ),
    compiled=("value", "full"),
)

_IDS_OF_K = torch.rand(T, V, generator=_RANDOM).argsort(-1)[:, :4]
_LOGP_OF_K = _TEACHER_LOGITS.log_softmax(-1).gather(-1, _IDS_OF_K)
_IDS_PADDED = _IDS_OF_K.masked_fill(torch.arange(4) >= (torch.arange(T) % 5)[:, None], -1)
for _name in ("forward_kl", "reverse_kl", "generalized_jsd"):
    _base = {
        "logits": _STUDENT,
        "teacher_topk_logp": _LOGP_OF_K,
        "teacher_topk_ids": _IDS_OF_K,
        "tail": "bucket",
        **_FORMS[_name],
    }
    _padded = {"teacher_topk_logp": garbage(_LOGP_OF_K, _IDS_PADDED >= 0), "teacher_topk_ids": _IDS_PADDED}
    TABLE[f"topk_{_name}"] = Entry(
        gradient="attached",
        differentiable=("logits",),
        variants=variants(
            _base,
            renormalize={"tail": "renormalize"},
            truncate={"tail": "truncate"},
            **({} if _name == "generalized_jsd" else {"generalized": {"tail": "generalized"}}),
            temperature={"temperature": 0.7},
            **{f"padded, {tail}": _padded | {"tail": tail} for tail in ("bucket", "renormalize", "truncate")},
            full={
                "logits": torch.cat([_STUDENT, garbage(_STUDENT, NOTHING)], -1),
                "vocab_size": V,
                "teacher_topk_ids": _IDS_OF_K.int(),
                "temperature": _TAUS,
                "impl": "torch",
            },
            rows=_on_rows(_base),
        ),
        compiled=("base", "truncate", "full"),
    )

_TEACHER_HIDDEN, _TEACHER_HEAD = garbage(uniform(-1, 1, T, 4)), uniform(-1, 1, V, 4)
for _name, _share in _FORMS.items():
    TABLE[f"linear_{_name}"] = Entry(
        gradient="attached",
        differentiable=("hidden", "weight", "bias"),
        variants=variants(
            {
                "hidden": _HIDDEN,
                "weight": _HEAD,
                "teacher_hidden": _TEACHER_HIDDEN,
                "teacher_weight": _TEACHER_HEAD,
                "loss_mask": MASK,
                **_share,
            },
            bias={"bias": _BIAS},
            full={
                "bias": _BIAS,
                "teacher_weight": torch.cat([_TEACHER_HEAD, uniform(5, 6, 2, 4)]),
                "teacher_bias": uniform(-1, 1, V + 2),
                "softcap": 1.5,
                "teacher_softcap": 2.5,
                "logit_scale": -0.6,
                "teacher_logit_scale": 1.7,
                "temperature": _TEMPERATURES,
                "vocab_size": 5,
                "impl": "torch",
            },
            nothing={"loss_mask": NOTHING},
        ),
        compiled=("base", "full"),
    )

for _name in ("forward_kl", "reverse_kl", "generalized_jsd"):
    _of_k = {
        "teacher_topk_logp": garbage(_LOGP_OF_K, MASK[:, None] & (_IDS_PADDED >= 0)),
        "teacher_topk_ids": _IDS_PADDED,
    }
    _below_5 = torch.rand(T, 3, generator=_RANDOM)[:, :2].argsort(-1) + 2 * (torch.arange(T)[:, None] % 2)
    TABLE[f"linear_topk_{_name}"] = Entry(
        gradient="attached",
        differentiable=("hidden", "weight", "bias"),
        variants=variants(
            {"hidden": _HIDDEN, "weight": _HEAD, "loss_mask": MASK, "tail": "bucket"} | _of_k | _FORMS[_name],
            **{tail: {"tail": tail} for tail in ("renormalize", "truncate")},
            **({} if _name == "generalized_jsd" else {"generalized": {"tail": "generalized"}}),
            bias={"bias": _BIAS},
            full={
                "teacher_topk_logp": _TEACHER_LOGITS.log_softmax(-1).gather(-1, _below_5),
                "teacher_topk_ids": _below_5.int(),
                "bias": _BIAS,
                "softcap": 1.5,
                "logit_scale": -0.6,
                "temperature": _TEMPERATURES,
                "vocab_size": 5,
                "impl": "torch",
            },
            nothing={"loss_mask": NOTHING},
        ),
        compiled=("base", "truncate", "full"),
    )

# --- top K and samples -----------------------------------------------------------------------------------------------


def _of_samples(labels: Tensor) -> Arguments:
    """Labels with log-probs of teacher and behaviour policy, which hold garbage where they are not read."""
    kept = labels != -100
    return {
        "labels": labels,
        "teacher_logp": garbage(uniform(-4, -0.1, *labels.shape), kept),
        "old_logp": garbage(uniform(-3, -0.1, *labels.shape), kept),
    }


_SAMPLED = _of_samples(_LABELS)
_SEVERAL = _of_samples(_K_LABELS)
_BELOW_5 = torch.rand(T, 5, generator=_RANDOM).argsort(-1)[:, :2]
_SUPPORT = {
    "teacher_topk_logp": garbage(_LOGP_OF_K, MASK[:, None] & (_IDS_PADDED >= 0)),
    "teacher_topk_ids": _IDS_PADDED,
}
_SUPPORT_BELOW_5 = {
    "teacher_topk_logp": _TEACHER_LOGITS.log_softmax(-1).gather(-1, _BELOW_5),
    "teacher_topk_ids": _BELOW_5.int(),
}
_SAMPLED_CHANGES: dict[str, Arguments] = {
    "on-policy": {"old_logp": None},
    "on-policy, max_ratio": {"old_logp": None, "max_ratio": 0.5},
    "max_ratio": {"max_ratio": 0.9},
    "temperature": {"temperature": 0.7},
    "several samples": _SEVERAL,
    "nothing": {"labels": torch.full((T,), -100)},
}
_TOPK_SAMPLED = {"logits": _LOGITS} | _SAMPLED | _SUPPORT
TABLE["topk_sampled_reverse_kl"] = Entry(
    gradient="attached",
    differentiable=("logits",),
    variants=variants(
        _TOPK_SAMPLED,
        **_SAMPLED_CHANGES,
        no_mass={"logits": _NO_MASS},
        full=_SEVERAL
        | _SUPPORT_BELOW_5
        | {
            "logits": garbage(_LOGITS, torch.arange(V).expand(T, V) < 5),
            "vocab_size": 5,
            "temperature": _TEMPERATURES,
            "max_ratio": 1.5,
            "impl": "torch",
        },
        rows=_on_rows(_TOPK_SAMPLED),
    ),
    compiled=("base", "full"),
)
TABLE["linear_topk_sampled_reverse_kl"] = Entry(
    gradient="attached",
    differentiable=("hidden", "weight", "bias"),
    variants=variants(
        {"hidden": _HIDDEN, "weight": _HEAD} | _SAMPLED | _SUPPORT,
        **_SAMPLED_CHANGES,
        bias={"bias": _BIAS},
        loss_mask={"labels": _DENSE, "loss_mask": MASK},
        full=_SEVERAL
        | _SUPPORT_BELOW_5
        | {
            "loss_mask": MASK & (torch.arange(T) != 2),
            "bias": _BIAS,
            "softcap": 1.5,
            "logit_scale": -0.6,
            "temperature": _TEMPERATURES,
            "vocab_size": 5,
            "max_ratio": 1.5,
            "max_trained_tokens": 12,
            "impl": "torch",
        },
    ),
    compiled=("base", "full"),
)

_TOPK_LOGGED = {"logits": _LOGITS, "labels": _LABELS, "loss_mask": MASK} | _SUPPORT
TABLE["topk_diagnostics"] = Entry(
    variants=variants(
        _TOPK_LOGGED,
        temperature={"temperature": 0.7},
        several_samples={"labels": _K_LABELS},
        no_mass={"logits": _NO_MASS},
        ties={"logits": _LOGITS.round()},
        full=_SUPPORT_BELOW_5
        | {
            "logits": garbage(_LOGITS, torch.arange(V).expand(T, V) < 5),
            "vocab_size": 5,
            "temperature": _TEMPERATURES,
            "loss_mask": MASK & (torch.arange(T) != 2),
        },
        rows=_on_rows(_TOPK_LOGGED),
        nothing={"loss_mask": NOTHING},
        nothing_scored={"teacher_topk_ids": torch.full_like(_IDS_PADDED, -1)},
    ),
    compiled=("base", "full"),
)

# --- estimators, rewards, returns ------------------------------------------------------------------------------------

_KL = {"logp": LOGP, "teacher_logp": TEACHER, "loss_mask": MASK}
for _name in ("kl_k1", "kl_k2", "kl_k3"):
    TABLE[_name] = Entry(
        gradient="attached",
        differentiable=("logp",),
        variants=variants(_KL, rows=rows(_KL), nothing={"loss_mask": NOTHING}),
        compiled=("base",),
    )

TABLE["reverse_kl_reward"] = Entry(
    variants=variants(
        _KL, clip={"clip": 0.8}, rows=rows(_KL), excluded={"teacher_logp": EXCLUDING_TEACHER, "clip": 5.0}
    ),
    compiled=("clip",),
)

_REWARDS = {"rewards": garbage(uniform(-2, 2, T)), "loss_mask": MASK, "cu_seqlens": CU, "discount": 0.5}
TABLE["discounted_returns"] = Entry(
    variants=variants(
        _REWARDS,
        none={"discount": 0.0},
        undiscounted={"discount": 1.0},
        int32={"cu_seqlens": CU32, "discount": 0.97},
        infinite={"rewards": put(_REWARDS["rewards"], 12, -math.inf)},
    ),
    compiled=("base",),
)

# --- rewards of other divergences, which tokens, joining reward and teacher ------------------------------------------

for _name in ("forward_kl_reward", "squared_hellinger_reward", "total_variation_reward", "jsd_reward"):
    _base = _KL | ({"beta": 0.3} if _name == "jsd_reward" else {})
    TABLE[_name] = Entry(
        variants=variants(
            _base, clip={"clip": 0.4}, rows=rows(_base), excluded={"teacher_logp": EXCLUDING_TEACHER, "clip": 5.0}
        ),
        compiled=("clip",),
    )

_REGION = {
    "logp": LOGP,
    "old_logp": OLD,
    "advantages": ADVANTAGES,
    "loss_mask": MASK,
    "max_divergence": 0.05,
}
TABLE["trust_region_mask"] = Entry(
    gradient="integer",
    variants=variants(
        _REGION,
        kl={"measure": "kl", "max_divergence": 0.02},
        on_policy={"old_logp": None, "max_divergence": 0.0},
        rows=rows(_REGION),
        nothing={"loss_mask": NOTHING},
    ),
    compiled=("base", "kl"),
)
TABLE["stale_sequence_mask"] = Entry(
    gradient="integer",
    variants=variants(
        _REGION | {"cu_seqlens": CU, "old_logp": LOGP - LOG_RATIO - 0.3},
        int32={"cu_seqlens": CU32, "max_divergence": 0.4, "old_logp": LOGP + LOG_RATIO},
        nothing={"loss_mask": NOTHING},
    ),
    compiled=("base",),
)
# distinct values, ties, and garbage under the mask
_ENTROPY = trained(0.7, 1.9, 0.2, 1.1, 0.0, 2.3, 1.1, 0.9, 1.4)
_SELECTED = {"entropy": _ENTROPY, "loss_mask": MASK, "fraction": 0.2}
TABLE["top_entropy_mask"] = Entry(
    gradient="integer",
    variants=variants(
        _SELECTED,
        ties={"fraction": 0.5},
        all={"fraction": 1.0},
        none={"fraction": 0.0},
        rows=rows(_SELECTED),
        nothing={"loss_mask": NOTHING},
    ),
    compiled=("base",),
)
# 60 trained tokens in one sequence, so that the 98th percentile is not the largest
_LONG = uniform(0, 3, 2, 66)
_LONG_MASK = torch.arange(66) >= 6
TABLE["informative_token_mask"] = Entry(
    gradient="integer",
    variants=variants(
        _SELECTED | {"divergence": trained(0.1, 0.2, 0.9, 0.3, 0.3, 0.3, 1.5, 0.2, 0.1), "cu_seqlens": CU},
        half={"fraction": 0.5, "cu_seqlens": CU32},
        none={"fraction": 0.0},
        all={"fraction": 1.0},
        nothing={"loss_mask": NOTHING},
        long={
            "entropy": garbage(_LONG[0], _LONG_MASK),
            "divergence": garbage(_LONG[1], _LONG_MASK),
            "loss_mask": _LONG_MASK,
            "cu_seqlens": torch.tensor([0, 66]),
            "fraction": 0.3,
        },
    ),
    compiled=("half",),
)

_JOINED = {"kd_reward": TEACHER - LOGP, "advantages": ADVANTAGES, "loss_mask": MASK}
TABLE["gate_kd_reward"] = Entry(
    variants=variants(
        _JOINED,
        excluded={"kd_reward": EXCLUDING_TEACHER - LOGP, "advantages": ADVANTAGES.abs()},
        rows=rows(_JOINED),
        nothing={"loss_mask": NOTHING},
    ),
    compiled=("base",),
)
TABLE["modulate_advantages"] = Entry(
    variants=variants(
        _JOINED | {"mix": 0.4, "clip": 0.2},
        wide={"mix": 1.0, "clip": 0.9},
        none={"mix": 0.0},
        excluded={"kd_reward": EXCLUDING_TEACHER - LOGP},
        rows=rows(_JOINED),
        nothing={"loss_mask": NOTHING},
    ),
    compiled=("base",),
)
TABLE["prefix_weights"] = Entry(
    variants=variants(
        {"kd_reward": TEACHER - LOGP, "loss_mask": MASK, "cu_seqlens": CU, "gain": 1.5},
        int32={"cu_seqlens": CU32, "gain": 0.0},
        nothing_spent={"kd_reward": 0 * LOGP},
        nothing={"loss_mask": NOTHING},
    ),
    compiled=("base",),
)
# the same responses after prompts that are two tokens longer, in sequences that are not empty
_LONGER = LENGTHS + 2 * (LENGTHS > 0)
_LONG_CU = torch.cat([CU[:1], _LONGER.cumsum(0)])
_SOURCE = torch.cat(
    [torch.cat([torch.zeros(2 * (len(part) > 0), dtype=torch.bool), part]) for part in MASK.split(LENGTHS.tolist())]
)
_MOVE = {
    "x": garbage(uniform(-3, 0, len(_SOURCE)), _SOURCE),
    "from_mask": _SOURCE,
    "from_cu_seqlens": _LONG_CU,
    "to_mask": MASK,
    "to_cu_seqlens": CU,
    "fill": 0.5,
}
TABLE["align_responses"] = Entry(
    gradient="attached",
    differentiable=("x",),
    copies=True,
    variants=variants(
        _MOVE,
        int32={"from_cu_seqlens": _LONG_CU.int(), "to_cu_seqlens": CU32},
        trailing_axis={"x": garbage(uniform(-3, 0, len(_SOURCE), 3), _SOURCE)},
        of_integers={"x": torch.arange(len(_SOURCE)), "fill": -100},
        of_bool={"x": torch.arange(len(_SOURCE)) % 3 == 1, "fill": False},
        nothing={"from_mask": _SOURCE & ~_SOURCE, "to_mask": NOTHING},
        no_source={
            "x": uniform(0, 1, 0),
            "from_mask": _SOURCE[:0],
            "from_cu_seqlens": 0 * CU,
            "to_mask": NOTHING,
        },
    ),
    compiled=("base", "of_bool"),
)

# --- advantages and importance weights -------------------------------------------------------------------------------

# A mixed group, one of equal rewards that are not exact in binary, and one of nearly equal rewards.
_GROUPED = torch.tensor([1, 0, 0, 1, 0.1, 0.1, 0.1, 0.1, 3, 3.5, 3, -2], dtype=torch.float64)
_IDS = torch.tensor([7, -3, 7, 2**40, -3, 7, 9, 9, -3, 7, 9, 9])

_IDENTIFIED = {"group_size": None, "group_ids": _IDS}
_GROUPS = variants(
    {"rewards": _GROUPED, "group_size": 4},
    of_one={"group_size": 1},
    of_all={"group_size": 12},
    ids=_IDENTIFIED,
    ids32={"group_size": None, "group_ids": _IDS.clamp(max=8).int()},
)
TABLE["leave_one_out_advantages"] = Entry(
    variants=_GROUPS,
    compiled=("base", "ids"),
)
TABLE["group_relative_advantages"] = Entry(
    variants=_GROUPS
    | {
        "unscaled": _GROUPS["ids"] | {"scale_by_std": False},
        "eps": _GROUPS["base"] | {"eps": 0.05},
        "no_eps": _GROUPS["base"] | {"eps": 0},
    },
    compiled=("base", "ids"),
)

_FOLD = {
    "advantages": torch.where(MASK, ADVANTAGES, 0),
    "kd_reward": torch.where(MASK, TEACHER - LOGP, 0),
    "distill_loss_weight": 0.3,
}
TABLE["fold_kd_reward"] = Entry(
    variants=variants(
        _FOLD,
        rl_loss_weight={"rl_loss_weight": 0.7},
        no_rl={"rl_loss_weight": 0, "advantages": ADVANTAGES},
        no_kd={"distill_loss_weight": 0.0, "kd_reward": TEACHER},
        weight_tensor={"distill_loss_weight": torch.where(MASK, DISTILL_WEIGHTS, 0), "kd_reward": TEACHER},
        neither={"rl_loss_weight": 0, "distill_loss_weight": 0.0, "advantages": ADVANTAGES, "kd_reward": TEACHER},
        weight_scalar_tensor={"distill_loss_weight": torch.tensor(0.2, dtype=torch.float64)},
        rows=rows(_FOLD),
    ),
    compiled=("base", "weight_tensor"),
)

_OFF_POLICY = {"prox_logp": PROX, "old_logp": OLD + LOG_RATIO, "loss_mask": MASK}
TABLE["truncated_importance_weights"] = Entry(
    variants=variants(_OFF_POLICY, max_weight={"max_weight": 0.8}, rows=rows(_OFF_POLICY)),
    compiled=("base",),
)
TABLE["masked_importance_weights"] = Entry(
    variants=variants(
        _OFF_POLICY,
        min_weight={"min_weight": 0.9},
        max_weight={"max_weight": 1.1},
        untrained_fall_out={"min_weight": 1.05},
        k2={"statistic": "k2", "max_statistic": 0.1},
        k3={"statistic": "k3", "max_statistic": 0.05},
        rows=rows(_OFF_POLICY),
    ),
    compiled=("max_weight", "k3"),
)
_SEQUENCES = _OFF_POLICY | {"cu_seqlens": CU, "aggregate": "sum", "action": "truncate", "max_weight": 1.5}
TABLE["sequence_importance_weights"] = Entry(
    variants=variants(
        _SEQUENCES,
        mean={"aggregate": "mean", "min_weight": 0.9, "max_weight": 1.05},
        mask={"action": "mask", "min_weight": 0.7},
        mean_mask={"aggregate": "mean", "action": "mask", "min_weight": 0.9, "max_weight": math.inf},
        k2={"action": "mask", "statistic": "k2", "max_statistic": 0.2},
        k3={"aggregate": "mean", "action": "mask", "statistic": "k3", "max_statistic": 0.05},
        int32={"cu_seqlens": CU32, "max_weight": math.inf},
    ),
    compiled=("mask", "mean", "k2"),
)

# --- surrogates ------------------------------------------------------------------------------------------------------


def policy_loss(*, compiled: tuple[str, ...], base: Arguments, **changes: Arguments) -> Entry:
    """The entry of a surrogate or an objective: `loss` is differentiable in `logp`, everything else is detached."""
    return Entry(
        gradient="attached",
        differentiable=("logp",),
        attached=("loss",),
        variants=variants(base, **changes),
        compiled=compiled,
    )


_PG = {"logp": LOGP, "old_logp": OLD, "advantages": ADVANTAGES, "loss_mask": MASK}
_POLICIES: dict[str, Arguments] = {
    "on_policy": {"old_logp": None},
    "weights": {"weights": WEIGHTS, "advantages": SILENCED},
    "rows": rows(_PG),
    "nothing": {"loss_mask": NOTHING},
}


TABLE["importance_sampled_surrogate"] = policy_loss(
    base=_PG,
    compiled=("base", "max_ratio"),
    **_POLICIES,
    max_ratio={"max_ratio": 1.4, "weights": WEIGHTS, "advantages": SILENCED},
)
TABLE["clipped_surrogate"] = policy_loss(
    base=_PG,
    compiled=("base", "dual_clip"),
    **_POLICIES,
    clip_low={"clip_low": 0.6},
    clip_high={"clip_high": 0.28},
    clip_nothing={"clip_low": math.inf, "clip_high": math.inf},
    dual_clip={"dual_clip": 2.0, "clip_low": 0.1, "weights": WEIGHTS, "advantages": SILENCED},
)
_GSPO = _PG | {"cu_seqlens": CU}
TABLE["sequence_clipped_surrogate"] = policy_loss(
    base=_GSPO,
    compiled=("base",),
    **{name: change for name, change in _POLICIES.items() if name != "rows"},
    clip_low={"clip_low": 0.5, "cu_seqlens": CU32},
    clip_high={"clip_high": 3.0},
)
TABLE["cispo_surrogate"] = policy_loss(
    base=_PG | {"clip_high": 0.3},
    compiled=("base", "clip_low"),
    **_POLICIES,
    clip_low={"clip_low": 0.4},
    clip_high={"clip_high": 1.9, "clip_low": 1.0},
)
TABLE["sapo_surrogate"] = policy_loss(
    base=_PG,
    compiled=("base",),
    **_POLICIES,
    tau_positive={"tau_positive": 2.5},
    tau_negative={"tau_negative": 0.6},
)

# --- reductions ------------------------------------------------------------------------------------------------------

_TOKENS = {"x": _SEGMENTS["x"], "loss_mask": MASK}
TABLE["token_mean"] = Entry(
    gradient="attached",
    differentiable=("x",),
    variants=variants(_TOKENS, **NORMALIZERS, rows=rows(_TOKENS)),
    compiled=("base", "normalizer is a float tensor", "normalizer is 0"),
)
TABLE["sequence_mean"] = Entry(
    gradient="attached",
    differentiable=("x",),
    variants=variants(_SEGMENTS, **NORMALIZERS, int32={"cu_seqlens": CU32}),
    compiled=("base", "normalizer is a float tensor"),
)

# counts of this process only; tests/scale_out counts over ranks
TABLE["global_token_count"] = Entry(
    gradient="integer",
    variants=variants({"loss_mask": MASK}, nothing={"loss_mask": NOTHING}, rows={"loss_mask": MASK[:16].reshape(4, 4)}),
    compiled=("base",),
)
TABLE["global_sequence_count"] = Entry(
    gradient="integer",
    variants=variants(
        {"loss_mask": MASK, "cu_seqlens": CU}, int32={"cu_seqlens": CU32}, nothing={"loss_mask": NOTHING}
    ),
    compiled=("base",),
)

# --- objectives ------------------------------------------------------------------------------------------------------

_SFT = {"logp": LOGP, "loss_mask": MASK}
TABLE["sft_loss"] = policy_loss(
    base=_SFT,
    compiled=("base",),
    **NORMALIZERS,
    rows=rows(_SFT),
)

_BY_SEQUENCE: Arguments = {"reduction": "sequence_mean", "cu_seqlens": CU}

_RL_CHANGES: dict[str, Arguments] = {
    "prox_logp": {"prox_logp": PROX},
    "prox_logp on-policy": {"prox_logp": PROX, "old_logp": None},
    "clip_low": {"clip_low": 0.6},
    "clip_high": {"clip_high": 0.28},
    "dual_clip": {"dual_clip": 2.0, "clip_low": 0.1},
    "weights": {"weights": WEIGHTS, "advantages": SILENCED, "prox_logp": PROX},
}
_KD_CHANGES: dict[str, Arguments] = {
    "kd_mask": {"kd_mask": KD_MASK, "teacher_logp": DEAF_TEACHER},
    "kd_discount": {"kd_discount": 0.5, "cu_seqlens": CU},
    "kd_discount with a mask": {
        "kd_discount": 0.9,
        "cu_seqlens": CU32,
        "kd_mask": KD_MASK,
        "teacher_logp": DEAF_TEACHER,
        "kd_reward_clip": 0.9,
    },
    "kd_discount is 1": {"kd_discount": 1.0, **_BY_SEQUENCE},
    "kd_reward_clip": {"kd_reward_clip": 0.8, "teacher_logp": EXCLUDING_TEACHER},
    "kd_max_ratio": {"kd_max_ratio": 1.4},
    "kd_baseline": {
        "kd_baseline": garbage(uniform(-1, 1, T), KD_MASK & MASK),
        "kd_mask": KD_MASK,
        "teacher_logp": DEAF_TEACHER,
        "kd_reward_clip": 0.8,
    },
}
_SCALAR_CHANGES: dict[str, Arguments] = {
    "on_policy": {"old_logp": None},
    "sequence_mean": _BY_SEQUENCE,
    "sequence_mean with a normalizer": {**_BY_SEQUENCE, "normalizer": 4},
    **NORMALIZERS,
}


TABLE["grpo_loss"] = policy_loss(
    base=_PG,
    compiled=("base", "weights", "sequence_mean"),
    **_SCALAR_CHANGES,
    **_RL_CHANGES,
    rows=rows(_PG),
)

_KD = {"logp": LOGP, "old_logp": OLD, "teacher_logp": TEACHER, "loss_mask": MASK}
TABLE["distillation_loss"] = policy_loss(
    base=_KD,
    compiled=("base", "kd_discount with a mask", "kd_max_ratio", "kd_baseline"),
    **_SCALAR_CHANGES,
    **_KD_CHANGES,
    rows=rows(_KD),
)

_KDRL = _PG | {"teacher_logp": TEACHER, "distill_loss_weight": 0.005}
_TERMS: dict[str, Arguments] = {
    "rl_loss_weight": {"rl_loss_weight": 0.3},
    "distill_loss_weight": {"distill_loss_weight": 0.8},
    "distill_loss_weight is a tensor": {
        "distill_loss_weight": DISTILL_WEIGHTS,
        "teacher_logp": put(TEACHER, 15, -math.inf),
    },
    "distill_loss_weight is 0-dim": {"distill_loss_weight": torch.tensor(0.7, dtype=torch.float64)},
    "no RL": {"rl_loss_weight": 0, "advantages": None, "distill_loss_weight": 1.0},
    "no RL, NaN": {"rl_loss_weight": 0.0, "advantages": torch.full_like(LOGP, math.nan), "distill_loss_weight": 0.5},
    "no distillation": {"distill_loss_weight": 0, "teacher_logp": None},
    "no distillation, NaN": {"distill_loss_weight": 0.0, "teacher_logp": torch.full_like(LOGP, math.nan)},
    "direct_penalty": {"direct_penalty": True, "distill_loss_weight": 0.8},
    "direct_penalty alone": {
        "direct_penalty": True,
        "rl_loss_weight": 0.0,
        "kd_mask": KD_MASK,
        "teacher_logp": DEAF_TEACHER,
    },
    "direct_penalty, a tensor": {"direct_penalty": True, "distill_loss_weight": DISTILL_WEIGHTS},
    "all at once": {
        "prox_logp": PROX,
        "weights": WEIGHTS,
        "clip_low": 0.15,
        "clip_high": 0.28,
        "dual_clip": 2.0,
        "rl_loss_weight": 0.5,
        "distill_loss_weight": 0.2,
        "kd_mask": KD_MASK,
        "teacher_logp": DEAF_TEACHER,
        "kd_reward_clip": 0.9,
        "kd_max_ratio": 1.3,
    },
}

TABLE["kdrl_loss"] = policy_loss(
    base=_KDRL,
    compiled=("all at once", "distill_loss_weight is a tensor", "kd_discount", "direct_penalty", "no RL"),
    **_SCALAR_CHANGES,
    **_RL_CHANGES,
    **_KD_CHANGES,
    **_TERMS,
    rows=rows(_KDRL),
)
TABLE["kdrl_token_loss"] = Entry(
    gradient="attached",
    differentiable=("logp",),
    variants=variants(
        _KDRL,
        **_RL_CHANGES,
        **{name: change for name, change in _KD_CHANGES.items() if "discount" not in name},
        **_TERMS,
        on_policy={"old_logp": None},
        no_mask={"loss_mask": None}
        | {k: torch.where(MASK, x, -1) for k, x in _KDRL.items() if isinstance(x, Tensor) and k != "loss_mask"},
        rows=rows(_KDRL),
    ),
    compiled=("all at once", "distill_loss_weight is a tensor"),
)

# --- logging, schedules ----------------------------------------------------------------------------------------------

_LOGGED = {"logp": LOGP, "old_logp": OLD, "loss_mask": MASK}
TABLE["diagnostics"] = Entry(
    variants=variants(
        _LOGGED,
        on_policy={"old_logp": None},
        teacher_logp={"teacher_logp": TEACHER},
        excluded={"teacher_logp": put(EXCLUDING_TEACHER, 2, -9999.0)},
        entropy={"entropy": garbage(uniform(0, 2, T)), "teacher_logp": TEACHER},
        nothing={"loss_mask": NOTHING, "teacher_logp": TEACHER, "entropy": TEACHER},
        rows=rows(_LOGGED),
    ),
    compiled=("entropy",),
)


TABLE["schedules.constant"] = Entry(
    gradient="number",
    variants=variants({"step": 3, "value": 0.25}),
)
TABLE["schedules.linear_floor"] = Entry(
    gradient="number",
    variants=variants(
        {"step": 17}, start={"start": 2e-3}, slope={"slope": 1e-5}, floor={"floor": 4.9e-3}, late={"step": 1000}
    ),
)
TABLE["schedules.cosine"] = Entry(
    gradient="number",
    variants=variants({"step": 3, "start": 1.0, "end": 0.1, "total_steps": 10}, late={"step": 11}),
)
TABLE["schedules.switch"] = Entry(
    gradient="number",
    variants=variants({"step": 3, "before": 1.0, "after": 0.1, "at": 4}, late={"step": 4}),
)
