"""Oracles for the packed layout: cumulative lengths, sums over sequences, shifted labels, padding."""

from __future__ import annotations

import numpy as np

from .types import AnyArray, ArrayLike, BoolArray, FloatArray, IntArray, as_float, as_int, as_mask, as_wide, segments


def cu_seqlens_from_lengths(lengths: ArrayLike) -> IntArray:
    """`cu_0 = 0, cu_{b+1} = cu_b + n_b`.

    lengths: (B,) int, tokens. Returns (B+1,) int64. Source: the packed layout of FlashAttention, arXiv 2205.14135.
    """
    cu = [0]
    for n in as_int("lengths", lengths):
        if n < 0:
            raise ValueError(f"lengths must not be negative, got {n}")
        cu.append(cu[-1] + int(n))
    return np.array(cu, dtype=np.int64)


def segment_ids(cu_seqlens: ArrayLike, *, total_tokens: int | None = None) -> IntArray:
    """`id_t = b` where `cu_b <= t < cu_{b+1}`.

    cu_seqlens: (B+1,) int. Returns (T,) int64.
    """
    sequences = segments(cu_seqlens, total_tokens)
    ids = np.zeros(sum(map(len, sequences)), dtype=np.int64)
    for b, tokens in enumerate(sequences):
        for t in tokens:
            ids[t] = b
    return ids


def segment_sum(x: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike) -> FloatArray:
    """`y_b = sum of x_t over the trained tokens t of sequence b`, 0 without trained tokens.

    x: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. Returns (B,).
    """
    x = as_float("x", x)
    mask = as_mask("loss_mask", loss_mask, shape=x.shape)
    return np.array(
        [sum(float(x[t]) for t in tokens if mask[t]) for tokens in segments(cu_seqlens, x.size)], np.float64
    )


def segment_sum_grad(x: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, upstream: ArrayLike) -> FloatArray:
    """`dx_t = u_b` at the trained tokens of sequence b, 0 elsewhere.

    x: (T,). loss_mask: (T,) bool. cu_seqlens: (B+1,). upstream: (B,). Returns (T,).
    Source: derived from `segment_sum`.
    """
    x = as_float("x", x)
    mask = as_mask("loss_mask", loss_mask, shape=x.shape)
    sequences = segments(cu_seqlens, x.size)
    u = as_float("upstream", upstream, shape=(len(sequences),))
    grad = np.zeros(x.shape)
    for b, tokens in enumerate(sequences):
        for t in tokens:
            if mask[t]:
                grad[t] = u[b]
    return grad


def segment_mean(x: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike) -> FloatArray:
    """`y_b = (sum of x_t over the trained tokens t of sequence b) / n_b`, n_b their number; 0 where n_b = 0.

    x: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. Returns (B,).
    """
    x = as_float("x", x)
    mask = as_mask("loss_mask", loss_mask, shape=x.shape)
    means = []
    for tokens in segments(cu_seqlens, x.size):
        values = [float(x[t]) for t in tokens if mask[t]]
        means.append(sum(values) / len(values) if values else 0.0)
    return np.array(means, np.float64)


def segment_mean_grad(x: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, upstream: ArrayLike) -> FloatArray:
    """`dx_t = u_b / n_b` at the n_b trained tokens of sequence b, 0 elsewhere.

    x: (T,). loss_mask: (T,) bool. cu_seqlens: (B+1,). upstream: (B,). Returns (T,).
    Source: derived from `segment_mean`.
    """
    x = as_float("x", x)
    mask = as_mask("loss_mask", loss_mask, shape=x.shape)
    sequences = segments(cu_seqlens, x.size)
    u = as_float("upstream", upstream, shape=(len(sequences),))
    grad = np.zeros(x.shape)
    for b, tokens in enumerate(sequences):
        counted = [t for t in tokens if mask[t]]
        for t in counted:
            grad[t] = u[b] / len(counted)
    return grad


def broadcast_to_tokens(x: ArrayLike, *, cu_seqlens: ArrayLike, total_tokens: int | None = None) -> AnyArray:
    """`y_t = x_b` for every token t of sequence b.

    x: (B,) float, int or bool. cu_seqlens: (B+1,) int. Returns (T,) float64, int64 or bool, by x's kind.
    """
    x = as_wide(x)
    sequences = segments(cu_seqlens, total_tokens)
    if x.shape != (len(sequences),):
        raise ValueError(f"x must have shape {(len(sequences),)}, got {x.shape}")
    y = np.zeros(sum(map(len, sequences)), dtype=x.dtype)
    for b, tokens in enumerate(sequences):
        for t in tokens:
            y[t] = x[b]
    return y


def broadcast_to_tokens_grad(
    x: ArrayLike, *, cu_seqlens: ArrayLike, total_tokens: int | None = None, upstream: ArrayLike
) -> FloatArray:
    """`dx_b = sum of u_t over every token t of sequence b`.

    x: (B,). cu_seqlens: (B+1,). upstream: (T,). Returns (B,). Source: derived from `broadcast_to_tokens`.
    """
    sequences = segments(cu_seqlens, total_tokens)
    u = as_float("upstream", upstream, shape=(sum(map(len, sequences)),))
    grad = [sum(float(u[t]) for t in tokens) for tokens in sequences]
    return np.array(grad, np.float64).reshape(np.shape(x))


def next_token_labels(input_ids: ArrayLike, *, cu_seqlens: ArrayLike, ignore_index: int = -100) -> IntArray:
    """`label_t = input_{t+1}` where t + 1 is in the same sequence, else `ignore_index`.

    input_ids: (T,) int. cu_seqlens: (B+1,) int. Returns (T,) int64.
    """
    ids = as_int("input_ids", input_ids)
    labels = np.full(ids.shape, ignore_index, dtype=np.int64)
    for tokens in segments(cu_seqlens, ids.size):
        for t in tokens:
            if t + 1 in tokens:
                labels[t] = ids[t + 1]
    return labels


def response_mask(prompt_lengths: ArrayLike, *, cu_seqlens: ArrayLike, total_tokens: int | None = None) -> BoolArray:
    """`m_t = (o + 1 >= prompt_b) and (o + 1 < n_b)`, o the offset of t in b: whether labels[t] is a response token.

    prompt_lengths: (B,) int, tokens. cu_seqlens: (B+1,) int. Returns (T,) bool.
    """
    sequences = segments(cu_seqlens, total_tokens)
    prompts = as_int("prompt_lengths", prompt_lengths, shape=(len(sequences),))
    mask = np.zeros(sum(map(len, sequences)), dtype=np.bool_)
    for b, tokens in enumerate(sequences):
        for offset, t in enumerate(tokens):
            mask[t] = prompts[b] <= offset + 1 < len(tokens)
    return mask


def _shift(x: ArrayLike, cu_seqlens: ArrayLike, step: int, fill: float) -> AnyArray:
    """`y_t = x_{t + step}` where that position is in the same sequence, else `fill`."""
    x = as_wide(x)
    y = np.full(x.shape, fill, dtype=x.dtype)
    for tokens in segments(cu_seqlens, x.shape[0]):
        for t in tokens:
            if t + step in tokens:
                y[t] = x[t + step]
    return y


def to_prediction_positions(x: ArrayLike, *, cu_seqlens: ArrayLike, fill: float) -> AnyArray:
    """`y_t = x_{t+1}` in the same sequence, `fill` at each sequence's last position.

    x: (T,) any kind, entry t belongs to token t. cu_seqlens: (B+1,). Returns (T,).
    """
    return _shift(x, cu_seqlens, 1, fill)


def to_prediction_positions_grad(
    x: ArrayLike, *, cu_seqlens: ArrayLike, fill: float, upstream: ArrayLike
) -> FloatArray:
    """`dx_t = u_{t-1}` in the same sequence, 0 at each first position: only y_{t-1} depends on x_t.

    x: (T,). cu_seqlens: (B+1,). upstream: (T,). Returns (T,). Source: derived from `to_prediction_positions`.
    """
    return _shift(as_float("upstream", upstream, shape=np.shape(x)), cu_seqlens, -1, 0.0)


def to_token_positions(x: ArrayLike, *, cu_seqlens: ArrayLike, fill: float) -> AnyArray:
    """`y_t = x_{t-1}` in the same sequence, `fill` at each sequence's first position.

    x: (T,) any kind, entry t belongs to token t + 1. cu_seqlens: (B+1,). Returns (T,).
    """
    return _shift(x, cu_seqlens, -1, fill)


def to_token_positions_grad(x: ArrayLike, *, cu_seqlens: ArrayLike, fill: float, upstream: ArrayLike) -> FloatArray:
    """`dx_t = u_{t+1}` in the same sequence, 0 at each last position: only y_{t+1} depends on x_t.

    x: (T,). cu_seqlens: (B+1,). upstream: (T,). Returns (T,). Source: derived from `to_token_positions`.
    """
    return _shift(as_float("upstream", upstream, shape=np.shape(x)), cu_seqlens, 1, 0.0)


def pack(
    padded: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    total_tokens: int | None = None,
) -> AnyArray:
    """`y = concatenation over b of padded_{b, i} for the tokens i of row b`, as many as `total_tokens` says.

    The tokens are i < n_b with lengths n_b, i < cu_{b+1} - cu_b, or where mask_{b, i}.
    padded: (B, L, ...) any kind. lengths: (B,) int. mask: (B, L) bool. cu_seqlens: (B+1,) int. Returns (T, ...).
    """
    padded = as_wide(padded)
    tokens = _tokens(padded.shape[1], lengths=lengths, mask=mask, cu_seqlens=cu_seqlens)
    if len(tokens) != len(padded):
        raise ValueError(f"padded must have {len(tokens)} rows, got {len(padded)}")
    values = [padded[b, i] for b, row in enumerate(tokens) for i in row]
    if total_tokens not in (None, len(values)):
        raise ValueError(f"total_tokens must be the number of tokens {len(values)}, got {total_tokens}")
    packed = np.zeros((len(values), *padded.shape[2:]), dtype=padded.dtype)
    for t, value in enumerate(values):
        packed[t] = value
    return packed


def pack_grad(
    padded: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    total_tokens: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """`dpadded_{b, i} = u_t` where token t of the stream came from entry i of row b, 0 in the padding: pack copies.

    padded: (B, L, ...). upstream: (T, ...). Returns (B, L, ...). Source: derived from `pack`.
    """
    u = as_float("upstream", upstream)
    return unpack(u, lengths=lengths, mask=mask, cu_seqlens=cu_seqlens, length=np.shape(padded)[1])


def unpack(
    packed: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    length: int | None = None,
    fill: float = 0,
) -> AnyArray:
    """`y_{b, i} = packed_t` for token t of the stream, which is entry i of row b, else `fill`.

    packed: (T, ...) any kind. Tokens are those of `pack`. Returns (B, length, ...), or the shape of the mask.
    """
    packed = as_wide(packed)
    length = np.shape(mask)[1] if length is None and mask is not None else length
    if length is None:
        raise ValueError("length must be given without mask, got None")
    tokens = _tokens(length, lengths=lengths, mask=mask, cu_seqlens=cu_seqlens)
    if sum(map(len, tokens)) != len(packed):
        raise ValueError(f"packed must have {sum(map(len, tokens))} tokens, got {len(packed)}")
    padded = np.full((len(tokens), length, *packed.shape[1:]), fill, dtype=packed.dtype)
    values = iter(packed)
    for b, row in enumerate(tokens):
        for i in row:
            padded[b, i] = next(values)
    return padded


def unpack_grad(
    packed: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    length: int | None = None,
    fill: float = 0,
    upstream: ArrayLike,
) -> FloatArray:
    """`dpacked_t = u_{b, i}` where token t is entry i of row b: unpack copies, and the padding is not from `packed`.

    packed: (T, ...). upstream: (B, length, ...). Returns (T, ...). Source: derived from `unpack`.
    """
    u = as_float("upstream", upstream)
    return pack(u, lengths=lengths, mask=mask, cu_seqlens=cu_seqlens, total_tokens=np.shape(packed)[0])


def _tokens(
    length: int, *, lengths: ArrayLike | None, mask: ArrayLike | None, cu_seqlens: ArrayLike | None
) -> list[list[int]]:
    """The entries of each row that are tokens; exactly one of the arguments says it."""
    if sum(x is not None for x in (lengths, mask, cu_seqlens)) != 1:
        raise ValueError("exactly one of lengths, mask and cu_seqlens must be given")
    if mask is not None:
        rows = as_mask("mask", mask, shape=(len(np.asarray(mask)), length))
        return [[i for i, is_token in enumerate(row) if is_token] for row in rows]
    if lengths is not None:
        sizes = [int(n) for n in as_int("lengths", lengths)]
    else:
        sizes = [len(tokens) for tokens in segments(np.asarray(cu_seqlens))]
    if any(not 0 <= n <= length for n in sizes):
        raise ValueError(f"lengths must be in [0, {length}], got {sizes}")
    return [list(range(n)) for n in sizes]
