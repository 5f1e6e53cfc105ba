"""The vocabulary axis: its true size, the labels that index it, and the softmax over it.

Every function that takes logits starts with `prepare_logits`, which checks the arguments that these functions share and
returns what they compute from. `prepare_heads` in `head.py` does the same for hidden states.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.sharded_inputs import vocab_shard
from kdloss._distributed.vocab_shard import VocabShard

from .backend import Impl, takes_triton

IGNORE_INDEX = -100

# Arguments of the functions that take logits, for their docstrings (`_docs.py`).
LOGITS_ARGS = {
    "logits": "(..., V) of the student, of any floating dtype and any strides. Differentiable.",
    "labels": "(...,) int64, or (..., K) for K labels per row. -100 is ignored.",
    "temperature": """> 0, a number or one value per row, which the logits are divided by. It carries no gradient, and
        there is no T² factor.""",
    "softcap": "c > 0: logits become c * tanh(logits / c), before the temperature. None: no softcap.",
    "vocab_size": "the true V, where the last columns are padding: they get no mass and no gradient.",
    "shard": """the slice of the vocabulary that these logits are, where each rank holds one (`VocabShard`). Labels and
        ids always refer to the whole vocabulary. Logits that are DTensors placed `Shard(-1)` need no `shard`.""",
    "impl": """"auto" runs the Triton kernels where the tensors are on a GPU, "torch" never does, and "triton" raises
        where they cannot run.""",
    "TypeError": "a tensor has the wrong dtype, or is no tensor.",
}


class Softmax(NamedTuple):
    """How a row of logits becomes a distribution: its vocabulary, its temperature, and what computes it."""

    vocab_size: int  # V of the whole vocabulary, without padding
    local_size: int  # how many of these entries this rank holds; V without a shard
    temperature: float  # of all rows; 1 if each row has its own
    row_temperature: Tensor | None  # (...,) detached; None if all rows share one temperature
    shard: VocabShard | None
    kernels: bool  # True: the Triton kernels compute; False: torch's operations

    @classmethod
    def of(
        cls,
        vocab_size: int,
        temperature: float | Tensor = 1.0,  # or (...,)
        shard: VocabShard | None = None,
        *,
        kernels: bool = False,
    ) -> Softmax:
        """Split `temperature` into a number and a tensor, and count the entries of this rank."""
        rows = temperature.detach() if isinstance(temperature, Tensor) else None
        number = 1.0 if isinstance(temperature, Tensor) else float(temperature)
        local_size = vocab_size if shard is None else shard.local_size(vocab_size)
        return cls(vocab_size, local_size, number, rows, shard, kernels)

    def flat_temperature(self) -> Tensor | None:
        """(T,) the temperature of each row; None if all rows share one."""
        return None if self.row_temperature is None else self.row_temperature.flatten()


class Logits(NamedTuple):
    """Checked logits of the student, and of the teacher if there is one, as plain tensors."""

    student: Tensor  # (..., V), or this rank's slice of it
    teacher: Tensor | None  # likewise
    softmax: Softmax


def prepare_logits(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor | None = None,  # (..., V)
    *,
    temperature: float | Tensor,  # or (...,)
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: Impl,
) -> Logits:
    """Check the arguments that all functions of logits share, and return what they compute from."""
    if not torch.compiler.is_compiling():
        _checks.refuse_transforms("a loss of logits", logits)
    _checks.floating(logits=logits, teacher_logits=teacher_logits)
    logits, shard = vocab_shard("logits", logits, -1, shard)
    _check_axis("logits", logits)
    widths = [logits.shape[-1]]
    if teacher_logits is not None:
        teacher_logits = other_logits("teacher_logits", teacher_logits, logits, shard)
        widths.append(teacher_logits.shape[-1])
    size = true_vocab_size(vocab_size, widths, shard, teacher_name="teacher_logits")
    tau = _checks.row_temperature("logits", logits, temperature)
    kernels = takes_triton(impl, logits=logits, teacher_logits=teacher_logits)
    teacher_logits = None if teacher_logits is None else _checks.savable(teacher_logits)
    return Logits(_checks.savable(logits), teacher_logits, Softmax.of(size, tau, shard, kernels=kernels))


def other_logits(name: str, other: Tensor, logits: Tensor, shard: VocabShard | None) -> Tensor:
    """Logits of another model for the rows of `logits`, which are checked already, as a plain tensor."""
    _checks.floating(**{name: other})
    other, _ = vocab_shard(name, other, -1, shard)
    _check_axis(name, other)
    if other.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"{name} must match logits {_checks.axes(*logits.shape[:-1], 'V')}, got {tuple(other.shape)}")
    _checks.same_device("logits", logits, **{name: other})
    return other


def true_vocab_size(
    vocab_size: int | None,
    widths: list[int],  # of the student's vocabulary axis, and of the teacher's if there is one
    shard: VocabShard | None,
    *,
    teacher_name: str,
) -> int:
    """V without padding: the width that all sides share, or `vocab_size`, which may exceed no side's width."""
    if shard is not None:
        return _checked_vocab_size(vocab_size, shard.vocab_size)
    if vocab_size is None and len(set(widths)) > 1:
        student, teacher = widths
        raise ValueError(
            f"{teacher_name} must have the student's vocabulary of {student}, got {teacher}; if they differ "
            "only in padding, pass the true vocab_size"
        )
    return _checked_vocab_size(vocab_size, min(widths))


def as_columns(labels: Tensor, rows: torch.Size) -> Tensor:
    """Labels (*rows,) or (*rows, K) as (T, K); their values are not checked."""
    return labels.reshape(math.prod(rows), labels.shape[-1] if labels.ndim > len(rows) else 1)


def label_columns(labels: Tensor, rows: torch.Size, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels as (T, K) columns inside the vocabulary or -100, and a mask of those that were neither: logp is NaN."""
    columns = as_columns(labels, rows)
    outside = (columns != IGNORE_INDEX) & ((columns < 0) | (columns >= vocab_size))
    return columns.masked_fill(outside, 0), outside


def check_labels(labels: Tensor, rows: torch.Size, vocab_size: int, *, loss_mask: Tensor | None = None) -> None:
    """Raise unless labels are int64 (*rows,) or (*rows, K), and -100 or inside the vocabulary where trained on.

    A row that `loss_mask` trains has a label that is not ignored.
    """
    _checks.tensors(labels=labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, got {labels.dtype}; convert them with labels.long()")
    if labels.shape != rows and (labels.ndim != len(rows) + 1 or labels.shape[:-1] != rows):
        raise ValueError(
            f"labels must be {_checks.axes(*rows)} or {_checks.axes(*rows, 'K')}, got {tuple(labels.shape)}"
        )
    if not _checks.value_checks_allowed(labels):
        return
    bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))
    if loss_mask is not None:
        bad &= loss_mask.reshape(loss_mask.shape + (1,) * (labels.ndim - loss_mask.ndim))
    if bad.any():
        raise ValueError(
            f"labels must be {IGNORE_INDEX} (ignored) or in 0 .. {vocab_size - 1}, got {int(labels[bad][0])}"
        )
    if loss_mask is not None and (count := int((loss_mask & ~labelled(labels, rows)).sum())) > 0:
        kept = f"(labels != {IGNORE_INDEX})" + ("" if labels.shape == rows else ".any(-1)")
        raise ValueError(
            f"loss_mask must be False where labels are {IGNORE_INDEX} (ignored), got True at {count} of "
            f"{int(loss_mask.sum())} trained tokens; pass loss_mask & {kept}, or response_mask(prompt_lengths, "
            "cu_seqlens=cu_seqlens) in place of a mask at token positions, which is one position late"
        )


def labelled(labels: Tensor, rows: torch.Size) -> Tensor:
    """(*rows,) bool: whether a row has a label that is not ignored."""
    return (as_columns(labels, rows) != IGNORE_INDEX).any(-1).reshape(rows)


def _checked_vocab_size(vocab_size: int | None, width: int) -> int:
    """`vocab_size`, which must be in 1 .. width; None: the width of the vocabulary axis, padding included."""
    if vocab_size is None:
        return width
    _checks.integer(vocab_size=vocab_size)
    if not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must be in 1 .. {width}, the size of the vocabulary axis, got {vocab_size}")
    return vocab_size


def _check_axis(name: str, logits: Tensor) -> None:
    """Raise unless `logits` is a tensor (..., V) with V >= 1."""
    _checks.tensors(**{name: logits})
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must be (..., V) with V >= 1, got {tuple(logits.shape)}")
