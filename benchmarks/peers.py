"""Who takes part in a path: kdloss, plain torch, and other people's functions in one form.

Each is `f(*arguments) -> outputs`, with the arguments of `problems.build`. `labels` is -100 exactly where `loss_mask`
is False. Peers are imported here and nowhere else, when asked for; what is not installed, or cannot run on the device,
says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import KINDS, Case
from .formulas import BETA, DISTILL_WEIGHT, OURS, Formula, hidden_logps
from .problems import SEQUENCE
from .report import without_paths

PEER_BETA = {"jsd": BETA, "forward-kl": 0.0, "reverse-kl": 1.0}  # TRL's and Liger's ends of one scale


class AbsentError(Exception):
    """A peer that cannot take part, with the reason."""


@dataclass(frozen=True)
class Contender:
    """An implementation in the run."""

    name: str
    function: Formula
    ours: bool = False
    compiles: bool = False  # its first call compiles
    overwrites: bool = False  # writes into its first argument, which is therefore cloned before each call, untimed
    inputs: str = ""  # which of the path's inputs it gets


@dataclass(frozen=True)
class Entrant:
    """A contender that may turn out to be absent: `make` returns its function or raises `AbsentError`."""

    name: str
    make: Callable[[], Formula]
    options: dict[str, Any]


def contenders(
    case: Case, device: str, formulas: dict[str, Formula], absent: dict[str, str], *, compiled: bool
) -> list[Contender]:
    """Contenders of the case; those that cannot take part leave their reason in `absent`.

    `compiled=False` leaves out those whose first call compiles. `formulas` are the naive ones, by name of inputs.
    """
    found = []
    for entrant in _entrants(case, device, formulas):
        if entrant.options.get("compiles") and not compiled:
            continue
        try:
            found.append(Contender(entrant.name, entrant.make(), **entrant.options))
        except AbsentError as reason:
            absent[entrant.name] = str(reason)
    return found


def _entrants(case: Case, device: str, formulas: dict[str, Formula]) -> Iterator[Entrant]:
    """Eager plain torch comes first, because ours is held to its errors."""
    key = "tail" if case.path == "tail" else ""
    naive = formulas[key]
    yield Entrant("naive", partial(_itself, naive), {"inputs": key})
    if case.trained < 1 and case.path == "hidden":
        yield Entrant("naive, rows picked", partial(_itself, rows_picked), {})
    for name, function in OURS[case.path](case).items():
        yield Entrant(name, partial(_itself, function), {"ours": True, "inputs": key})
        if case.path in ("logits", "tail"):  # elsewhere operators hide everything from the compiler
            options = {"ours": True, "compiles": True, "inputs": key}
            yield Entrant(f"{name} compiled", partial(_compiled, function), options)
    if case.path == "tail":
        yield Entrant("gather", partial(_itself, OURS["logits"](case)["kdloss"]), {"ours": True})
    yield Entrant("naive compiled", partial(_compiled, naive), {"compiles": True, "inputs": key})
    if case.path in THEIRS:
        for name, (make, options) in THEIRS[case.path](case, device).items():
            yield Entrant(name, make, options)


def _itself(function: Formula) -> Formula:
    return function


def _compiled(function: Formula) -> Formula:
    return torch.compile(function, dynamic=False)


def rows_picked(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, ...]:
    """The naive formula on the trained rows: what a careful user writes."""
    (logp,) = hidden_logps(hidden[loss_mask], weight, labels[loss_mask], loss_mask[loss_mask])
    return (logp.new_zeros(labels.shape).masked_scatter(loss_mask, logp),)


# --- peers: {name: (function that makes it, options of its Contender)} ---------------------------------------------

Theirs = dict[str, tuple[Callable[[], Formula], dict[str, Any]]]


def load(module: str, name: str) -> Any:
    """`name` of `module`, or `AbsentError`."""
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise AbsentError(f"{module} has no {name} in this version") from None
    except ModuleNotFoundError as error:
        raise AbsentError(f"{error.name} is not installed") from None
    except Exception as error:  # an import that fails for any reason of the package's own
        reason = without_paths(f"{type(error).__name__}: {error}".split("\n", 1)[0])[:300]
        raise AbsentError(f"{module} does not import: {reason}") from None


def on_gpu(device: str, module: str, name: str) -> Any:
    if device != "cuda":
        raise AbsentError("its kernels need a GPU")
    return load(module, name)


def sequences(x: Tensor) -> Tensor:
    """(T, ...) as (B, L, ...): trainers call these functions on padded sequences."""
    length = SEQUENCE if x.shape[0] % SEQUENCE == 0 else x.shape[0]
    return x.view(-1, length, *x.shape[1:])


def their_logits(case: Case, device: str) -> Theirs:
    def trl() -> Formula:
        if case.entropy:
            both = load("trl.trainer.utils", "selective_log_softmax_and_entropy")
            return lambda logits, labels: tuple(x.flatten() for x in both(sequences(logits), sequences(labels)))
        one = load("trl.trainer.utils", "selective_log_softmax")
        return lambda logits, labels: (one(sequences(logits), sequences(labels)).flatten(),)

    def liger() -> Formula:
        ce = on_gpu(device, "liger_kernel.transformers.functional", "liger_cross_entropy")
        return lambda logits, labels: (-ce(logits, labels, reduction="none"),)

    return {"TRL": (trl, {}), **({} if case.entropy else {"Liger kernel": (liger, {"overwrites": True})})}


def their_hidden(case: Case, device: str) -> Theirs:
    entropy = case.entropy

    def trl() -> Formula:
        chunked = load("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
        width = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
        extra = ("entropy",) if entropy else ()

        def chunked_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            some = (hidden[mask], weight, None, labels[mask])
            found = chunked.apply(*some, 1.0, width, None, 1.0, extra)[: 1 + entropy]
            return tuple(x.new_zeros(labels.shape).masked_scatter(mask, x) for x in found)

        return chunked_logprobs

    def torch_ce() -> Formula:
        ce = load("torch.nn.functional", "linear_cross_entropy")
        return lambda hidden, weight, labels, mask: (-ce(hidden, weight, labels, reduction="none"),)

    def liger() -> Formula:
        module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
        scaled = on_gpu(device, module, "LigerFusedLinearScaledCrossEntropyFunction")

        def liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            out = scaled.apply(hidden, weight, labels, return_entropy=entropy)
            return (-out[0], out[1]) if entropy else (-out,)

        return liger_scaled

    def liger_chunked() -> Formula:
        chunk_forward = load("liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase").chunk_forward

        def selected(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            logp = chunk_forward(sequences(hidden), weight, sequences(labels.clamp(min=0))).flatten()
            return (torch.where(mask, logp, 0),)

        return selected

    found: Theirs = {"TRL": (trl, {}), "Liger kernel": (liger, {})}
    if not entropy:
        found |= {"torch linear CE": (torch_ce, {}), "Liger chunked": (liger_chunked, {}), **_cce(device, "none")}
    return found


def _cce(device: str, reduction: str) -> Theirs:
    """Its kernels on a GPU, its `torch_compile` form on a CPU."""
    compiles = device == "cpu"

    def make() -> Formula:
        cut = load("cut_cross_entropy", "linear_cross_entropy")
        options = {"reduction": reduction, "impl": "torch_compile" if compiles else "cce"}
        sign = -1 if reduction == "none" else 1
        return lambda hidden, weight, labels, mask: (sign * cut(hidden, weight, labels, **options),)

    return {"CCE": (make, {"compiles": compiles})}


def their_ce(case: Case, device: str) -> Theirs:
    def torch_ce() -> Formula:
        ce = load("torch.nn.functional", "linear_cross_entropy")
        chunked = load("torch.nn", "LinearCrossEntropyOptions")()
        return lambda hidden, weight, labels, mask: (ce(hidden, weight, labels, options=chunked),)

    def liger() -> Formula:
        fused = on_gpu(device, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        return lambda hidden, weight, labels, mask: (fused(hidden, weight, labels),)

    return {"torch linear CE": (torch_ce, {}), "Liger kernel": (liger, {}), **_cce(device, "mean")}


def their_grpo(case: Case, device: str) -> Theirs:
    def liger() -> Formula:
        loss = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(beta=DISTILL_WEIGHT, compiled=False)

        def grpo(
            hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, old: Tensor, teacher: Tensor, adv: Tensor
        ) -> tuple[Tensor, ...]:
            rows = [sequences(x) for x in (hidden, labels.clamp(min=0), mask)]
            options = {"ref_per_token_logps": sequences(teacher), "old_per_token_logps": sequences(old)}
            return (loss(rows[0], weight, *rows[1:], sequences(adv)[:, 0], **options)[0],)

        return grpo

    return {"Liger chunked": (liger, {})}


def their_divergence(case: Case, device: str) -> Theirs:
    def trl() -> Formula:
        jsd = load("trl.experimental.gkd.gkd_trainer", "GKDTrainer").generalized_jsd_loss
        options = {"beta": PEER_BETA[case.path], "reduction": "none"}
        return lambda logits, teacher: (jsd(logits[None], teacher[None], **options).sum(-1)[0],)

    return {"TRL": (trl, {})}


def their_linear_divergence(case: Case, device: str) -> Theirs:
    beta = PEER_BETA[case.path.removeprefix("linear-")]

    def trl() -> Formula:
        loss = load("trl.trainer.distillation_trainer", "_chunked_divergence_loss")
        return lambda h, w, teacher_h, teacher_w, mask: (
            loss(h[None], teacher_h[None], w, teacher_w, mask[None], beta)[0],
        )

    def liger() -> Formula:
        fused = on_gpu(device, "liger_kernel.transformers.functional", "liger_fused_linear_jsd")
        return lambda h, w, teacher_h, teacher_w, mask: (fused(h, w, teacher_h, teacher_w, jsd_beta=beta),)

    def liger_chunked() -> Formula:
        make = load("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
        loss = make(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
        return lambda h, w, teacher_h, teacher_w, mask: (loss(h, w, teacher_h, teacher_w, torch.where(mask, 0, -100)),)

    return {"TRL": (trl, {}), "Liger kernel": (liger, {}), "Liger chunked": (liger_chunked, {})}


THEIRS: dict[str, Callable[[Case, str], Theirs]] = {
    "logits": their_logits,
    "hidden": their_hidden,
    "ce": their_ce,
    "grpo": their_grpo,
    **dict.fromkeys(KINDS, their_divergence),
    **{f"linear-{kind}": their_linear_divergence for kind in KINDS},
}
