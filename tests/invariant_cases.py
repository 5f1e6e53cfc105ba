"""A table of the functions on packed batches, for `test_invariants.py` and `test_hostile_inputs.py`.

A case says which fields of a `PackedBatch` a function takes, and which options hypothesis may draw. `evaluate` calls
the function, sorts its results by axis (per token, per sequence, scalar), and adds the gradient with respect to `logp`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import kdloss
from kdloss.testing.strategies import PackedBatch


class Field(NamedTuple):
    """Stands for a per-token field of the batch."""

    name: str


Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """How a public function is called on a batch."""

    function: Callable[..., Any]
    positional: tuple[str, ...]  # fields of the batch
    axis: str  # of the result where that is a tensor: "token", "sequence" or "scalar"
    attached: bool  # whether the result is differentiable in logp
    options: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    keywords: tuple[str, ...] = ("loss_mask",)

    @property
    def name(self) -> str:
        return self.function.__name__

    def structured(self, options: Options) -> bool:
        """Whether the call needs sequences, and so a flat stream."""
        return "cu_seqlens" in self.keywords or options.get("reduction") == "sequence_mean" or "kd_discount" in options

    def reduced(self, options: Options) -> str:
        """The axis that a mean runs over: "token" or "sequence"."""
        return "sequence" if "sequence_mean" in (self.name, options.get("reduction")) else "token"


@dataclass(frozen=True)
class Outcome:
    tokens: dict[str, Tensor]  # (T,) each
    sequences: dict[str, Tensor]  # (B,) each
    scalars: dict[str, Tensor]  # () each
    gradient: Tensor  # (T,) with respect to logp; zeros where nothing is differentiable


def choice(*values: Any) -> tuple[Any, ...]:
    return values


# No ratio exp(k / 64 n), n < 7, is within rounding of these bounds, so flags do not depend on the order of a sum.
ON_POLICY = {"old_logp": choice(Field("old_logp"), None)}
WEIGHTS = {"weights": choice(None, Field("weights"))}
CLIP = {"clip_low": choice(0.0, 0.2), "clip_high": choice(0.0, 0.28)}
REDUCTION = {"reduction": choice("token_mean", "sequence_mean")}
GRPO = {"prox_logp": choice(None, Field("prox_logp")), "dual_clip": choice(None, 1.5, 3.0)} | CLIP | WEIGHTS
KD = {
    "kd_mask": choice(None, Field("kd_mask")),
    "kd_reward_clip": choice(None, 0.7),
    "kd_max_ratio": choice(None, 0.6, 2.0),
}
BASELINE = {"kd_baseline": choice(Field("advantages"))}
DISCOUNT = {"kd_discount": choice(0.0, 0.5, 0.9, 1.0)}
KDRL = {
    "rl_loss_weight": choice(0, 1.0, -0.3),
    "distill_loss_weight": choice(0, 0.005, 1.0, Field("weights")),
}
SURROGATE = ("logp", "old_logp", "advantages")
OBJECTIVE = ("logp", "old_logp", "teacher_logp", "advantages")
WITH_SEQUENCES = ("loss_mask", "cu_seqlens")

CASES = (
    Case(kdloss.kl_k1, ("logp", "teacher_logp"), "token", True),
    Case(kdloss.kl_k2, ("logp", "teacher_logp"), "token", True),
    Case(kdloss.kl_k3, ("logp", "teacher_logp"), "token", True),
    Case(kdloss.reverse_kl_reward, ("logp", "teacher_logp"), "token", False, {"clip": choice(None, 0.7)}),
    Case(kdloss.forward_kl_reward, ("logp", "teacher_logp"), "token", False, {"clip": choice(None, 0.7)}),
    Case(
        kdloss.jsd_reward,
        ("logp", "teacher_logp"),
        "token",
        False,
        {"beta": choice(0.5, 0.1, 0.9), "clip": choice(None, 0.7)},
    ),
    Case(kdloss.squared_hellinger_reward, ("logp", "teacher_logp"), "token", False, {"clip": choice(None, 0.7)}),
    Case(kdloss.total_variation_reward, ("logp", "teacher_logp"), "token", False, {"clip": choice(None, 0.3)}),
    Case(
        kdloss.discounted_returns,
        ("advantages",),
        "token",
        False,
        {"discount": choice(0, 0.5, 0.9, 1.0)},
        WITH_SEQUENCES,
    ),
    Case(
        kdloss.truncated_importance_weights, ("prox_logp", "old_logp"), "token", False, {"max_weight": choice(0.5, 2.0)}
    ),
    Case(
        kdloss.masked_importance_weights,
        ("prox_logp", "old_logp"),
        "token",
        False,
        {"min_weight": choice(0.0, 0.5), "max_weight": choice(0.6, 5.0)},
    ),
    Case(
        kdloss.masked_importance_weights,
        ("prox_logp", "old_logp"),
        "token",
        False,
        {"statistic": choice("k2", "k3"), "max_statistic": choice(0.1, 2.0)},
    ),
    Case(
        kdloss.sequence_importance_weights,
        ("prox_logp", "old_logp"),
        "token",
        False,
        {
            "aggregate": choice("sum", "mean"),
            "action": choice("truncate", "mask"),
            "min_weight": choice(0.0, 0.5),
            "max_weight": choice(2.0, torch.inf),
        },
        WITH_SEQUENCES,
    ),
    Case(
        kdloss.sequence_importance_weights,
        ("prox_logp", "old_logp"),
        "token",
        False,
        {
            "aggregate": choice("sum", "mean"),
            "action": choice("mask"),
            "max_weight": choice(torch.inf),
            "statistic": choice("k2", "k3"),
            "max_statistic": choice(0.1, 2.0),
        },
        WITH_SEQUENCES,
    ),
    Case(
        kdloss.trust_region_mask,
        SURROGATE,
        "token",
        False,
        ON_POLICY | {"max_divergence": choice(0.0, 0.1, 0.3), "measure": choice("tv", "kl")},
    ),
    Case(kdloss.stale_sequence_mask, SURROGATE, "token", False, {"max_divergence": choice(0.1, 0.5)}, WITH_SEQUENCES),
    Case(kdloss.gate_kd_reward, ("logp", "advantages"), "token", False),
    Case(
        kdloss.modulate_advantages,
        ("advantages", "logp"),
        "token",
        False,
        {"mix": choice(0.0, 0.5, 1.0), "clip": choice(0.2, 0.9)},
    ),
    Case(kdloss.prefix_weights, ("logp",), "token", False, {"gain": choice(0.0, 1.5)}, WITH_SEQUENCES),
    Case(
        kdloss.informative_token_mask,
        ("entropy", "logp"),
        "token",
        False,
        {"fraction": choice(0.0, 0.2, 0.5, 1.0)},
        WITH_SEQUENCES,
    ),
    Case(
        kdloss.importance_sampled_surrogate,
        SURROGATE,
        "token",
        True,
        ON_POLICY | WEIGHTS | {"max_ratio": choice(None, 0.6, 2.0)},
    ),
    Case(
        kdloss.clipped_surrogate,
        SURROGATE,
        "token",
        True,
        ON_POLICY | WEIGHTS | CLIP | {"dual_clip": choice(None, 1.5)},
    ),
    Case(kdloss.sequence_clipped_surrogate, SURROGATE, "token", True, ON_POLICY | WEIGHTS | CLIP, WITH_SEQUENCES),
    Case(
        kdloss.cispo_surrogate,
        SURROGATE,
        "token",
        True,
        ON_POLICY | WEIGHTS | {"clip_low": choice(None, 0.0, 0.2), "clip_high": choice(0.0, 0.28)},
    ),
    Case(
        kdloss.sapo_surrogate,
        SURROGATE,
        "token",
        True,
        ON_POLICY | WEIGHTS | {"tau_positive": choice(1.0, 3.0), "tau_negative": choice(0.5, 1.05)},
    ),
    Case(kdloss.segment_sum, ("logp",), "sequence", True, {}, WITH_SEQUENCES),
    Case(kdloss.segment_mean, ("logp",), "sequence", True, {}, WITH_SEQUENCES),
    Case(kdloss.token_mean, ("logp",), "scalar", True),
    Case(kdloss.sequence_mean, ("logp",), "scalar", True, {}, WITH_SEQUENCES),
    Case(kdloss.sft_loss, ("logp",), "scalar", True),
    Case(kdloss.grpo_loss, SURROGATE, "scalar", True, ON_POLICY | GRPO | REDUCTION),
    Case(
        kdloss.distillation_loss,
        ("logp", "old_logp", "teacher_logp"),
        "scalar",
        True,
        ON_POLICY | KD | DISCOUNT | REDUCTION,
    ),
    Case(kdloss.kdrl_loss, OBJECTIVE, "scalar", True, ON_POLICY | GRPO | KD | DISCOUNT | KDRL | REDUCTION),
    Case(kdloss.kdrl_token_loss, OBJECTIVE, "token", True, ON_POLICY | GRPO | KD | KDRL),
    Case(kdloss.kdrl_token_loss, OBJECTIVE, "token", True, ON_POLICY | KD | KDRL | BASELINE),
    Case(kdloss.distillation_loss, OBJECTIVE[:3], "scalar", True, ON_POLICY | KD | BASELINE | REDUCTION),
    # the literal joint form of kdrl_loss, which has no reward and takes none of its options
    Case(
        kdloss.kdrl_loss,
        OBJECTIVE,
        "scalar",
        True,
        ON_POLICY | GRPO | KDRL | REDUCTION | {"kd_mask": KD["kd_mask"], "direct_penalty": choice(True)},
    ),
    Case(
        kdloss.diagnostics,
        ("logp", "old_logp"),
        "scalar",
        False,
        ON_POLICY | {"teacher_logp": choice(None, Field("teacher_logp")), "entropy": choice(None, Field("entropy"))},
    ),
)


def case_name(case: Case) -> str:
    further = [name for name in ("direct_penalty", "statistic") if name in case.options]
    return "_".join([case.name, *further])


def options(case: Case, *, structure: bool = True) -> st.SearchStrategy[Options]:
    """All options of a call of the case; without `structure`, only those that need no sequences."""
    choices = {
        name: values for name, values in case.options.items() if structure or name not in ("kd_discount", "reduction")
    }

    def decode(index: int) -> Options:
        chosen = {}
        for name, values in choices.items():
            index, digit = divmod(index, len(values))
            chosen[name] = values[digit]
        return chosen

    # one number encodes the whole combination: drawing options one by one takes longer than the loss
    return st.integers(0, math.prod(map(len, choices.values())) - 1).map(decode)


def evaluate(
    case: Case,
    batch: PackedBatch,
    options: Options,
    *,
    normalizer: float | Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> Outcome:
    """Value and gradient on a batch, all flat; with `shape`, per-token tensors go in as (B, L).

    For the gradient, per-token and per-sequence losses are summed with factors that belong to the tokens (`entropy`)
    and the sequences (`rewards`), so that a gradient on the wrong token is noticed.
    """
    logp = batch.logp.clone().requires_grad_()

    def resolve(name: str) -> Tensor:
        x: Tensor = logp if name == "logp" else getattr(batch, name)
        return x if shape is None or name == "cu_seqlens" else x.reshape(shape)

    given = {name: resolve(x.name) if isinstance(x, Field) else x for name, x in options.items()}
    arguments = [given.pop(name, resolve(name)) for name in case.positional]
    keywords = {name: resolve(name) for name in case.keywords}
    if case.structured(options):
        keywords["cu_seqlens"] = batch.cu_seqlens
    if normalizer is not None:
        keywords["normalizer"] = normalizer
    with warnings.catch_warnings():
        if "direct_penalty" in options:
            warnings.filterwarnings("ignore", message="direct_penalty=True descends", category=UserWarning)
        result = case.function(*arguments, **given, **keywords)

    tokens, sequences, scalars = {}, {}, {}
    if isinstance(result, Tensor):
        {"token": tokens, "sequence": sequences, "scalar": scalars}[case.axis]["loss"] = result
    else:
        named = result if isinstance(result, dict) else result._asdict()
        for name, x in named.items():
            (scalars if x.ndim == 0 else tokens)[name] = x
    tokens = {name: x.reshape(-1) for name, x in tokens.items()}

    if case.axis == "token":
        upstream = torch.where(batch.loss_mask, batch.entropy, 0)
        total = torch.where(batch.loss_mask, tokens["loss"] * upstream, 0).sum()
    elif case.axis == "sequence":
        total = (sequences["loss"] * batch.rewards).sum()
    else:
        total = scalars.get("loss", torch.zeros(()))
    assert total.requires_grad == case.attached, f"{case.name} is {'' if total.requires_grad else 'not '}differentiable"
    (gradient,) = torch.autograd.grad(total, logp) if case.attached else (torch.zeros_like(logp),)
    return Outcome(
        *({name: x.detach() for name, x in group.items()} for group in (tokens, sequences, scalars)), gradient
    )
