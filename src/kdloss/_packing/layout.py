"""Packed variable-length sequences: one flat token axis (T,) cut by `cu_seqlens` (B + 1,).

Sequence b owns the tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1; it may be empty. A padded (B, L) tensor is the same
layout after flattening, with cu_seqlens = arange(0, B*L + 1, L).

There are two alignments. At *prediction positions* (this library's own) entry t refers to the token after position t;
at *token positions* (inference servers) it refers to the token at t. They differ by a shift inside every sequence.

A `cu_seqlens` that does not fit the stream raises on the CPU. On other devices and under `torch.compile` a check would
wait for the device; there nothing is read out of bounds, and floating results and their gradients are NaN.

Sequences may be split across ranks: each rank then passes its own parts of the same B sequences, and `group=`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import in_step
from kdloss._docs import documented

from .parts import first_of_later_parts, sum_of_parts
from .texts import PACKING_ARGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SEQUENCES = "the number of sequences of cu_seqlens"  # ranks that share sequences must agree on it


def cu_seqlens_from_lengths(
    lengths: Tensor,  # (B,) int32 or int64
) -> Tensor:  # (B + 1,)
    """Cumulative lengths with a leading zero: cu_seqlens[b] = sum of lengths[:b].

    Args:
        lengths: (B,) tokens of each sequence, int32 or int64, each >= 0.

    Returns:
        (B + 1,) of the dtype of `lengths`; flash-attention kernels take int32.

    Raises:
        TypeError: `lengths` is not int32 or int64.
        ValueError: `lengths` is not one-dimensional, or (on the CPU) a length is negative or the sum exceeds its dtype.

    Example:
        >>> import torch, kdloss
        >>> lengths = torch.tensor([4, 0, 3])
        >>> kdloss.cu_seqlens_from_lengths(lengths).tolist()
        [0, 4, 4, 7]
    """
    _checks.integral(lengths=lengths)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (B,), got {tuple(lengths.shape)}")
    if _checks.value_checks_allowed(lengths) and (lengths < 0).any():
        raise ValueError(f"lengths must be >= 0, got {lengths.tolist()}")
    if _checks.value_checks_allowed(lengths) and (total := int(lengths.sum())) > torch.iinfo(lengths.dtype).max:
        raise ValueError(
            f"lengths must sum to at most {torch.iinfo(lengths.dtype).max} as int32, got {total}; use int64"
        )
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


@documented(PACKING_ARGS)
def segment_ids(
    cu_seqlens: Tensor,  # (B + 1,)
    *,
    total_tokens: int | None = None,
) -> Tensor:  # (T,) int64
    """Index in 0 .. B - 1 of the sequence that owns each token.

    Args:
        {cu_seqlens}
        {total_tokens}

    Returns:
        (T,) int64, non-decreasing. Where `cu_seqlens` does not fit on a GPU, ids are clamped to 0 .. B - 1.

    Raises:
        TypeError: `cu_seqlens` is not int32 or int64.
        ValueError: `cu_seqlens` has a wrong shape or (on the CPU) does not run from 0 to `total_tokens`, or
            `total_tokens` is None where it cannot be read.

    Example:
        >>> import torch, kdloss
        >>> cu_seqlens = torch.tensor([0, 2, 2, 5])  # the second sequence is empty
        >>> kdloss.segment_ids(cu_seqlens, total_tokens=5).tolist()
        [0, 0, 2, 2, 2]
    """
    return Layout(cu_seqlens, total_tokens).ids


@documented(PACKING_ARGS)
def segment_sum(
    x: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    group: ProcessGroup | None = None,
) -> Tensor:  # (B,)
    """Sum of the trained tokens of each sequence: out_b = sum over t in sequence b with loss_mask_t of x_t.

    The sum runs in float64 (float32 where the device lacks it), so its error does not grow with the sequence length.

    Args:
        x: (T,) values per token.
        {loss_mask}
        {cu_seqlens}
        {group}

    Returns:
        (B,), differentiable in `x`; 0 for a sequence without a trained token. With `group` it is the sum over all
        parts, the same to the bit on every rank.

    Gradient with `group`:
        That of the sum over ranks of what each rank descends, with respect to this rank's `x`: the incoming gradients
        are summed over the ranks. So the backward is a collective too and runs on every rank: `x` needs a gradient on
        all ranks or on none, including ranks without tokens.

    Raises:
        TypeError: a dtype is wrong, or `group` is not a process group.
        ValueError: shapes differ, the stream is not flat, or `cu_seqlens` does not fit. With `group` also where its
            backend cannot carry the tensors or, on the CPU, ranks differ in B; on the CPU an error on one rank is
            raised on all.

    Example:
        >>> import torch, kdloss
        >>> x, loss_mask = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([True, True, False, True])
        >>> kdloss.segment_sum(x, loss_mask=loss_mask, cu_seqlens=torch.tensor([0, 3, 4])).tolist()
        [3.0, 8.0]
    """
    layout = _checked(x, loss_mask, cu_seqlens, group)
    return sum_of_tokens(x, loss_mask, layout, group)


@documented(PACKING_ARGS)
def segment_mean(
    x: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    group: ProcessGroup | None = None,
) -> Tensor:  # (B,)
    """Mean over the trained tokens of each sequence: out_b = segment_sum(x)_b / max(1, trained tokens of b).

    Args:
        x: (T,) values per token.
        {loss_mask}
        {cu_seqlens}
        {group}

    Returns:
        (B,), differentiable in `x`; an attached 0 for a sequence without a trained token. With `group` it is the mean
        over all parts, the same to the bit on every rank.

    Gradient with `group`:
        That of the sum over ranks of what each rank descends, with respect to this rank's `x`: the incoming gradients
        are summed over the ranks. So the backward is a collective too and runs on every rank: `x` needs a gradient on
        all ranks or on none, including ranks without tokens.

    Raises:
        TypeError: a dtype is wrong, or `group` is not a process group.
        ValueError: shapes differ, the stream is not flat, or `cu_seqlens` does not fit. With `group` also where its
            backend cannot carry the tensors or, on the CPU, ranks differ in B; on the CPU an error on one rank is
            raised on all.

    Example:
        >>> import torch, kdloss
        >>> x, loss_mask = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([True, True, False, True])
        >>> kdloss.segment_mean(x, loss_mask=loss_mask, cu_seqlens=torch.tensor([0, 3, 4])).tolist()
        [1.5, 8.0]
    """
    layout = _checked(x, loss_mask, cu_seqlens, group)
    return mean_of_tokens(x, loss_mask, layout, group)


def sum_of_tokens(x: Tensor, loss_mask: Tensor, layout: Layout, group: ProcessGroup | None) -> Tensor:
    """`segment_sum` after its checks."""
    return sum_of_parts(_sum_of_part(x, loss_mask, layout), group).to(_checks.promoted_dtype(x))


def mean_of_tokens(x: Tensor, loss_mask: Tensor, layout: Layout, group: ProcessGroup | None) -> Tensor:
    """`segment_mean` after its checks."""
    total, count = _sum_of_part(x, loss_mask, layout), _trained_of_part(loss_mask, layout)
    if group is not None:
        total, count = sum_of_parts(torch.stack([total, count]), group).unbind(0)
    return (total / count.clamp(min=1)).to(_checks.promoted_dtype(x))


def trained_tokens(loss_mask: Tensor, layout: Layout, group: ProcessGroup | None) -> Tensor:
    """(B,) trained tokens of each whole sequence, in the dtype for long sums; NaN if `cu_seqlens` does not fit."""
    return sum_of_parts(_trained_of_part(loss_mask, layout), group)


@documented(PACKING_ARGS)
def broadcast_to_tokens(
    x: Tensor,  # (B,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    total_tokens: int | None = None,
) -> Tensor:  # (T,)
    """Each token gets the entry of its sequence: out_t = x[segment_ids_t].

    Args:
        x: (B,) of any dtype: rewards, advantages, or a boolean such as `rewards <= 0`.
        {cu_seqlens}
        {total_tokens}

    Returns:
        (T,) of the dtype of `x`, differentiable where `x` is.

    Raises:
        TypeError: `x` is not a tensor, or `cu_seqlens` is not int32 or int64.
        ValueError: `x` is not (B,), `cu_seqlens` does not fit, or `total_tokens` is None where it cannot be read.

    Example:
        >>> import torch, kdloss
        >>> advantages, cu_seqlens = torch.tensor([0.5, -0.5]), torch.tensor([0, 2, 5])
        >>> kdloss.broadcast_to_tokens(advantages, cu_seqlens=cu_seqlens, total_tokens=5).tolist()
        [0.5, 0.5, -0.5, -0.5, -0.5]
    """
    _checks.tensors(x=x, cu_seqlens=cu_seqlens)
    _checks.same_device("cu_seqlens", cu_seqlens, x=x)
    layout = Layout(cu_seqlens, total_tokens)
    if x.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(f"x must have one entry per sequence ({cu_seqlens.shape[0] - 1},), got {tuple(x.shape)}")
    # the entries are fewer than the tokens
    return poison(x, layout.fits).index_select(0, layout.ids)


@documented(PACKING_ARGS)
def next_token_labels(
    input_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> Tensor:  # (T,) int64
    """The token that each position predicts: labels[t] = input_ids[t + 1] inside a sequence, `ignore_index` at its end.

    Args:
        input_ids: (T,) integer token ids of the packed stream.
        {cu_seqlens}
        ignore_index: the label where nothing follows. The library's own functions ignore -100.
        {group}
            Parts follow one another in rank order: the label at the end of a part is the first token of the next part
            of that sequence that is not empty.

    Returns:
        (T,) int64. No label crosses from one sequence into the next.

    Raises:
        TypeError: `input_ids` is not int32 or int64, or `group` is not a process group.
        ValueError: the stream is not flat, or `cu_seqlens` does not fit. With `group` also where its backend cannot
            carry the tensors or, on the CPU, ranks differ in B or `ignore_index`; on the CPU an error on one rank is
            raised on all.

    Example:
        >>> import torch, kdloss
        >>> input_ids, cu_seqlens = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 3, 5])
        >>> kdloss.next_token_labels(input_ids, cu_seqlens=cu_seqlens).tolist()
        [6, 7, -100, 9, -100]
    """
    with in_step(group, input_ids, agreed := {}):
        _checks.integral(input_ids=input_ids)
        _checks.packed_stream("input_ids", input_ids, cu_seqlens)
        input_ids = input_ids.to(torch.int64)
        labels = to_prediction_positions(input_ids, cu_seqlens=cu_seqlens, fill=ignore_index)
        agreed.update({SEQUENCES: cu_seqlens.shape[0] - 1, "ignore_index": ignore_index})
    if group is None:
        return labels
    first, present = at_starts(input_ids, cu_seqlens)
    following = first_of_later_parts(first, present, ignore_index, group)
    layout = Layout(cu_seqlens, input_ids.shape[0])
    at_cut = layout.fits & (layout.position + 1 == layout.stop)
    return torch.where(at_cut, following.index_select(0, layout.ids), labels)


@documented(PACKING_ARGS)
def response_mask(
    prompt_lengths: Tensor,  # (B,)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    total_tokens: int | None = None,
) -> Tensor:  # (T,) bool
    """True where labels[t] is a response token: offset_t + 1 >= prompt_length and a next token exists.

    The last prompt position is True (it predicts the first response token) and the last position of a sequence is
    False (it predicts nothing). With a prompt length of 0 the first response token cannot be trained: nothing predicts
    it. A prompt that fills its whole sequence trains nothing.

    Args:
        prompt_lengths: (B,) int32 or int64, tokens of each sequence that were given, not sampled.
        {cu_seqlens}
        {total_tokens}

    Returns:
        (T,) bool, a `loss_mask` at prediction positions.

    Raises:
        TypeError: `prompt_lengths` is not int32 or int64.
        ValueError: `prompt_lengths` is not (B,), (on the CPU) is negative, `cu_seqlens` does not fit, or `total_tokens`
            is None where it cannot be read.

    Example:
        >>> import torch, kdloss
        >>> cu_seqlens = torch.tensor([0, 5])  # a prompt of two tokens and a response of three
        >>> kdloss.response_mask(torch.tensor([2]), cu_seqlens=cu_seqlens, total_tokens=5).tolist()
        [False, True, True, True, False]
    """
    _checks.integral(prompt_lengths=prompt_lengths, cu_seqlens=cu_seqlens)
    _checks.same_device("cu_seqlens", cu_seqlens, prompt_lengths=prompt_lengths)
    layout = Layout(cu_seqlens, total_tokens)
    if prompt_lengths.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(
            f"prompt_lengths must have one entry per sequence ({cu_seqlens.shape[0] - 1},), "
            f"got {tuple(prompt_lengths.shape)}"
        )
    if _checks.value_checks_allowed(prompt_lengths) and (prompt_lengths < 0).any():
        raise ValueError(f"prompt_lengths must be >= 0, got {prompt_lengths.tolist()}")
    following = layout.position + 1
    is_response = following - layout.start >= prompt_lengths.index_select(0, layout.ids)
    return is_response & (following < layout.stop) & layout.fits


@documented(PACKING_ARGS)
def to_prediction_positions(
    x: Tensor,  # (T, ...)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    fill: float,
) -> Tensor:  # (T, ...)
    """From token positions to prediction positions: out[t] = x[t + 1] inside a sequence, `fill` at its last position.

    Log-probs from an inference server need this before they are compared with the library's. The first entry of every
    sequence (None from the server) is dropped: nothing predicts that token.

    Args:
        x: (T, ...) values per token, at the token's own position.
        {cu_seqlens}
        fill: the value at the last position of every sequence.

    Returns:
        (T, ...) of the dtype of `x`, differentiable in it.

    Raises:
        TypeError: `x` is not a tensor, or `cu_seqlens` is not int32 or int64.
        ValueError: `cu_seqlens` does not fit.

    Example:
        >>> import torch, kdloss
        >>> x, cu_seqlens = torch.tensor([0.0, -1.0, -2.0, 0.0, -4.0]), torch.tensor([0, 3, 5])
        >>> kdloss.to_prediction_positions(x, cu_seqlens=cu_seqlens, fill=9.0).tolist()
        [-1.0, -2.0, 9.0, -4.0, 9.0]
    """
    layout = _layout_of("x", x, cu_seqlens)
    return _shifted(x, -1, layout.position + 1 < layout.stop, fill, layout.fits)


@documented(PACKING_ARGS)
def to_token_positions(
    x: Tensor,  # (T, ...)
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    fill: float,
) -> Tensor:  # (T, ...)
    """From prediction positions to token positions: out[t] = x[t - 1] inside a sequence, `fill` at its first position.

    The inverse of `to_prediction_positions`, except for the entry that each drops.

    Args:
        x: (T, ...) values per token, at the position that predicts the token.
        {cu_seqlens}
        fill: the value at the first position of every sequence.

    Returns:
        (T, ...) of the dtype of `x`, differentiable in it.

    Raises:
        TypeError: `x` is not a tensor, or `cu_seqlens` is not int32 or int64.
        ValueError: `cu_seqlens` does not fit.

    Example:
        >>> import torch, kdloss
        >>> x, cu_seqlens = torch.tensor([-1.0, -2.0, 9.0, -4.0, 9.0]), torch.tensor([0, 3, 5])
        >>> kdloss.to_token_positions(x, cu_seqlens=cu_seqlens, fill=0.0).tolist()
        [0.0, -1.0, -2.0, 0.0, -4.0]
    """
    layout = _layout_of("x", x, cu_seqlens)
    return _shifted(x, 1, layout.position > layout.start, fill, layout.fits)


@documented(PACKING_ARGS)
def pack(
    padded: Tensor,  # (B, L, ...)
    *,
    lengths: Tensor | None = None,  # (B,)
    mask: Tensor | None = None,  # (B, L) bool
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    total_tokens: int | None = None,
) -> Tensor:  # (T, ...)
    """Padded rows to one packed stream: the tokens of every row, one row after the other.

    Exactly one of `lengths`, `mask` and `cu_seqlens` says which entries are tokens. `lengths` and `cu_seqlens` are for
    rows padded on the right; `mask` is for any rows, and the only right one for rows padded on the left, as models
    generate. The packed stream of a mask has `cu_seqlens = cu_seqlens_from_lengths(mask.sum(1))`.

    Args:
        padded: (B, L, ...) of any dtype.
        {lengths}
            The tokens are the first lengths[b] entries of row b.
        mask: (B, L) bool, True at tokens, such as `attention_mask.bool()`. Padding may be anywhere in a row: the tokens
            keep their order.
        {cu_seqlens}
            They are the first entries of row b.
        {total_tokens}

    Returns:
        (T, ...), differentiable in `padded`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: not exactly one of `lengths`, `mask` and `cu_seqlens` is given, shapes disagree, `total_tokens` is
            None where it cannot be read, or (on the CPU) a length exceeds L or there are not T tokens.

    Example:
        >>> import torch, kdloss
        >>> right, left = torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([[0, 1, 2], [3, 4, 5]])
        >>> kdloss.pack(right, lengths=torch.tensor([2, 3])).tolist()
        [1, 2, 3, 4, 5]
        >>> kdloss.pack(left, mask=left > 0).tolist()
        [1, 2, 3, 4, 5]
    """
    _checks.tensors(padded=padded)
    _checks.exactly_one(lengths=lengths, mask=mask, cu_seqlens=cu_seqlens)
    if padded.ndim < 2:
        raise ValueError(f"padded must be (B, L, ...), got {tuple(padded.shape)}")
    size, length = padded.shape[:2]
    if mask is not None:
        _checks.boolean(mask=mask)
        if mask.shape != padded.shape[:2]:
            raise ValueError(f"mask must match the rows of padded {(size, length)}, got {tuple(mask.shape)}")
        _checks.same_device("padded", padded, mask=mask)
        number = _numbers(mask)
        total = _total("mask", number, total_tokens)
        token = torch.arange(1, total + 1, device=padded.device)
        # left: the first entry with that many tokens up to and with it, which is the token itself
        index = torch.searchsorted(number, token).clamp(max=max(number.shape[0] - 1, 0))
        return _selected(padded, index, number[-1:].sum() == total)
    name = "cu_seqlens" if lengths is None else "lengths"
    if lengths is not None:
        _checks.integral(lengths=lengths)
        if lengths.shape != (size,):
            raise ValueError(f"lengths must match the rows of padded ({size},), got {tuple(lengths.shape)}")
        _checks.same_device("padded", padded, lengths=lengths)
        cu_seqlens = cu_seqlens_from_lengths(lengths)
        total_tokens = _total("lengths", cu_seqlens, total_tokens)
    assert cu_seqlens is not None
    _checks.tensors(cu_seqlens=cu_seqlens)
    _checks.same_device("padded", padded, cu_seqlens=cu_seqlens)
    layout = Layout(cu_seqlens, total_tokens)
    if cu_seqlens.shape != (size + 1,):
        raise ValueError(f"cu_seqlens must have one sequence per row ({size + 1},), got {tuple(cu_seqlens.shape)}")
    lengths = cu_seqlens.diff()
    if _checks.value_checks_allowed(lengths) and (lengths > length).any():
        raise ValueError(f"{name} must fit rows of {length} entries, got sequences of {lengths.tolist()}")
    fits = layout.fits & (lengths <= length).all()
    return _selected(padded, layout.ids * length + (layout.position - layout.start).clamp(0, max(length - 1, 0)), fits)


@documented(PACKING_ARGS)
def unpack(
    packed: Tensor,  # (T, ...)
    *,
    lengths: Tensor | None = None,  # (B,)
    mask: Tensor | None = None,  # (B, L) bool
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    length: int | None = None,
    fill: float = 0,
) -> Tensor:  # (B, L, ...)
    """A packed stream to padded rows: out[b, l] = packed[cu_seqlens[b] + l], `fill` past the end of sequence b.

    The inverse of `pack` with the same `lengths`, `mask` or `cu_seqlens`, of which exactly one is given. With `mask`
    the tokens of a sequence fill the True entries of its row: at the end, where padding is on the left.

    Args:
        packed: (T, ...) of any dtype.
        {lengths}
        mask: (B, L) bool, True at tokens. `fill` is everywhere else.
        {cu_seqlens}
        length: L, at least the longest sequence. With `mask` it is left out.
        fill: the padding value.

    Returns:
        (B, L, ...), differentiable in `packed`.

    Raises:
        TypeError: a dtype is wrong, or `packed` is not a tensor.
        ValueError: not exactly one of `lengths`, `mask` and `cu_seqlens` is given, it does not fit, `length` is None
            without `mask`, or (on the CPU) a sequence is longer than `length`: nothing is cut off.

    Example:
        >>> import torch, kdloss
        >>> packed, cu_seqlens = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 5])
        >>> kdloss.unpack(packed, cu_seqlens=cu_seqlens, length=3).tolist()
        [[1, 2, 0], [3, 4, 5]]
        >>> left = torch.tensor([[False, True, True], [True, True, True]])
        >>> kdloss.unpack(packed, mask=left).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    _checks.tensors(packed=packed)
    _checks.exactly_one(lengths=lengths, mask=mask, cu_seqlens=cu_seqlens)
    if packed.ndim < 1:
        raise ValueError(f"packed must be (T, ...), got {tuple(packed.shape)}")
    total = packed.shape[0]
    if mask is not None:
        _checks.boolean(mask=mask)
        if mask.ndim != 2:
            raise ValueError(f"mask must be (B, L), got {tuple(mask.shape)}")
        if length is not None and length != mask.shape[1]:
            raise ValueError(
                f"length must be left out with mask, whose rows have {mask.shape[1]} entries, got {length}"
            )
        _checks.same_device("packed", packed, mask=mask)
        number = _numbers(mask)
        _sums_to("the {} tokens of packed", total, number, "mask")
        mask = _checks.savable(mask)
        return _rows(packed, number.reshape(mask.shape) - 1, mask, fill, number[-1:].sum() == total)
    if length is None:
        raise ValueError("length must be given without mask, got None")
    if lengths is not None:
        cu_seqlens = cu_seqlens_from_lengths(lengths)
        _checks.same_device("packed", packed, lengths=lengths)
        _sums_to("the {} tokens of packed", total, cu_seqlens, "lengths")
    assert cu_seqlens is not None
    layout = _layout_of("packed", packed, cu_seqlens)
    lengths = cu_seqlens.diff()
    if _checks.value_checks_allowed(lengths) and (lengths > length).any():
        raise ValueError(f"length must hold the longest sequence {int(lengths.max())}, got {length}")
    column = torch.arange(length, device=packed.device)
    fits = layout.fits & (lengths <= length).all()
    return _rows(packed, cu_seqlens[:-1, None] + column, column < lengths[:, None], fill, fits)


def _numbers(mask: Tensor) -> Tensor:
    """(B*L,) int64: the number of tokens up to and with each entry of the flattened mask."""
    return mask.reshape(-1).cumsum(0)


def _total(name: str, ends: Tensor, total_tokens: int | None) -> int:
    """T: `total_tokens`, else the last of `ends`, the cumulative sums of the argument `name`."""
    if total_tokens is None:
        return _checks.token_count(ends) if ends.shape[0] else 0
    _sums_to("total_tokens = {}", total_tokens, ends, name)
    return total_tokens


def _sums_to(what: str, total: int, ends: Tensor, name: str) -> None:
    """The last of `ends`, the cumulative sums of the argument `name`, is `total`, which the error calls `what`."""
    if _checks.value_checks_allowed(ends) and (found := int(ends[-1:].sum())) != total:
        raise ValueError(f"{name} must sum to {what.format(total)}, got {found}")


def _selected(padded: Tensor, index: Tensor, fits: Tensor) -> Tensor:
    """(T, ...) entries of `padded` (B, L, ...) at (T,) `index` of its flattened rows; NaN if `fits` is False."""
    stream = rearrange(padded, "b l ... -> (b l) ...")
    if stream.shape[0] == 0:  # nothing to select from; the sum of an empty tensor is an attached 0
        nothing = stream.sum(0, dtype=padded.dtype)
        return poison(padded.new_zeros(index.shape[0], *padded.shape[2:]) + nothing, fits)
    return poison(stream.index_select(0, index), fits)


def _rows(packed: Tensor, index: Tensor, is_token: Tensor, fill: float, fits: Tensor) -> Tensor:
    """(B, L, ...) entries of `packed` at (B, L) `index` where `is_token`, `fill` elsewhere; NaN if `fits` is False."""
    size, length = index.shape
    if packed.shape[0] == 0:
        empty = packed.new_full((size, length, *packed.shape[1:]), fill)
        return poison(empty + packed.sum(0, dtype=packed.dtype), fits)  # the sum of an empty tensor is an attached 0
    rows = packed.index_select(0, rearrange(index.clamp(0, packed.shape[0] - 1), "b l -> (b l)"))
    rows = rearrange(rows, "(b l) ... -> b l ...", b=size, l=length)
    rows = torch.where(like(is_token, rows), rows, rows.new_full((), fill))
    return poison(rows, fits)


def at_starts(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) `x` at the first token of each sequence, 0 if it is empty, and (B,) bool: whether it is not empty."""
    present = cu_seqlens[1:] > cu_seqlens[:-1]
    x = torch.cat([x, x.new_zeros(1)])  # read for an empty sequence at the end
    first = x.index_select(0, cu_seqlens[:-1].clamp(0, x.shape[0] - 1))
    return torch.where(present, first, first.new_zeros(())), present


def _checked(x: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, group: ProcessGroup | None) -> Layout:
    """The layout of the stream, after checks that agree with the other ranks of `group`."""
    with in_step(group, x, agreed := {}):
        _checks.per_token("x", x, loss_mask=loss_mask)
        _checks.packed_stream("x", x, cu_seqlens)
        layout = Layout(cu_seqlens, x.shape[0])
        agreed.update({SEQUENCES: cu_seqlens.shape[0] - 1})
    return layout


def _sum_of_part(x: Tensor, loss_mask: Tensor, layout: Layout) -> Tensor:
    """(B,) sums of this rank's part, in the dtype for long sums; NaN if `cu_seqlens` does not fit."""
    kept = torch.where(_checks.savable(loss_mask), x, x.new_zeros(())).to(_checks.accumulator_dtype(x))
    return kept.new_zeros(layout.size).index_add(0, layout.ids, kept) * one_or_nan(layout.fits)


def _trained_of_part(loss_mask: Tensor, layout: Layout) -> Tensor:
    """(B,) trained tokens of this rank's part, in the dtype for long sums; NaN if `cu_seqlens` does not fit."""
    counted = loss_mask.to(_checks.accumulator_dtype(loss_mask))
    return counted.new_zeros(layout.size).index_add(0, layout.ids, counted) * one_or_nan(layout.fits)


class Layout:
    """Where each of T tokens is in its sequence, and whether `cu_seqlens` describes exactly T tokens."""

    def __init__(self, cu_seqlens: Tensor, total_tokens: int | None, name: str = "cu_seqlens") -> None:
        total_tokens = _checks.cumulative_lengths(cu_seqlens, total_tokens=total_tokens, name=name)
        self._cu_seqlens, self.size = cu_seqlens, cu_seqlens.shape[0] - 1
        self.position = torch.arange(total_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)  # (T,)
        # right=True: the last sequence that starts at or before the token, which skips empty sequences
        ids = torch.searchsorted(cu_seqlens.contiguous(), self.position, right=True) - 1
        self.ids = ids.clamp(0, max(self.size - 1, 0))  # (T,) int64: the sequence of each token, always a valid index
        self.fits = fits(cu_seqlens, total_tokens)

    @property
    def start(self) -> Tensor:
        """(T,): the first token of the sequence of each token."""
        return self._cu_seqlens.index_select(0, self.ids)

    @property
    def stop(self) -> Tensor:
        """(T,): the first token after the sequence of each token."""
        return self._cu_seqlens[1:].index_select(0, self.ids)


def fits(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """() bool: whether `cu_seqlens` describes exactly T tokens."""
    return (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total_tokens) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()


def _layout_of(name: str, x: Tensor, cu_seqlens: Tensor) -> Layout:
    _checks.tensors(**{name: x}, cu_seqlens=cu_seqlens)
    if x.ndim < 1:
        raise ValueError(f"{name} must be (T, ...), got {tuple(x.shape)}")
    _checks.same_device("cu_seqlens", cu_seqlens, **{name: x})
    return Layout(cu_seqlens, x.shape[0])


def like(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` with trailing axes of size 1, so that it broadcasts over the trailing axes of `x`."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def poison(x: Tensor, fits: Tensor) -> Tensor:
    """All NaN if `fits` is False; integers and booleans, which have no NaN, become 0."""
    if x.dtype.is_floating_point:
        # a product, so that the gradient is NaN as well: 0 would look like a step without data
        # chosen and not multiplied where it fits: a product may change the bits of a NaN
        return torch.where(fits, x, x * one_or_nan(fits))
    # a 0-dim tensor of the same dtype: with a Python number, booleans would become integers
    return torch.where(fits, x, x.new_zeros(()))


def one_or_nan(valid: Tensor) -> Tensor:
    """1 where `valid`, else NaN."""
    return valid / valid  # 1 / 1 or 0 / 0, which takes fewer launches than a choice between two numbers


def _shifted(x: Tensor, steps: int, moved: Tensor, fill: float, fits: Tensor) -> Tensor:
    """`x` rolled along the stream where `moved`, `fill` elsewhere. If `fits` is False: NaN, or `fill` in integers."""
    floating = x.dtype.is_floating_point
    moved = moved | ~fits if floating else moved & fits
    shifted = torch.where(like(moved, x), x.roll(steps, 0), x.new_full((), fill))
    return poison(shifted, fits) if floating else shifted
