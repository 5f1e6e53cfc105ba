"""The output head: its checks, its dtype under autocast, and its products with rows of hidden states.

Every function that takes hidden states starts with `prepare_heads`. A half-precision head is widened one slice at a
time, because a float32 copy of the whole head may be larger than the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.sharded_inputs import head_shard
from kdloss._distributed.vocab_shard import VocabShard

from .backend import Impl, takes_triton
from .products import add_product_, product_, rounds_gradient
from .vocabulary import LOGITS_ARGS, Softmax, true_vocab_size

# Entries of a half-precision head that are widened at a time: 16 MiB of float32.
_SLICE_ENTRIES = 2**22

# Arguments of the functions that take hidden states and a head, for their docstrings (`_docs.py`).
HEAD_ARGS = {
    "hidden": """(T, D) hidden states of the student at prediction positions; any leading shape in place of T.
        Differentiable. Inside `torch.autocast`, hidden states, weights and biases are cast as a linear layer casts
        them, and the logits stay float32.""",
    "weight": "(V, D) the student's output head, of any floating dtype. Differentiable.",
    "bias": "(V,) bias of the student's head. Differentiable. None: no bias.",
    "labels": "(T,) int64, or (T, K) for K labels per row. -100 is ignored.",
    "loss_mask": """(T,) bool, True where a token is trained on. None: every row that has a label. A True where every
        label of the row is -100 raises on the CPU; elsewhere the row has log-prob 0 without gradient, and counts in a
        mean over the mask.""",
    "temperature": """> 0, a number or (T,); logits are divided by it after `bias`, `logit_scale` and `softcap`, in that
        order. It carries no gradient, and there is no T² factor.""",
    "softcap": "c > 0: the student's logits become c * tanh(logits / c). None: no softcap.",
    "logit_scale": "finite factor of the student's logits, applied before the softcap.",
    "vocab_size": "the true V, where the last rows of the head are padding: they get no mass and no gradient.",
    "shard": """the slice of the vocabulary that weights and biases are, where each rank holds one (`VocabShard`).
        Hidden states, labels, mask and the incoming gradient are the same on every rank, and the gradient of `hidden`
        is summed over the ranks. A DTensor head beside DTensor hidden states needs no `shard`.""",
    "max_trained_tokens": """a static bound on the number of trained tokens, which avoids the device sync. More trained
        tokens than this raise on the CPU and give NaN elsewhere.""",
    "impl": LOGITS_ARGS["impl"],
    "teacher_hidden": "(T, D') hidden states of the teacher at the same positions, of any width. Detached.",
    "teacher_weight": "(V, D') the teacher's output head, of any floating dtype. Detached.",
    "teacher_bias": "(V,) bias of the teacher's head. Detached. None: no bias.",
    "teacher_softcap": "softcap of the teacher's logits. None: no softcap.",
    "teacher_logit_scale": "finite factor of the teacher's logits, applied before its softcap.",
    "TypeError": LOGITS_ARGS["TypeError"],
}


class Head(NamedTuple):
    """logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def without_padding(self, vocab_size: int) -> Head:
        """This head with only its first `vocab_size` rows."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return self._replace(weight=self.weight[:vocab_size], bias=bias)


class Heads(NamedTuple):
    """Checked heads of the student, and of the teacher if there is one: plain tensors, hidden states (T, D)."""

    student: Head
    teacher: Head | None
    softmax: Softmax
    shape: torch.Size  # leading shape of the hidden states, which was flattened to T


def prepare_heads(
    student: Head,
    teacher: Head | None = None,
    *,
    loss_mask: Tensor | None,
    temperature: float | Tensor,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: Impl,
) -> Heads:
    """Check the arguments that all functions of hidden states share, and return what they compute from.

    Inside `torch.autocast`, hidden states, weights and biases are cast as a linear layer casts them. The logits are
    still float32.
    """
    if not torch.compiler.is_compiling():
        _checks.refuse_transforms("a loss of hidden states", *student.tensors())
    student, shard = _local_head(student, shard, "")
    sides = {"": student}
    if teacher is not None:
        teacher, _ = _local_head(teacher, None if shard is None else shard.with_rows_gathered(False), "teacher_")
        sides["teacher_"] = teacher
    for side, head in sides.items():
        _checks.head(*head.tensors(), logit_scale=head.logit_scale, side=side)
        _checks.softcap(**{f"{side}softcap": head.softcap})
    rows = student.hidden.shape[:-1]
    _checks.boolean(loss_mask=loss_mask)
    if loss_mask is not None and loss_mask.shape != rows:
        raise ValueError(f"loss_mask must match the rows of hidden {tuple(rows)}, got {tuple(loss_mask.shape)}")
    if teacher is not None and teacher.hidden.shape[:-1] != rows:
        came = tuple(teacher.hidden.shape)
        raise ValueError(f"teacher_hidden must match the rows of hidden {_checks.axes(*rows, 'D')}, got {came}")
    _checks.same_device("hidden", student.hidden, **_tensors(sides), loss_mask=loss_mask)
    widths = [head.weight.shape[0] for head in sides.values()]
    size = true_vocab_size(vocab_size, widths, shard, teacher_name="teacher_weight")
    tau = _checks.row_temperature("hidden", student.hidden, temperature)
    sides = {side: _flat_and_cast(head) for side, head in sides.items()}
    softmax = Softmax.of(size, tau, shard, kernels=takes_triton(impl, **_tensors(sides)))
    return Heads(sides[""], sides.get("teacher_"), softmax, rows)


def _tensors(sides: dict[str, Head]) -> dict[str, Tensor | None]:
    """The tensors of all sides, keyed by argument name."""
    names = ("hidden", "weight", "bias")
    return {f"{side}{name}": getattr(head, name) for side, head in sides.items() for name in names}


def _local_head(head: Head, shard: VocabShard | None, side: str) -> tuple[Head, VocabShard | None]:
    """The head with plain tensors, and the slice of the vocabulary that it is; None for the whole vocabulary."""
    hidden, weight, bias, shard = head_shard(*head.tensors(), shard, side)
    return Head(hidden, weight, bias, head.softcap, head.logit_scale), shard


def _flat_and_cast(head: Head) -> Head:
    """The head with hidden states (T, D) and its three tensors cast as autocast casts them, which keeps float64."""
    device = head.hidden.device.type
    # autocast does not know the device type `meta`
    dtype = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None

    def cast(x: Tensor) -> Tensor:
        x = _checks.savable(x)
        return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)

    bias = None if head.bias is None else cast(head.bias)
    return Head(cast(head.hidden).flatten(0, -2), cast(head.weight), bias, head.softcap, float(head.logit_scale))


def head_product_(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias` into `out` (n, V), in the dtype that `out` and hidden (n, D) share."""
    for columns, part in _widened_slices(weight, out.dtype):
        product_(out[:, columns], hidden, part.T)
    return out if bias is None else out.add_(bias.to(out.dtype))


def times_head(gradient: Tensor, weight: Tensor) -> Tensor:
    """`gradient @ weight` (n, D), in the dtype of the gradient (n, V)."""
    out = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for columns, part in _widened_slices(weight, gradient.dtype):
        add_product_(out, gradient[:, columns], part)
    return out


class HeadGradient(Protocol):
    """dz (n, V), the gradient of `hidden @ weight.T + bias` for some rows, and the products that carry it on."""

    def of_hidden(self) -> Tensor: ...  # dz @ weight, (n, D)

    def add_to_weight_(self, total: Tensor) -> None: ...  # total (V, D) += dz.T @ hidden

    def add_to_bias_(self, total: Tensor) -> None: ...  # total (V,) += sum_n dz


class TorchHeadGradient(NamedTuple):
    """Products by torch, in the dtype of dz: that of the logits or, if `rounds_gradient`, bfloat16."""

    dz: Tensor  # (n, V)
    hidden: Tensor  # (n, D) in the dtype of dz
    weight: Tensor  # (V, D)

    def of_hidden(self) -> Tensor:
        return times_head(self.dz, self.weight)

    def add_to_weight_(self, total: Tensor) -> None:
        add_product_(total, self.dz.T, self.hidden)

    def add_to_bias_(self, total: Tensor) -> None:
        total += self.dz.sum(0, dtype=total.dtype)


def room_for_gradient(z: Tensor, head: Head) -> Tensor:
    """Contiguous memory for dz (n, V) in that of the logits z (n, V): z itself or, if `rounds_gradient`, bfloat16.

    Row i of the latter is in the memory of row i / 2 of z, so it may be written once rows 0 to i of z have been read.
    It is contiguous because oneDNN reads past the end of a row, and NaN there, times 0, is NaN.
    """
    if not rounds_gradient(head.hidden, head.weight, z.dtype):
        return z
    return z.view(-1).view(torch.bfloat16)[: z.numel()].view(z.shape)


class KernelHeadGradient(NamedTuple):
    """Products by `_triton/_products.py`: half-precision operands, float32 results."""

    dz: Tensor  # (n, V)
    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    factor: Tensor | None = None  # (), still to be multiplied into the products

    def of_hidden(self) -> Tensor:
        from kdloss._triton import _products

        if self.dz.dtype == self.weight.dtype:
            out = torch.empty(self.dz.shape[0], self.weight.shape[1], dtype=torch.float32, device=self.dz.device)
            _products.product_(out, self.dz, self.weight)
        else:
            out = times_head(self.dz, self.weight)
        return out if self.factor is None else out.mul_(self.factor)

    def add_to_weight_(self, total: Tensor) -> None:
        from kdloss._triton import _products

        _products.add_product_(total, self.dz.T, self.hidden.to(self.dz.dtype), self.factor)

    def add_to_bias_(self, total: Tensor) -> None:
        found = self.dz.sum(0, dtype=torch.float32)
        total += found if self.factor is None else found * self.factor


def _widened_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows of the head, these in `dtype`): the whole head if it has that dtype, else one slice at a time."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(256, _SLICE_ENTRIES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        columns = slice(start, start + step)
        yield columns, weight[columns].to(dtype)
