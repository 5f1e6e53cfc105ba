"""Inputs of every path, with their truth, and who takes part in it.

Logits are N(0, 9): with a standard deviation of 3 the largest probabilities are a few percent, so neither the softmax's
peak nor its tail is trivial. Every incoming gradient is random, so a peer that assumes ones is found out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ours, peers, truth
from .cases import FRACTIONS, TAIL_TOKENS, Case
from .contenders import Contender, Problem, Variant
from .truth import Source, Truth

LOGIT_SCALE = 3.0


def normal(*shape: int, scale: float, dtype: str, device: str, seed: int) -> Tensor:
    """Filled in place, row block by row block: no float32 copy raises the peak before memory is measured."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    step = max(1, 2**24 // max(1, out[0].numel()))
    for start in range(0, shape[0], step):
        rows = out[start : start + step]
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device).mul_(scale))
    return out


def per_token(tokens: int, device: str, seed: int) -> Tensor:
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed)).to(device)


def random_labels(case: Case, device: str) -> Tensor:
    labels = torch.randint(case.vocab, (case.tokens,), generator=torch.Generator().manual_seed(2))
    labels[0], labels[-1] = 0, case.vocab - 1  # both ends
    return labels.to(device)


def random_mask(tokens: int, fraction: float, device: str) -> Tensor:
    """Exactly `fraction` of the tokens, at random places."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[torch.randperm(tokens, generator=torch.Generator().manual_seed(3))[: max(1, round(fraction * tokens))]] = True
    return mask.to(device)


def head(case: Case, device: str) -> tuple[Tensor, Tensor]:
    hidden = normal(case.tokens, case.width, scale=1.0, dtype=case.dtype, device=device, seed=0)
    scale = LOGIT_SCALE / case.width**0.5
    weight = normal(case.vocab, case.width, scale=scale, dtype=case.dtype, device=device, seed=1)
    return hidden.requires_grad_(), weight.requires_grad_()


# --- from logits ---------------------------------------------------------------------------------------------------


def logits_problem(case: Case, device: str, with_truth: bool) -> Problem:
    return {"": _logits_variant(case, device, with_truth)}


def _logits_variant(case: Case, device: str, with_truth: bool) -> Variant:
    logits = normal(case.tokens, case.vocab, scale=LOGIT_SCALE, dtype=case.dtype, device=device, seed=0)
    logits.requires_grad_()
    labels = random_labels(case, device)
    g = per_token(case.tokens, device, 4)
    e = per_token(case.tokens, device, 5) if case.entropy else None
    upstream = (g,) if e is None else (g, e)
    if not with_truth:
        return Variant((logits, labels), (logits,), upstream)
    source = Source(logits=logits)
    known = truth.forward(source, labels)
    values = (known.logp,) if e is None else (known.logp, known.entropy)
    gradient = truth.logits_gradient(source, labels, known, g.to(source.dtype), _to(e, source.dtype))
    # the inputs are exact here, so nothing excuses an error: no torch_error
    return Variant((logits, labels), (logits,), upstream, Truth(values, (gradient,)))


def logits_contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    entropy, half = case.entropy, case.dtype != "float32"
    naive = peers.naive_logits_entropy if entropy else peers.naive_logits
    naive_units = (8.0 if half else 4.0) + (4.0 if entropy else 0.0)
    found = peers.collect({"kdloss": lambda: ours.logits(entropy=entropy)}, absent, ours=True, units=1.2)
    found.append(Contender("naive", naive, units=naive_units))
    if case.compiled:
        make = {"kdloss compiled": lambda: ours.logits(entropy=entropy)}
        found += peers.collect(make, absent, ours=True, compiled=True)
        found.append(Contender("naive compiled", naive, compiled=True))
    if entropy:
        return found + peers.collect({"TRL": peers.trl_logits_entropy}, absent, units=4.0)
    found.append(Contender("naive split", peers.split_logits))
    found += peers.collect({"TRL": peers.trl_logits}, absent, units=4.0)
    return found + peers.collect({"Liger CE": lambda: peers.liger_logits(device)}, absent, overwrites=True)


# --- from hidden states --------------------------------------------------------------------------------------------


def hidden_problem(case: Case, device: str, with_truth: bool) -> Problem:
    return {"": _hidden_variants(case, device, with_truth, (1.0,))[1.0]}


def fractions_problem(case: Case, device: str, with_truth: bool) -> Problem:
    variants = _hidden_variants(case, device, with_truth, FRACTIONS)
    return {f"{fraction:g}": variant for fraction, variant in variants.items()}


def _hidden_variants(case: Case, device: str, with_truth: bool, fractions: tuple[float, ...]) -> dict[float, Variant]:
    hidden, weight = head(case, device)
    labels = random_labels(case, device)
    g = per_token(case.tokens, device, 4)
    e = per_token(case.tokens, device, 5) if case.entropy else None
    upstream = (g,) if e is None else (g, e)
    source = Source(hidden=hidden, weight=weight) if with_truth else None
    known = truth.forward(source, labels) if source else None
    variants = {}
    for fraction in fractions:
        mask = random_mask(case.tokens, fraction, device)
        held = None
        if source and known:
            all_values = (known.logp,) if e is None else (known.logp, known.entropy)
            values = tuple(torch.where(mask, x, 0) for x in all_values)
            masked_g, masked_e = (g * mask).to(source.dtype), _to(None if e is None else e * mask, source.dtype)
            gradients = (
                truth.hidden_gradient(source, labels, known, masked_g, masked_e),
                truth.weight_gradient(source, labels, known, masked_g, masked_e),
            )
            held = Truth(values, gradients, known.torch_error)
        arguments = (hidden, weight, labels.masked_fill(~mask, -100), mask)
        variants[fraction] = Variant(arguments, (hidden, weight), upstream, held)
    return variants


def hidden_contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    entropy = case.entropy
    naive = peers.naive_hidden_entropy if entropy else peers.naive_hidden
    units = _naive_units(case)
    found = peers.collect({"kdloss": lambda: ours.hidden(entropy=entropy)}, absent, ours=True, units=1.2)
    found.append(Contender("naive", naive, units=units))
    if case.compiled:
        make = {"kdloss compiled": lambda: ours.hidden(entropy=entropy)}
        found += peers.collect(make, absent, ours=True, compiled=True)
        found.append(Contender("naive compiled", naive, compiled=True, units=4.0))
    chunked = {
        "TRL": lambda: peers.trl_hidden(entropy=entropy),
        "Liger scaled CE": lambda: peers.liger_hidden(entropy=entropy),
    }
    found += peers.collect(chunked, absent, units=1.0)
    if not entropy:
        found += peers.collect({"torch linear CE": peers.torch_linear_ce_per_token}, absent, units=units)
        found += peers.collect({"CCE": lambda: peers.cce(device, per_token=True)}, absent, units=1.0)
    return found


def fractions_contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    found = []
    for fraction in FRACTIONS:
        variant, share = f"{fraction:g}", {"variant": f"{fraction:g}", "work": fraction}
        make = {f"kdloss {variant}": lambda: ours.hidden(entropy=False)}
        found += peers.collect(make, absent, ours=True, units=1.2 * fraction, **share)
    compact, units = peers.compact_hidden, _naive_units(case)
    found.append(Contender("naive 1", peers.naive_hidden, variant="1", units=units))
    found.append(Contender("naive 0.3, by hand", compact, variant="0.3", work=0.3, units=0.3 * units))
    trl = {"TRL 0.3": lambda: peers.trl_hidden(entropy=False)}
    return found + peers.collect(trl, absent, variant="0.3", work=0.3, units=1.0)


# --- scalar losses -------------------------------------------------------------------------------------------------


def ce_problem(case: Case, device: str, with_truth: bool) -> Problem:
    arguments, leaves, source, labels, mask = _scalar_inputs(case, device, with_truth)
    one = (torch.ones((), device=device),)
    if source is None:
        return {"": Variant(arguments, leaves, one)}
    known = truth.forward(source, labels)
    g = -mask.to(source.dtype) / mask.sum()
    value = (g * known.logp).sum()
    gradients = (
        truth.hidden_gradient(source, labels, known, g, None),
        truth.weight_gradient(source, labels, known, g, None),
    )
    return {"": Variant(arguments, leaves, one, Truth((value,), gradients, _of_a_mean(known)))}


def fused_problem(case: Case, device: str, with_truth: bool) -> Problem:
    arguments, leaves, source, labels, mask = _scalar_inputs(case, device, with_truth)
    one = (torch.ones((), device=device),)
    if source is None:
        logp = 3 * per_token(case.tokens, device, 6) - 12  # of the size that log-probs have
        return {"": Variant((*arguments, *_policies(logp, device)), leaves, one)}
    known = truth.forward(source, labels)
    policies = _policies(known.logp.float(), device)
    value, g = _kdrl_truth(known.logp, *policies, mask)
    g = g.to(source.dtype)
    gradients = (
        truth.hidden_gradient(source, labels, known, g, None),
        truth.weight_gradient(source, labels, known, g, None),
    )
    return {"": Variant((*arguments, *policies), leaves, one, Truth((value,), gradients, _of_a_mean(known)))}


def _scalar_inputs(
    case: Case, device: str, with_truth: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], Source | None, Tensor, Tensor]:
    hidden, weight = head(case, device)
    labels, mask = random_labels(case, device), random_mask(case.tokens, 1.0, device)
    source = Source(hidden=hidden, weight=weight) if with_truth else None
    return (hidden, weight, labels.masked_fill(~mask, -100), mask), (hidden, weight), source, labels, mask


def _policies(logp: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """old_logp, teacher_logp, advantages. Ratios stay inside (0.88, 1.13), so that no rounding meets a clip at 20 %."""
    noise = [per_token(logp.shape[0], device, seed) for seed in (7, 8, 9)]
    return logp - 0.04 * noise[0].clamp(-3, 3), logp + 0.5 * noise[1], noise[2]


def _kdrl_truth(
    logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Value of the mean of -rho (A + w R), R = log p - log q held constant, unclipped, and its gradient in logp."""
    logp = logp.double()
    rho = torch.exp(logp - old_logp.double())
    reward = teacher_logp.double() - logp
    each = -rho * (advantages.double() + ours.DISTILL_WEIGHT * reward) * mask / mask.sum()
    return each.sum(), each  # d rho / d logp = rho


def ce_contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    found = peers.collect({"kdloss two-step": ours.ce_two_step}, absent, ours=True, units=1.2)
    found += peers.collect({"kdloss fused": ours.ce_fused}, absent, ours=True, units=1.2)
    found.append(Contender("naive", peers.naive_ce, units=_naive_units(case)))
    chunked = {
        "torch linear CE": peers.torch_linear_ce_mean,
        "Liger fused CE": lambda: peers.liger_ce(device),
        "CCE": lambda: peers.cce(device, per_token=False),
    }
    return found + peers.collect(chunked, absent, units=1.0)


def fused_contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    found = peers.collect({"kdloss two-step": ours.two_step}, absent, ours=True, units=1.2)
    found += peers.collect({"kdloss fused": ours.fused}, absent, ours=True, units=1.2)
    if case.compiled:
        make = {"kdloss two-step compiled": ours.two_step, "kdloss fused compiled": ours.fused}
        found += peers.collect(make, absent, ours=True, compiled=True)
    return found


# --- what comes after the log-probs --------------------------------------------------------------------------------


def tail_problem(case: Case, device: str, with_truth: bool) -> Problem:
    """`kdrl_loss` on 32768 log-probs, and the gather that it follows: of `case.tokens`, scaled to as many."""
    logp = (3 * per_token(TAIL_TOKENS, device, 6) - 12).requires_grad_()
    policies = _policies(logp.detach(), device)
    mask = random_mask(TAIL_TOKENS, 1.0, device)
    held = None
    if with_truth:
        value, g = _kdrl_truth(logp.detach(), *policies, mask)
        held = Truth((value,), (truth.Rows(torch.arange(TAIL_TOKENS, device=device), g),))
    tail = Variant((logp, *policies, mask), (logp,), (torch.ones((), device=device),), held)
    return {"tail": tail, "gather": _logits_variant(case, device, with_truth)}


def tail_contenders(case: Case, device: str, absent: dict[str, str]) -> list[Contender]:
    tail = {"variant": "tail", "ours": True, "work": 0.0, "units": 0.0}
    found = peers.collect({"kdrl_loss": ours.tail}, absent, **tail)
    if case.compiled:
        found += peers.collect({"kdrl_loss compiled": ours.tail}, absent, compiled=True, **tail)
    gather = {"gather": lambda: ours.logits(entropy=False)}
    return found + peers.collect(
        gather, absent, variant="gather", ours=True, units=1.2, work=0.0, scale=TAIL_TOKENS / case.tokens
    )


def _of_a_mean(known: truth.Forward) -> float:
    """The error of a mean over tokens whose own errors are independent: three standard deviations at the most."""
    return 3 * known.torch_error / math.sqrt(known.logp.shape[0])


def _naive_units(case: Case) -> float:
    """Logits, their float32 copy, log-softmax, its gradient, and the logits' gradient."""
    return 9.0 if case.dtype != "float32" else 4.0


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
