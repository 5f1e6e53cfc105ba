"""Holds every function of packing on examples that can be checked by eye, and against loops over tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss
from kdloss.testing.strategies import PackedBatch, packed_batches

# Three sequences: "abc", nothing, "defg". Each letter is a token id.
A, B, C, D, E, F, G = range(10, 17)
INPUT_IDS = torch.tensor([A, B, C, D, E, F, G])
CU_SEQLENS = torch.tensor([0, 3, 3, 7])
NAN = float("nan")


def sequences(cu_seqlens: Tensor) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cu_seqlens_from_lengths(dtype):
    cu_seqlens = kdloss.cu_seqlens_from_lengths(torch.tensor([3, 0, 4], dtype=dtype))
    assert cu_seqlens.tolist() == [0, 3, 3, 7]
    assert cu_seqlens.dtype == dtype


@pytest.mark.parametrize(
    ("cu_seqlens", "ids"),
    [
        ([0, 3, 3, 7], [0, 0, 0, 2, 2, 2, 2]),
        ([0, 0, 0, 2], [2, 2]),  # empty sequences at the start
        ([0, 2, 2, 2], [0, 0]),  # and at the end
        ([0, 1, 2, 3], [0, 1, 2]),  # single tokens
        ([0, 0], []),
        ([0], []),
    ],
)
def test_segment_ids(cu_seqlens, ids):
    for dtype in (torch.int32, torch.int64):
        found = kdloss.segment_ids(torch.tensor(cu_seqlens, dtype=dtype), total_tokens=cu_seqlens[-1])
        assert found.tolist() == ids
        assert found.dtype == torch.int64


def test_segment_sum_and_mean():
    x = torch.tensor([1.0, 2.0, NAN, 4.0, 5.0, NAN, 9.0], requires_grad=True)
    loss_mask = torch.tensor([True, True, False, False, True, False, True])
    sums = kdloss.segment_sum(x, loss_mask=loss_mask, cu_seqlens=CU_SEQLENS)
    means = kdloss.segment_mean(x, loss_mask=loss_mask, cu_seqlens=CU_SEQLENS)
    assert sums.tolist() == [3, 0, 14]
    assert means.tolist() == [1.5, 0, 7]
    upstream = torch.tensor([1.0, 100.0, 10.0])
    assert torch.autograd.grad(sums, x, upstream)[0].tolist() == [1, 1, 0, 0, 10, 0, 10]
    assert torch.autograd.grad(means, x, upstream)[0].tolist() == [0.5, 0.5, 0, 0, 5, 0, 5]


def test_broadcast_to_tokens():
    rewards = torch.tensor([0.5, 9.0, -1.0], requires_grad=True)
    tokens = kdloss.broadcast_to_tokens(rewards, cu_seqlens=CU_SEQLENS, total_tokens=7)
    assert tokens.tolist() == [0.5] * 3 + [-1.0] * 4
    (gradient,) = torch.autograd.grad(tokens, rewards, torch.arange(7.0))
    assert gradient.tolist() == [0 + 1 + 2, 0, 3 + 4 + 5 + 6]
    failed = kdloss.broadcast_to_tokens(rewards <= 0, cu_seqlens=CU_SEQLENS, total_tokens=7)
    assert failed.dtype == torch.bool
    assert failed.tolist() == [False] * 3 + [True] * 4
    ids = kdloss.broadcast_to_tokens(torch.tensor([7, 8, 9]), cu_seqlens=CU_SEQLENS, total_tokens=7)
    assert ids.tolist() == [7, 7, 7, 9, 9, 9, 9]


def test_next_token_labels():
    labels = kdloss.next_token_labels(INPUT_IDS, cu_seqlens=CU_SEQLENS)
    # "c" does not predict "d": that is another sequence
    assert labels.tolist() == [B, C, -100, E, F, G, -100]
    assert labels.dtype == torch.int64
    labels = kdloss.next_token_labels(INPUT_IDS.int(), cu_seqlens=CU_SEQLENS.int(), ignore_index=-1)
    assert labels.tolist() == [B, C, -1, E, F, G, -1]
    assert labels.dtype == torch.int64


def test_single_tokens_predict_nothing():
    each = torch.tensor([0, 1, 2])
    assert kdloss.next_token_labels(torch.tensor([A, B]), cu_seqlens=each).tolist() == [-100, -100]
    mask = kdloss.response_mask(torch.tensor([0, 1]), cu_seqlens=each, total_tokens=2)
    assert mask.tolist() == [False, False]


@pytest.mark.parametrize(
    ("prompt_lengths", "mask"),
    [
        # the prompt "a" predicts "b", a response token; "c" predicts nothing; of the prompt "de", "e" predicts "f"
        ([1, 0, 2], [True, True, False, False, True, True, False]),
        # no position predicts a first token, so without a prompt the mask is that of a prompt of one token
        ([0, 0, 0], [True, True, False, True, True, True, False]),
        ([1, 0, 1], [True, True, False, True, True, True, False]),
        # prompts that fill their sequences, and longer ones
        ([3, 0, 4], [False] * 7),
        ([5, 9, 9], [False] * 7),
        ([2, 0, 3], [False, True, False, False, False, True, False]),
    ],
)
def test_response_mask(prompt_lengths, mask):
    for dtype in (torch.int32, torch.int64):
        found = kdloss.response_mask(torch.tensor(prompt_lengths, dtype=dtype), cu_seqlens=CU_SEQLENS, total_tokens=7)
        assert found.dtype == torch.bool
        assert found.tolist() == mask


def test_an_inference_server_s_log_probs_move_to_prediction_positions():
    # at the positions of their tokens; no position predicts a first token, so the server has no value for it
    served = torch.tensor([NAN, -1.0, -2.0, NAN, -3.0, -4.0, -5.0], requires_grad=True)
    logp = kdloss.to_prediction_positions(served, cu_seqlens=CU_SEQLENS, fill=0.0)
    assert logp.tolist() == [-1, -2, 0, -3, -4, -5, 0]
    # entry t is for labels[t]
    labels = kdloss.next_token_labels(INPUT_IDS, cu_seqlens=CU_SEQLENS)
    of_token = dict(zip(INPUT_IDS.tolist(), served.tolist(), strict=True))
    assert [of_token.get(label, 0) for label in labels.tolist()] == logp.tolist()
    (gradient,) = torch.autograd.grad(logp, served, torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    assert gradient.tolist() == [0, 1, 2, 0, 4, 5, 6]


def test_prediction_positions_move_to_token_positions():
    logp = torch.tensor([-1.0, -2.0, NAN, -3.0, -4.0, -5.0, NAN], requires_grad=True)
    served = kdloss.to_token_positions(logp, cu_seqlens=CU_SEQLENS, fill=7.0)
    assert served.tolist() == [7, -1, -2, 7, -3, -4, -5]
    (gradient,) = torch.autograd.grad(served, logp, torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    assert gradient.tolist() == [2, 3, 0, 5, 6, 7, 0]


def test_alignment_of_wider_entries_integers_and_masks():
    hidden = torch.arange(14.0).reshape(7, 2)
    moved = kdloss.to_prediction_positions(hidden, cu_seqlens=CU_SEQLENS, fill=-1)
    assert moved.tolist() == [[2, 3], [4, 5], [-1, -1], [8, 9], [10, 11], [12, 13], [-1, -1]]
    moved = kdloss.to_token_positions(INPUT_IDS, cu_seqlens=CU_SEQLENS, fill=0)
    assert moved.tolist() == [0, A, B, 0, D, E, F]
    for move in (kdloss.to_token_positions, kdloss.to_prediction_positions):
        for x in (INPUT_IDS, INPUT_IDS > B, INPUT_IDS.to(torch.bfloat16), INPUT_IDS.double()):
            for fill in (0, 0.0):  # the fill takes the dtype of x, whether it is an int or a float
                assert move(x, cu_seqlens=CU_SEQLENS, fill=fill).dtype == x.dtype
    # a mask of response tokens, moved, is the mask of the positions that predict them
    is_response = torch.tensor([False, True, True, False, False, True, True])
    moved = kdloss.to_prediction_positions(is_response, cu_seqlens=CU_SEQLENS, fill=False)
    assert moved.dtype == torch.bool
    prompts = torch.tensor([1, 0, 2])
    assert torch.equal(moved, kdloss.response_mask(prompts, cu_seqlens=CU_SEQLENS, total_tokens=7))


def test_pack():
    padded = torch.tensor([[1.0, 2, 3, NAN], [NAN] * 4, [4, 5, 6, 7]], requires_grad=True)
    packed = kdloss.pack(padded, lengths=torch.tensor([3, 0, 4]), total_tokens=7)
    assert packed.tolist() == [1, 2, 3, 4, 5, 6, 7]
    (gradient,) = torch.autograd.grad(packed, padded, torch.arange(1.0, 8))
    assert gradient.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0], [4, 5, 6, 7]]


def test_unpack():
    packed = torch.arange(1.0, 8, requires_grad=True)
    rows = kdloss.unpack(packed, cu_seqlens=CU_SEQLENS, length=5, fill=-1)
    assert rows.tolist() == [[1, 2, 3, -1, -1], [-1] * 5, [4, 5, 6, 7, -1]]
    (gradient,) = torch.autograd.grad(rows, packed, torch.arange(15.0).reshape(3, 5))
    assert gradient.tolist() == [0, 1, 2, 10, 11, 12, 13]


def test_pack_and_unpack_of_wider_entries_integers_and_masks():
    hidden = torch.arange(14.0).reshape(7, 2)
    rows = kdloss.unpack(hidden, cu_seqlens=CU_SEQLENS, length=4)
    assert rows.shape == (3, 4, 2)
    assert rows[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 0]]
    assert torch.equal(kdloss.pack(rows, lengths=CU_SEQLENS.diff(), total_tokens=7), hidden)
    for x in (INPUT_IDS, INPUT_IDS > B, INPUT_IDS.to(torch.bfloat16)):
        rows = kdloss.unpack(x, cu_seqlens=CU_SEQLENS, length=4)
        assert rows.dtype == x.dtype
        packed = kdloss.pack(rows, lengths=CU_SEQLENS.diff(), total_tokens=7)
        assert packed.dtype == x.dtype
        assert torch.equal(packed, x)


def test_entries_are_moved_to_the_bit():
    """A product with 1 would make a signalling NaN a quiet one."""
    padded = torch.tensor([[0x7F800001, 0], [0, 0]], dtype=torch.int32).view(torch.float32)
    packed = kdloss.pack(padded, lengths=torch.tensor([1, 2]))
    assert packed.view(torch.int32).tolist() == [0x7F800001, 0, 0]


def test_left_padded_rows_and_rows_with_holes_pack_the_tokens_of_the_mask():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
    padded = torch.tensor([[NAN, 1, 2, 3], [NAN] * 4, [4, NAN, 5, 6]], requires_grad=True)
    packed = kdloss.pack(padded, mask=mask)
    assert packed.tolist() == [1, 2, 3, 4, 5, 6]
    assert kdloss.cu_seqlens_from_lengths(mask.sum(1)).tolist() == [0, 3, 3, 6]
    (gradient,) = torch.autograd.grad(packed, padded, torch.arange(1.0, 7))
    assert gradient.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [4, 0, 5, 6]]

    rows = kdloss.unpack(packed.detach().requires_grad_(), mask=mask, fill=-1)
    assert rows.tolist() == [[-1, 1, 2, 3], [-1] * 4, [4, -1, 5, 6]]


@pytest.mark.parametrize("named", ["lengths", "mask", "cu_seqlens"])
def test_gradients_of_pack_and_unpack_agree_with_differences(named):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    lengths = mask.sum(1)
    tokens = {named: {"lengths": lengths, "mask": mask, "cu_seqlens": kdloss.cu_seqlens_from_lengths(lengths)}[named]}
    width = {} if named == "mask" else {"length": 3}
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kdloss.pack(x, **tokens), padded)
    assert torch.autograd.gradcheck(lambda x: kdloss.unpack(x, **tokens, **width), packed)


def total_tokens_of(cu_seqlens: Tensor) -> dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]]:
    """Every function that takes `total_tokens`, and its other arguments."""
    lengths = cu_seqlens.diff()
    padded = torch.arange(12, device=cu_seqlens.device).reshape(3, 4)
    return {
        "segment_ids": (kdloss.segment_ids, {"cu_seqlens": cu_seqlens}),
        "broadcast_to_tokens": (kdloss.broadcast_to_tokens, {"x": lengths, "cu_seqlens": cu_seqlens}),
        "response_mask": (kdloss.response_mask, {"prompt_lengths": lengths, "cu_seqlens": cu_seqlens}),
        "pack, lengths": (kdloss.pack, {"padded": padded, "lengths": lengths}),
        "pack, cu_seqlens": (kdloss.pack, {"padded": padded, "cu_seqlens": cu_seqlens}),
        "pack, mask": (
            kdloss.pack,
            {"padded": padded, "mask": torch.arange(4, device=cu_seqlens.device) < lengths[:, None]},
        ),
    }


@pytest.mark.parametrize("name", total_tokens_of(CU_SEQLENS))
def test_the_number_of_tokens_is_read_on_the_cpu_and_asked_for_elsewhere(name):
    function, arguments = total_tokens_of(CU_SEQLENS)[name]
    assert torch.equal(function(**arguments), function(**arguments, total_tokens=7))

    function, elsewhere = total_tokens_of(CU_SEQLENS.to("meta"))[name]
    with pytest.raises(ValueError, match=r"^total_tokens must be given for tensors on meta, got None; .* pass"):
        function(**elsewhere)
    assert function(**elsewhere, total_tokens=7).shape == (7,)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    # torch 2.6 says only that it observed an exception
    with pytest.raises(Exception, match=r"given under torch\.compile, got None|Observed exception"):
        compiled(**arguments)
    assert torch.equal(compiled(**arguments, total_tokens=7), function(**arguments))


@pytest.mark.slow
def test_the_number_of_tokens_may_be_dynamic_under_compile():
    """The text of an error is made where it is raised: a compiler cannot format a dynamic number."""

    def packed(padded, lengths, total_tokens):
        return kdloss.pack(padded, lengths=lengths, total_tokens=total_tokens)

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="eager")
    padded = torch.arange(6.0).reshape(2, 3)
    for lengths in ([1, 2], [3, 1]):
        found = compiled(padded, torch.tensor(lengths), sum(lengths))
        assert torch.equal(found, kdloss.pack(padded, lengths=torch.tensor(lengths)))


def test_every_function_that_takes_total_tokens_is_asked():
    walked = {name for name in kdloss.__all__ if inspect.isfunction(getattr(kdloss, name))}
    takes = {name for name in walked if "total_tokens" in inspect.signature(getattr(kdloss, name)).parameters}
    assert takes == {name.split(",")[0] for name in total_tokens_of(CU_SEQLENS)}


def test_a_padded_batch_is_the_packed_layout():
    padded = torch.arange(6.0).reshape(2, 3)
    cu_seqlens = torch.arange(0, 2 * 3 + 1, 3)
    assert cu_seqlens.tolist() == [0, 3, 6]
    assert torch.equal(kdloss.unpack(padded.flatten(), cu_seqlens=cu_seqlens, length=3), padded)
    assert torch.equal(kdloss.pack(padded, lengths=torch.tensor([3, 3]), total_tokens=6), padded.flatten())


# Against loops over every token


@given(batch=packed_batches(), data=st.data())
def test_labels_and_masks_agree_with_a_loop_over_tokens(batch: PackedBatch, data: st.DataObject):
    total = len(batch.logp)
    input_ids = torch.randint(0, 9, (total,), generator=torch.Generator().manual_seed(total))
    prompts = data.draw(st.lists(st.integers(0, 7), min_size=batch.size, max_size=batch.size))
    labels, mask, ids = [-100] * total, [False] * total, [-1] * total
    for b, positions in enumerate(sequences(batch.cu_seqlens)):
        for offset, t in enumerate(positions):
            ids[t] = b
            if offset + 1 < len(positions):
                labels[t] = int(input_ids[t + 1])
                mask[t] = offset + 1 >= prompts[b]  # token t + 1 is a response token
    fits = {"cu_seqlens": batch.cu_seqlens}
    prompt_lengths = torch.tensor(prompts, dtype=torch.int64)
    assert kdloss.next_token_labels(input_ids, **fits).tolist() == labels
    assert kdloss.response_mask(prompt_lengths, **fits, total_tokens=total).tolist() == mask
    assert kdloss.segment_ids(**fits, total_tokens=total).tolist() == ids
    # a trained position always has a label
    assert all(label != -100 for label, trained in zip(labels, mask, strict=True) if trained)
    # moving the ids to prediction positions gives the labels
    assert kdloss.to_prediction_positions(input_ids, **fits, fill=-100).tolist() == labels


@given(batch=packed_batches(), more=st.integers(0, 2))
def test_there_and_back(batch: PackedBatch, more: int):
    """Bit for bit, garbage included: entries are only moved."""
    x, fits, total = batch.logp, {"cu_seqlens": batch.cu_seqlens}, len(batch.logp)
    length = max([*batch.lengths, 0]) + more
    rows = kdloss.unpack(x, **fits, length=length, fill=3.0)
    assert rows.shape == (batch.size, length)
    for b, positions in enumerate(sequences(batch.cu_seqlens)):
        assert same(rows[b, : len(positions)], x[positions.start : positions.stop])
        assert (rows[b, len(positions) :] == 3).all()
    assert same(kdloss.pack(rows, lengths=batch.cu_seqlens.diff(), total_tokens=total), x)
    assert same(kdloss.pack(rows, **fits), x)
    assert same(kdloss.unpack(x, lengths=batch.cu_seqlens.diff(), length=length, fill=3.0), rows)

    # to token positions and back loses one entry per sequence
    there = kdloss.to_token_positions(x, **fits, fill=3.0)
    back = kdloss.to_prediction_positions(there, **fits, fill=3.0)
    for positions in sequences(batch.cu_seqlens):
        if len(positions):
            assert there[positions.start] == 3
            assert back[positions.stop - 1] == 3
            assert same(there[positions.start + 1 : positions.stop], x[positions.start : positions.stop - 1])
            assert same(back[positions.start : positions.stop - 1], x[positions.start : positions.stop - 1])


@given(batch=packed_batches(), more=st.integers(0, 2), data=st.data())
def test_where_the_padding_is_does_not_matter(batch: PackedBatch, more: int, data: st.DataObject):
    """Left-padded rows with their mask, and rows with holes, pack to what right-padded rows do with their lengths."""
    length = max([*batch.lengths, 0]) + more
    right = kdloss.unpack(batch.logp, cu_seqlens=batch.cu_seqlens, length=length, fill=3.0)
    rows = [data.draw(st.permutations([i < n for i in range(length)])) for n in batch.lengths]
    for chosen in ([[i >= length - n for i in range(length)] for n in batch.lengths], rows):
        mask = torch.tensor(chosen, dtype=torch.bool).reshape(batch.size, length)
        there = kdloss.unpack(batch.logp, mask=mask, fill=3.0)
        assert (there[~mask] == 3).all()
        assert same(kdloss.pack(there, mask=mask), kdloss.pack(right, lengths=batch.cu_seqlens.diff()))
        assert torch.equal(kdloss.cu_seqlens_from_lengths(mask.sum(1)), batch.cu_seqlens.long())


@given(batch=packed_batches())
def test_means_of_broadcast_values_are_the_values(batch: PackedBatch):
    tokens = kdloss.broadcast_to_tokens(batch.rewards, cu_seqlens=batch.cu_seqlens, total_tokens=len(batch.logp))
    means = kdloss.segment_mean(tokens, loss_mask=batch.loss_mask, cu_seqlens=batch.cu_seqlens)
    expected = [r if n else 0.0 for r, n in zip(batch.rewards.tolist(), batch.trained, strict=True)]
    assert means.tolist() == pytest.approx(expected, rel=1e-6 if means.dtype == torch.float32 else 1e-14)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
