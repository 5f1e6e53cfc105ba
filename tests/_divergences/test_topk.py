"""Holds divergences from K log-probs per token: bounds of the bucket, faults of the other tails, padding, rounding.

Values and gradients against the oracles, error texts and compilation are tested in `every_function`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import kdloss
from kdloss.testing import reference

V = 9
FORMS: dict[str, dict[str, float]] = {"forward_kl": {}, "reverse_kl": {}, "generalized_jsd": {"beta": 0.3}}
TAILS = ("bucket", "renormalize", "truncate")
every_form = pytest.mark.parametrize("name", FORMS)
every_tail = pytest.mark.parametrize("tail", TAILS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def full(name: str) -> Callable[..., Tensor]:
    return partial(getattr(kdloss, name), **FORMS[name])


def topk(name: str, **options: Any) -> Callable[..., Tensor]:
    return partial(getattr(kdloss, f"topk_{name}"), **FORMS[name], **options)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), of, retain_graph=True)[0]


@every_form
@every_tail
@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)}], ids=["1", "temperature"]
)
def test_gradients(name, tail, k, options):
    logp, ids = normal(3, V, seed=1).log_softmax(-1).topk(k)
    assert torch.autograd.gradcheck(
        lambda x: topk(name, tail=tail, **options)(x, logp, ids), normal(3, V).requires_grad_()
    )


@every_form
@every_tail
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_token_kept_is_the_full_divergence(name, tail, dtype):
    logits, teacher = normal(20, V, dtype=dtype).requires_grad_(), normal(20, V, seed=1).log_softmax(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logp, ids = teacher.to(wide).topk(V)
    value, expected = topk(name, tail=tail)(logits, logp, ids), full(name)(logits, teacher.to(wide))
    eps = 16 * torch.finfo(wide).eps
    torch.testing.assert_close(value, expected, rtol=eps, atol=eps)
    rounding = 0 if dtype == wide else torch.finfo(dtype).eps
    torch.testing.assert_close(gradient(value, logits), gradient(expected, logits), rtol=rounding, atol=eps)


@every_form
def test_every_token_kept_leaves_no_tail_even_if_the_teacher_is_rounded(name):
    """The rounded masses sum to less than 1, but no token is left that the rest could belong to."""
    logits, teacher = normal(20, V), normal(20, V, seed=1).log_softmax(-1).bfloat16().double()
    logp, ids = teacher.topk(V)
    assert (logp.exp().sum(-1) < 0.999).any()
    value = topk(name, tail="bucket")(logits, logp, ids)
    torch.testing.assert_close(value, full(name)(logits, teacher), rtol=1e-13, atol=1e-14)


@every_form
@given(data=st.data())
def test_a_bucket_is_a_divergence_and_at_most_the_full_one(name, data):
    """0 <= bucket <= full for any support and dtype, and more ids never lower the bucket."""
    vocab = data.draw(st.integers(1, V))
    k = data.draw(st.integers(1, vocab))
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32)))
    scale = data.draw(st.sampled_from((1.0, 8.0)))
    seed = data.draw(st.integers(0, 2**31))
    logits, teacher = (normal(4, vocab, seed=seed + i, dtype=dtype, scale=scale) for i in (0, 1))
    log_p = teacher.log_softmax(-1)
    order = torch.rand(4, vocab, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    ids = order[:, :k]
    value = topk(name, tail="bucket")(logits, log_p.gather(-1, ids), ids)
    assert (value >= 0).all()
    # log-probs and masses of size 1 are rounded a few times; a small tail has fewer digits, and the reverse KL takes
    # its logarithm
    eps = torch.finfo(dtype).eps
    tail = log_p.exp().scatter(-1, ids, 0).sum(-1)
    fewer_digits = 1 / tail.clamp(min=eps) if name == "reverse_kl" and k < vocab else 0
    slack = 200 * eps * (1 + full(name)(logits, teacher) + fewer_digits)
    assert (value <= full(name)(logits, teacher) + slack).all()
    more = order[:, : min(k + 1, vocab)]
    finer = topk(name, tail="bucket")(logits, log_p.gather(-1, more), more)
    assert (value <= finer + slack).all()


@every_form
@every_tail
@given(data=st.data())
def test_any_support_and_padding_against_the_oracle(name, tail, data):
    rows, vocab, k = data.draw(st.integers(0, 3)), data.draw(st.integers(2, V)), data.draw(st.integers(1, V))
    seed = data.draw(st.integers(0, 2**31))
    excluded = data.draw(st.sampled_from((0.0, 0.3)))
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = normal(rows, vocab, seed=seed), normal(rows, vocab, seed=seed + 1)
    out = torch.rand(rows, vocab, generator=generator) < excluded
    out[:, :2] = False
    logits, teacher = logits.masked_fill(out, -math.inf).requires_grad_(), teacher.masked_fill(out, -math.inf)
    ids = torch.rand(rows, max(vocab, k), generator=generator).argsort(-1)[:, :k]
    # ids past the vocabulary, and a third of the others, are padding
    padded = (ids >= vocab) | (torch.rand(rows, k, generator=generator) < 0.3)
    ids = ids.masked_fill(padded, -1)
    log_p = teacher.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(padded, math.nan)
    # a row whose kept ids are all excluded cannot be renormalised
    known = (~(ids >= 0).any(-1) | (log_p > -math.inf).any(-1) | (tail != "renormalize")).numpy()
    value = topk(name, tail=tail)(logits, log_p, ids)
    arrays = logits.detach().numpy()[known], log_p.numpy()[known], ids.numpy()[known]
    options = FORMS[name] | {"tail": tail}
    expected = getattr(reference, f"topk_{name}")(*arrays, **options)
    np.testing.assert_allclose(value.detach().numpy()[known], expected, rtol=1e-12, atol=1e-14)
    found = torch.autograd.grad(value, logits, torch.from_numpy(known).double())[0]
    exact = getattr(reference, f"topk_{name}_grad")(*arrays, **options, upstream=np.ones(len(expected)))
    np.testing.assert_allclose(found.numpy()[known], exact, rtol=1e-12, atol=1e-14)
    assert not found[~known].any()


def test_golden_values():
    """The top 1 of a teacher (.2, .5, .3) and a student (.5, .3, .2)."""
    q, p = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.5, 0.3, 0.2), (0.2, 0.5, 0.3)))
    logp, ids = p.topk(1)
    for tail, value in (("bucket", 0.0871766936), ("truncate", 0.2554128119)):
        found = kdloss.topk_forward_kl(q, logp, ids, tail=tail)
        torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), rtol=0, atol=6e-11)


# Faults that trainers have


def test_renormalised_top_1_is_identically_zero():
    """Fault: with K = 1, p/P = q/Q = 1 for every student: a loss of 0 that trains nothing."""
    logits, teacher = normal(6, V).requires_grad_(), normal(6, V, seed=1).log_softmax(-1)
    logp, ids = teacher.topk(1)
    for name in ("forward_kl", "reverse_kl"):
        value = topk(name, tail="renormalize")(logits, logp, ids)
        assert not value.any()
        assert not gradient(value, logits).any()
        bucket = topk(name, tail="bucket")(logits, logp, ids)
        assert (bucket > 1e-3).all()
        assert (gradient(bucket, logits).abs().amax(-1) > 1e-2).all()
    jsd = topk("generalized_jsd", tail="renormalize")(logits, logp, ids)
    assert jsd.max() < 1e-15
    assert gradient(jsd, logits).abs().max() < 1e-15


def test_a_clamped_truncated_kl_has_no_gradient():
    """Fault: truncated terms may sum to less than 0, and clamping at 0 removes their gradient. Here it is kept."""
    student = torch.tensor([0.6, 0.35, 0.05], dtype=torch.float64).log().requires_grad_()
    logp, ids = torch.tensor([0.4, 0.3], dtype=torch.float64).log(), torch.tensor([0, 1])
    value = kdloss.topk_forward_kl(student, logp, ids, tail="truncate")
    assert value < -0.1
    clamped = value.clamp(min=0)
    assert not gradient(clamped, student).any()
    # P q - p on S, P q outside: it still lowers the tail, to which the teacher gives 0.3
    expected = 0.7 * student.detach().exp() - torch.tensor([0.4, 0.3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient(value, student), expected)
    bucket = kdloss.topk_forward_kl(student, logp, ids, tail="bucket")
    assert gradient(bucket, student)[2] < 0  # descent raises the mass of the tail
    assert gradient(value, student)[2] > 0


@pytest.mark.slow
def test_where_each_tail_has_its_optimum():
    """By descent: the bucket ends at the teacher's masses, truncation at p/P with an empty tail."""
    logp, ids = torch.tensor([0.4, 0.3], dtype=torch.float64).log(), torch.tensor([2, 0])
    ends = {}
    for tail in TAILS:
        logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        for _ in range(500):
            step = gradient(kdloss.topk_forward_kl(logits, logp, ids, tail=tail), logits)
            logits = (logits.detach() - 3 * step).requires_grad_()
        ends[tail] = logits.detach().softmax(-1)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-3, check_dtype=False)
    close(ends["bucket"], torch.tensor([0.3, 0.15, 0.4, 0.15]))
    close(ends["truncate"], torch.tensor([3 / 7, 0, 4 / 7, 0]))
    close(ends["renormalize"], torch.tensor([3 / 7 * 0.5, 0.25, 4 / 7 * 0.5, 0.25]), atol=0.01)
    close(ends["renormalize"][0] / ends["renormalize"][2], torch.tensor(0.75))


def test_the_truncated_reverse_kl_is_least_at_p_over_e():
    """There q log q/p has the slope 0 on the K: the tail ends with more than the teacher gives it."""
    logp, ids = torch.tensor([0.4, 0.3], dtype=torch.float64).log(), torch.tensor([2, 0])
    kept, rest = torch.tensor([0.4, 0.3], dtype=torch.float64) / math.e, 1 - 0.7 / math.e
    least = torch.stack([kept[1], kept.new_tensor(rest / 2), kept[0], kept.new_tensor(rest / 2)]).log().requires_grad_()
    value = kdloss.topk_reverse_kl(least, logp, ids, tail="truncate")
    torch.testing.assert_close(value, -kept.sum())
    torch.testing.assert_close(gradient(value, least), torch.zeros_like(least))
    other = least.detach() + normal(100, 4, scale=0.5)
    assert (kdloss.topk_reverse_kl(other, logp.expand(100, 2), ids.expand(100, 2), tail="truncate") > value).all()


# Support


def test_the_students_top_ids_measure_the_reverse_kl_better():
    """The reverse KL is weighted by the student's mass, which the teacher's top ids miss and the student's hold."""
    logits, teacher = normal(8, 200, scale=4).requires_grad_(), normal(8, 200, seed=1, scale=4).log_softmax(-1)
    exact = kdloss.reverse_kl(logits, teacher)
    own = logits.detach().topk(20).indices
    theirs = teacher.topk(20).indices
    by_own = kdloss.topk_reverse_kl(logits, teacher.gather(-1, own), own, tail="bucket")
    by_theirs = kdloss.topk_reverse_kl(logits, teacher.gather(-1, theirs), theirs, tail="bucket")
    assert (by_own <= exact).all()
    assert ((exact - by_own) / exact).max() < 0.1
    assert ((exact - by_theirs) / exact).min() > 0.2
    full_gradient = gradient(exact, logits)
    assert (gradient(by_own, logits) - full_gradient).norm() < 0.1 * full_gradient.norm()


@every_form
@every_tail
def test_padding_and_order_do_not_matter(name, tail):
    logits = normal(4, V).requires_grad_()
    logp, ids = normal(4, V, seed=1).log_softmax(-1).topk(3)
    expected = topk(name, tail=tail)(logits, logp, ids)
    padded_ids = torch.cat([torch.full((4, 1), -1), ids.flip(-1), torch.full((4, 2), -1)], -1)
    filler = torch.full((4, 2), math.nan, dtype=torch.float64)
    padded_logp = torch.cat([filler[:, :1] + 1, logp.flip(-1), filler], -1)
    value = topk(name, tail=tail)(logits, padded_logp, padded_ids)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(gradient(value, logits), gradient(expected, logits), rtol=1e-13, atol=1e-15)


@every_form
@every_tail
def test_a_row_of_padding_leaves_no_trace(name, tail):
    logits = normal(3, V)
    logits[1] = math.nan
    logits.requires_grad_()
    logp, ids = normal(3, V, seed=1).log_softmax(-1).topk(3)
    ids[1], logp[1] = -1, math.nan
    value = topk(name, tail=tail)(logits, logp, ids)
    assert value[1] == 0
    found = gradient(value, logits)
    assert not found[1].any()
    assert found[[0, 2]].isfinite().all()


# Rounding


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("excess", [0.0, 1e-7, 1e-3])
def test_a_teacher_that_leaves_no_room_for_a_tail_stays_finite(name, dtype, excess):
    """The kept masses sum to 1, or more by rounding, while the student has mass outside."""
    logits = normal(5, V).to(dtype).requires_grad_()
    kept = normal(5, 3, seed=1).log_softmax(-1) + math.log1p(excess)
    value = topk(name, tail="bucket")(logits, kept.to(dtype), torch.tensor([[4, 0, 7]] * 5))
    assert value.isfinite().all()
    assert (value > 0).all()
    assert gradient(value, logits).isfinite().all()
    if dtype == torch.bfloat16:  # its log-probs are off by 1 %, so they may leave a tail
        return
    # and where the student has no mass outside either
    alone = torch.full((5, V), -math.inf, dtype=dtype)
    alone[:, [0, 4, 7]] = normal(5, 3, seed=2).to(dtype)
    alone.requires_grad_()
    value = topk(name, tail="bucket")(alone, kept.to(dtype), torch.tensor([[4, 0, 7]] * 5))
    assert value.isfinite().all()
    assert gradient(value, alone).isfinite().all()


def test_a_small_tail_keeps_its_digits():
    """A student that is sure of the kept ids: its tail of 1e-12 is a sum, not a difference from 1."""
    logits = torch.tensor([[30.0, 29.0, 1.0, 0.5, 2.0]], dtype=torch.float32, requires_grad=True)
    logp, ids = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0, 1]])
    exact = kdloss.topk_forward_kl(logits.double(), logp.double(), ids, tail="bucket")
    value = kdloss.topk_forward_kl(logits, logp, ids, tail="bucket")
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    assert value > 5


# Ids that cannot raise


@pytest.mark.slow
@every_form
@every_tail
def test_bad_ids_are_nan_where_they_cannot_raise(name, tail):
    """Under `torch.compile` no value is read; a bad row does not change the others."""
    torch.compiler.reset()
    logits = normal(3, V)
    logp, ids = normal(3, V, seed=1).log_softmax(-1).topk(3)
    expected = topk(name, tail=tail)(logits, logp, ids)
    compiled = torch.compile(topk(name, tail=tail), fullgraph=True, backend="aot_eager")
    for bad in ([3, 5, 3], [3, 5, V], [3, 5, -2]):  # twice, outside, negative
        ids[1] = torch.tensor(bad)
        value = compiled(logits, logp, ids)
        assert value.isnan().tolist() == [False, True, False], bad
        torch.testing.assert_close(value[[0, 2]], expected[[0, 2]])


# The operator


@pytest.mark.slow
def test_the_operator_is_well_formed():
    logits, ids = normal(2, 3, V).requires_grad_(), normal(2, 3, V, seed=1).topk(4).indices
    ids[0, 1, 2:] = -1
    torch.library.opcheck(torch.ops.kdloss.kept_and_rest.default, (logits, ids, None, 0.7, V - 1, True))
    torch.library.opcheck(torch.ops.kdloss.kept_and_rest.default, (logits, ids, normal(2, 3).exp(), 1.0, V, False))


@every_form
@every_tail
def test_strides_blocks_and_silent_rows(name, tail):
    """300001 columns: two rows per block; one row holds NaN and has no incoming gradient."""
    logits = normal(5, 300_001, dtype=torch.float32)
    logits[3] = math.nan
    logp, ids = normal(5, 20, seed=1, dtype=torch.float32).log_softmax(-1) - 0.1, torch.arange(20).repeat(5, 1) * 7
    leaf, upstream = logits.clone().requires_grad_(), torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0])
    value = topk(name, tail=tail)(leaf, logp, ids)
    (found,) = torch.autograd.grad(value, leaf, upstream)
    assert not found[3].any()
    for t in (0, 1, 4):
        row = logits[t].double().requires_grad_()
        alone = topk(name, tail=tail)(row, logp[t].double(), ids[t])
        torch.testing.assert_close(value[t].double(), alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[t].double(), upstream[t] * gradient(alone, row), rtol=2e-4, atol=1e-7)
    strided = logits.T.contiguous().T
    torch.testing.assert_close(topk(name, tail=tail)(strided, logp, ids), value.detach(), equal_nan=True)


KLS = ("forward_kl", "reverse_kl")


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("k", [1, 3, V])
def test_gradients_of_the_generalized_kl(name: str, k: int) -> None:
    logp, ids = normal(3, V, seed=1).log_softmax(-1).topk(k)
    assert torch.autograd.gradcheck(
        lambda x: topk(name, tail="generalized")(x, logp, ids), normal(3, V).requires_grad_()
    )


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("k", [1, 4, V])
def test_the_generalized_kl_is_between_0_and_the_full_one(name: str, k: int) -> None:
    """Each of its terms is >= 0, so leaving out those outside S never adds, and at K = V nothing is left out."""
    logits, teacher = normal(200, V, scale=3.0).requires_grad_(), normal(200, V, seed=1, scale=3.0)
    logp, ids = teacher.log_softmax(-1).topk(k)
    value, whole = topk(name, tail="generalized")(logits, logp, ids), full(name)(logits, teacher)
    assert (value >= -1e-15).all()
    assert (value <= whole + 1e-13).all()
    if k == V:
        torch.testing.assert_close(value, whole, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(gradient(value, logits), gradient(whole, logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KLS)
def test_the_generalized_kl_rests_where_the_student_agrees_on_the_support(name: str) -> None:
    """`truncate` still moves mass there, by q (1 - Q) on S: P = 0.7 at q0, p0 with K = 2 of the same row."""
    q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    logits, ids = q.log().requires_grad_(), torch.tensor([[0, 2]])
    value = topk(name, tail="generalized")(logits, q.log().gather(-1, ids), ids)
    torch.testing.assert_close(value.detach(), value.new_zeros(1), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient(value, logits), torch.zeros_like(q), rtol=0, atol=1e-15)
    truncated = topk(name, tail="truncate")(logits, q.log().gather(-1, ids), ids)
    found = gradient(truncated, logits)
    sign = -1 if name == "forward_kl" else 1
    torch.testing.assert_close(
        found, sign * (0.3 * q * torch.tensor([[1.0, 0.0, 1.0]]) - 0.7 * q * torch.tensor([[0.0, 1, 0]]))
    )
