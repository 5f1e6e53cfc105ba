"""How a loss is called on a tree, and which losses are refused because no expected gradient can be enumerated.

A per-token loss is called once, on the stream of all sequences. This gives its expected gradient only if no sequence
changes the loss of another. Neither a per-token nor a scalar loss may change from one call to the next.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ._sequence_tree import SequenceTree, TokenBatch

_LARGER = (2, 3, 4, 8)  # sequences of the batches that are tried if `batch_size` seems too small
_COUPLED = (
    "the per-token loss couples the sequences of a batch: {}. Its expected gradient then depends on the batch. Return "
    "the scalar that is trained, summed and divided in the loss, and pass its batch_size"
)
_SMALL_TREE = "SequenceTree(vocab_size=2, max_length=3, eos=0)"  # four sequences, of three lengths
_TOLERANCE = "Differences below {:.0e} of the largest value or of the gradient count as rounding"


# An enumeration calls one loss hundreds of times, and reading a signature takes longer than a small loss.
_READ: WeakKeyDictionary[Callable[..., Any], Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def loss_parameters(loss: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a loss; those of `forward` for a module, whose `__call__` takes anything.

    The signatures of functions and partial functions are kept, because they do not change between calls.
    """
    if not isinstance(loss, (FunctionType, functools.partial)):
        return _parameters(loss)
    if loss not in _READ:
        _READ[loss] = _parameters(loss)
    return _READ[loss]


def _parameters(loss: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    if isinstance(loss, torch.nn.Module):
        # torch.compile wraps a module in another, whose `forward` takes anything as well
        return inspect.signature(getattr(loss, "_orig_mod", loss).forward).parameters
    if isinstance(loss, functools.partial) and isinstance(loss.func, torch.nn.Module):
        loss = functools.partial(loss.func.forward, *loss.args, **loss.keywords)
    try:
        return inspect.signature(loss).parameters
    except ValueError as error:
        raise TypeError(f"the loss has no signature to read: name its arguments in a function ({error})") from error


def takes(loss: Callable[..., Any], *names: str) -> bool:
    """Whether a loss is called with one of these fields of a batch."""
    parameters = loss_parameters(loss).values()
    return any(p.name in names or p.kind is p.VAR_KEYWORD for p in parameters)


def call_by_name(loss: Callable[..., Any], batch: TokenBatch, normalizer: float | None) -> Tensor:
    """Call a loss with the fields of a batch that it names; of a result with a field `loss`, return that."""
    offered = batch.named()
    if normalizer is not None:
        offered["normalizer"] = normalizer
    parameters = loss_parameters(loss).values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = offered
    else:
        arguments = {p.name: offered[p.name] for p in parameters if p.name in offered}
        needed = (p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL)
        missing = [p.name for p in needed if p.name not in offered]
        if missing:
            ways_out = _ways_out(missing, [name for name in offered if name not in arguments])
            raise TypeError(
                f"the loss needs {', '.join(missing)}, which a batch does not have; it has {[*offered]}; {ways_out}"
            )
    # by name, except for positional-only parameters
    positional = [arguments.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    result = loss(*positional, **arguments)
    value = getattr(result, "loss", result)
    shape = tuple(batch.logp.shape)
    if not isinstance(value, Tensor):
        raise ValueError(f"the loss must return a tensor (T,) = {shape} or (), got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"the loss must return floating-point values, got {value.dtype}")
    if value.ndim != 0 and value.shape != batch.logp.shape:
        raise ValueError(f"the loss must return (T,) = {shape} or (), got {tuple(value.shape)}")
    return value


def _ways_out(missing: list[str], free: list[str]) -> str:
    """How a loss gets the arguments that a batch does not have. `free` are the fields that it does not take yet."""
    renamed, bound = [], []
    for name in missing:
        field = _close_name(name, free)
        if field is None:
            bound.append(f"{name}=1.0")
        else:
            free = [other for other in free if other != field]
            renamed.append(f"rename {name} to {field}")
    said = []
    if renamed:
        said.append(", ".join(renamed) + ", or wrap the loss in a function that has these names")
    if bound:
        said.append(f"bind a number with functools.partial(loss, {', '.join(bound)})")
    return "; ".join(said)


def _close_name(name: str, offered: list[str]) -> str | None:
    """The field of a batch that is meant by another name for it: `teacher_logprobs`, `mask`, `reward`."""
    name = re.sub(r"log_?p(rob)?s?$", "logp", name).removeprefix("student_")
    name = "loss_mask" if name.endswith("mask") else re.sub("^ref(erence)?_", "teacher_", name)
    return next(iter(difflib.get_close_matches(name, offered, n=1, cutoff=0.85)), None)


def student_gradient(scalar: Tensor, tree: SequenceTree) -> Tensor:
    """(N, V) d scalar / d student logits. The graph is kept, because several scalars may share it."""
    gradient = connected_gradient(scalar, tree)
    return torch.zeros_like(tree.student) if gradient is None else gradient


def connected_gradient(scalar: Tensor, tree: SequenceTree) -> Tensor | None:
    """The same, and None if the scalar is not connected to the student's logits."""
    if not scalar.requires_grad:
        return None
    gradient: Tensor | None
    (gradient,) = torch.autograd.grad(scalar, tree.student, allow_unused=True, retain_graph=True)
    return gradient


def whole_batch(tree: SequenceTree, under: str) -> TokenBatch:
    """Every sequence of the tree, in one stream."""
    return tree.batch(range(len(tree.sequences)), under=under)


def loss_value(
    loss: Callable[..., Any], tree: SequenceTree, under: str, batch_size: int, normalizer: float | None
) -> Tensor:
    """() for a scalar loss, of one batch of `batch_size` sequences; (T,) for a per-token loss, of all sequences."""
    first = _rotated(tree, 0, batch_size)
    try:
        value = call_by_name(loss, tree.batch(first, under=under), normalizer)
    except Exception as error:
        larger = larger_batch(loss, tree, under, first, normalizer)
        if larger is None:
            raise
        raise ValueError(
            f"the loss fails on a batch of {batch_size} and not on one of {larger}. If it compares the sequences of a "
            f"batch, return a scalar and pass batch_size={larger}. It fails with: {error}"
        ) from error
    if value.ndim == 0:
        return value
    try:
        return call_by_name(loss, whole_batch(tree, under), normalizer)
    except Exception as error:
        raise ValueError(_COUPLED.format(f"it fails on all sequences of the tree in one stream: {error}")) from error


def larger_batch(
    loss: Callable[..., Any],
    tree: SequenceTree,
    under: str,
    batch: Sequence[int],
    normalizer: float | None,
) -> int | None:
    """The size of the smallest larger batch, of which `batch` is a part, that has a finite loss and gradient."""
    others = [i for i in range(len(tree.sequences)) if i not in batch]
    for size in _LARGER:
        more = size - len(batch)
        if 0 < more <= len(others):
            larger = tree.batch([*batch, *others[:more]], under=under)
            try:
                value = call_by_name(loss, larger, normalizer)
            except Exception:  # any error of the loss: this size is not what it needs
                continue
            total = value if value.ndim == 0 else value[larger.loss_mask].sum()
            gradient = student_gradient(total, tree)
            if bool(total.isfinite() & gradient.isfinite().all()):
                return size
    return None


def not_finite_text(
    loss: Callable[..., Any], tree: SequenceTree, under: str, batch: Sequence[int], normalizer: float | None
) -> str:
    """What to say of a loss whose value is NaN, or whose gradient is not finite, on a batch."""
    larger = larger_batch(loss, tree, under, batch, normalizer) if len(batch) == 1 else None
    if larger is not None:
        return (
            "the loss or its gradient is not finite on a batch of one sequence, and finite on one of "
            f"{larger}. If it compares the sequences of a batch (the standard deviation of a group), pass "
            f"batch_size={larger}"
        )
    equal = len(batch) > 1 and bool((tree.rewards[list(batch)] == tree.rewards[batch[0]]).all())
    return (
        "the loss or its gradient is not finite. Either the loss reads untrained positions, which hold NaN: take an "
        "argument loss_mask and select with x[loss_mask] or torch.where(loss_mask, x, 0) before anything else (x * "
        "loss_mask stays NaN, because NaN * 0 is NaN), or audit it on a tree with garbage=0.0. Or it is infinite at "
        "this tree's policies"
        + (". Or it divides by the standard deviation of equal rewards, which is 0: add an epsilon" if equal else "")
    )


def checked_value(
    loss: Callable[..., Any],
    tree: SequenceTree,
    under: str,
    batch_size: int,
    normalizer: float | None,
    rtol: float,
    most: int,
) -> Tensor:
    """`loss_value`; refuses a loss that is stochastic or changes its batch, and a per-token loss that couples it.

    A scalar loss of more than `most` batches is refused as well, before these are called.

    Every sequence is in one of the batches that are called twice, alone if the loss is per token. Then a per-token loss
    is called on all sequences in one stream. Values and gradients are compared, see `_difference`.
    """
    value = loss_value(loss, tree, under, batch_size, normalizer)
    per_token = value.ndim == 1
    if not per_token:
        _check_count(len(tree.sequences), batch_size, most)
    size = 1 if per_token else batch_size
    once, twice = [], []
    for start in range(len(tree.sequences)):
        batch = tree.batch(_rotated(tree, start, size), under=under)
        versions = {name: field._version for name, field in batch.named().items()}
        values = []
        for _ in range(2):
            try:
                values.append(call_by_name(loss, batch, normalizer))
            except Exception as error:
                if not per_token:
                    raise
                raise ValueError(_COUPLED.format(f"it fails on a sequence alone: {error}")) from error
            changed = [name for name, field in batch.named().items() if field._version != versions[name]]
            if changed:
                raise ValueError(
                    f"the loss changes {', '.join(changed)} in place, so another call with the same batch gives "
                    "another loss, and so may another loss of the same batch: write to a copy"
                )
        one, other = (v[batch.loss_mask] if per_token else v.reshape(1) for v in values)
        once.append(one)
        twice.append(other)

    alone = torch.cat(once)
    difference = _difference(alone, torch.cat(twice), tree, rtol)
    if difference is not None:
        raise ValueError(
            "the loss is stochastic, keeps a state or writes to its arguments: called twice with the same batch, its "
            f"{difference.format('in the first call', 'in the second')}. So no expected gradient can be enumerated. "
            f"Take out what is random (dropout, sampling), with module.eval() for a module. {_TOLERANCE.format(rtol)}"
        )
    if per_token:
        together = value[whole_batch(tree, under).loss_mask]
        difference = _difference(alone, together, tree, rtol)
        if difference is not None:
            found = f"its {difference.format('for a sequence alone', 'beside the others')}"
            raise ValueError(f"{_COUPLED.format(found)}. {_TOLERANCE.format(rtol)}")
    return value


def _check_count(sequences: int, batch_size: int, most: int) -> None:
    """Refuse `sequences` ** `batch_size` batches if these are more than `most`. One a batch is never refused."""
    digits = batch_size * math.log10(sequences)  # an int of a large batch would take long
    if batch_size == 1 or digits <= math.log10(most) + 1e-9:
        return

    def largest(sequences: int) -> int:
        return int(math.log10(most) / math.log10(sequences) + 1e-9)

    count = f"{sequences**batch_size:,}" if digits < 9 else f"about 1e{int(digits)}"
    smaller = f"pass batch_size={largest(sequences)}, or take" if largest(sequences) > 1 else "take"
    raise ValueError(
        f"a scalar loss is called on every batch, and {batch_size} of the tree's {sequences} sequences make {count} "
        f"batches, more than {most:,}: {smaller} a smaller tree. {_SMALL_TREE} allows batch_size={largest(4)}. Where "
        "only the denominator couples the sequences, a fixed one (normalizer=1) needs no more than batch_size=1"
    )


def couples_pairs(
    loss: Callable[..., Any],
    tree: SequenceTree,
    under: str,
    normalizer: float | None,
    *,
    times_tokens: bool = False,
) -> bool:
    """Whether the gradient of a scalar loss of two sequences is other than a multiple of the sum of those of each.

    With `times_tokens`, of the loss times the number of trained tokens of its batch.
    """

    def gradients(size: int) -> Tensor:
        each = []
        for start in range(len(tree.sequences)):
            batch = tree.batch(_rotated(tree, start, size), under=under)
            factor = batch.loss_mask.sum() if times_tokens else 1
            each.append(student_gradient(factor * call_by_name(loss, batch, normalizer), tree).flatten())
        return torch.stack(each)

    try:
        alone, pairs = gradients(1), gradients(2)
    except Exception:  # a loss for one sequence
        return False
    parts = alone + alone.roll(-1, 0)
    factor = (parts * pairs).sum() / parts.square().sum().clamp(min=1e-30)  # 1 for a sum, 1/2 for a mean
    # NaN is no multiple either
    return not float((pairs - factor * parts).norm()) <= max(1e-3 * float(pairs.norm()), 1e-9)


def _difference(one: Tensor, other: Tensor, tree: SequenceTree, rtol: float) -> str | None:
    """Where two evaluations of the same values differ by more than rounding, in value or in gradient.

    Rounding is `rtol` of the largest value, and of the norm of the gradient. It is also 64 ulp of 1 (at most `rtol`),
    which is the size of a log-prob, because a loss may be the difference of two nearly equal log-probs. The gradient is
    that of a sum with random weights, in which no differences cancel.
    """
    floor = min(64 * torch.finfo(one.dtype).eps, rtol)
    values = torch.stack([one.detach().double(), other.detach().double()])
    finite = values.isfinite().all(0)
    largest = float(values[:, finite].abs().max()) if bool(finite.any()) else 0.0
    equal = torch.isclose(values[0], values[1], rtol=0, atol=max(rtol * largest, floor), equal_nan=True)
    if not bool(equal.all()):
        # the largest difference; where one of the two is not finite, that is the one to show
        worst = int((values[0] - values[1]).abs().nan_to_num(torch.inf).where(~equal, -1.0).argmax())
        a, b = (f"{v:.6g}" for v in values[:, worst].tolist())
        return f"value is {a} {{}} and {b} {{}}"

    weights = 0.5 + torch.rand(one.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (student_gradient((weights * v)[finite].sum(), tree) for v in (one, other))
    size = max(float(first.norm()), float(second.norm()))
    apart = float((first - second).norm())
    if apart > max(rtol * size, floor):
        return f"gradient {{}} and {{}} is {apart / size:.1e} apart"
    return None


def _rotated(tree: SequenceTree, start: int, size: int) -> list[int]:
    """`size` sequences from `start` on, beginning again after the last."""
    return [(start + i) % len(tree.sequences) for i in range(size)]
