"""Holds divergences by kernels, from logits and hidden states: value and gradient in float64, edge cases, registers.

Bounds: a log-prob is off by a few roundings of the largest difference of logits, here below 64, and a divergence is a
mean of differences of two log-probs. In half precision logits are exact. Gradients are rounded once, or, if they are
multiplied by a head, once before it. (The interpreter truncates bfloat16 where a GPU rounds it.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdloss
from decimals import MIXTURES, SHARES, assert_mixture
from kdloss._divergences import hidden_passes, logits_op
from kdloss._triton import _launch
from triton_harness import DEVICE, amid_nan, far_apart, normal, poisoned

# If both sides are -inf, or a lane or a row has no mass, the interpreter's numpy warns about unused values.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

ROWS = 4
FORMS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "generalized_jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.1},
    "skewed_reverse_kl": {"alpha": 0.1},
}
every_form = pytest.mark.parametrize("name", FORMS)
ROUNDING = 64 * torch.finfo(torch.float32).eps


def unit(dtype: torch.dtype) -> float:
    """The relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5)


def from_logits(name: str) -> Callable[..., Tensor]:
    return partial(getattr(kdloss, name), **FORMS[name])


def linear(name: str) -> Callable[..., Tensor]:
    return partial(getattr(kdloss, f"linear_{name}"), **FORMS[name])


def outcome(function: Callable[..., Tensor], student: list[Tensor], others: list[Tensor], factor: Tensor, **options):
    value = function(*student, *others, **options)
    return value.detach(), torch.autograd.grad(value, [x for x in student if x.requires_grad], factor.to(value.dtype))


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


@every_form
@pytest.mark.parametrize(
    ("vocab", "dtype", "options"),
    [
        # several blocks, the last one odd; less than a block, with padding on one side; a vocabulary of one
        (5001, torch.float32, {}),
        (5001, torch.bfloat16, {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.0])}),
        (37, torch.float16, {"temperature": 0.7, "vocab_size": 37}),
        (1, torch.float32, {}),
    ],
)
def test_from_logits(name, vocab, dtype, options):
    padding = 3 if "vocab_size" in options else 0
    student = normal(ROWS, vocab + padding, dtype=dtype, scale=3).requires_grad_()
    teacher = (student.detach()[:, :vocab].float() + normal(ROWS, vocab, seed=1)).to(dtype)
    options = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in options.items()}
    factor = normal(ROWS, seed=2).index_fill(0, torch.tensor([1], device=DEVICE), 0)
    with poisoned():
        value, (gradient,) = outcome(from_logits(name), [student], [teacher], factor, impl="triton", **options)
    expected, (truth,) = outcome(from_logits(name), in_float64([student]), [teacher.double()], factor, **options)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value.double(), expected, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(gradient.double(), truth, rtol=2 * unit(dtype) + ROUNDING, atol=4 * ROUNDING)
    assert not gradient[1].any()
    assert not gradient[:, vocab:].any()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_any_share_keeps_its_digits(name, share):
    logits, teacher = normal(ROWS, 7, scale=2).requires_grad_(), normal(ROWS, 7, seed=1, scale=2)
    options = {next(iter(FORMS[name])): share}
    with poisoned():
        value = getattr(kdloss, name)(logits, teacher, impl="triton", **options)
        head = torch.eye(7, device=DEVICE)
        options |= {"loss_mask": torch.ones(ROWS, dtype=torch.bool, device=DEVICE)}
        of_hidden = getattr(kdloss, f"linear_{name}")(logits, head, teacher, head, impl="triton", **options)
        assert_mixture(name, share, logits, teacher, value)
        assert_mixture(name, share, logits, teacher, of_hidden)


@every_form
def test_masses_of_zero_and_rows_that_are_no_distributions(name):
    """Masses of 0 on both sides, the teacher's alone, the student's alone; no mass; NaN: all as by torch's path."""
    vocab, inf = 300, torch.inf
    student, teacher = normal(7, vocab), normal(7, vocab, seed=1)
    student[0, :40], teacher[0, :40] = -inf, -inf
    teacher[1, 7], student[2, 7] = -inf, -inf
    student[3], teacher[4] = -inf, -inf
    student[5, 2], teacher[6, 2] = torch.nan, inf
    student.requires_grad_()
    factor = torch.ones(7, device=DEVICE)
    with poisoned():
        value, (gradient,) = outcome(from_logits(name), [student], [teacher], factor, impl="triton")
    expected, (truth,) = outcome(from_logits(name), [student], [teacher], factor, impl="torch")
    torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    for row in range(7):
        assert gradient[row].isfinite().all() == truth[row].isfinite().all()
        if truth[row].isfinite().all():
            torch.testing.assert_close(gradient[row], truth[row], rtol=ROUNDING, atol=ROUNDING)


@every_form
def test_splits_only_move_roundings(name, monkeypatch):
    """One, three and five programs per row, which cut 5 blocks evenly or not; whole splits with masses of 0."""
    vocab, rows, inf = 5 * 1024 - 5, 5, torch.inf
    student = normal(rows, vocab, dtype=torch.bfloat16, scale=3)
    teacher = (student.float() + normal(rows, vocab, seed=1)).bfloat16()
    student[0, 1000:3100], teacher[0, 1000:3100] = -inf, -inf
    teacher[1, :1500], student[2, -1500:], student[3] = -inf, -inf, -inf
    teacher[4, 2500] = torch.nan
    student.requires_grad_()
    factor = normal(rows, seed=2)
    options = {"impl": "triton", "temperature": torch.linspace(0.5, 3, rows, device=DEVICE)}
    monkeypatch.setattr(_launch, "PROGRAMS", 1)
    assert _launch.pairs(rows, vocab, 4096) == (1024, 5, 1, 4)
    whole = outcome(from_logits(name), [student], [teacher], factor, **options)
    assert whole[0].isfinite().sum() >= 2
    for programs, splits in ((8, 3), (10**6, 5)):
        monkeypatch.setattr(_launch, "PROGRAMS", programs)
        assert _launch.pairs(rows, vocab, 4096).splits == splits
        with poisoned():
            found = outcome(from_logits(name), [student], [teacher], factor, **options)
        torch.testing.assert_close(found[0], whole[0], rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
        close = {"rtol": 2 * unit(torch.bfloat16), "atol": ROUNDING, "equal_nan": True}
        torch.testing.assert_close(found[1][0], whole[1][0], **close)


@pytest.mark.parametrize("rows", [1, 7, 64, 256, 2048, 65536])
def test_grids_fill_the_device(rows):
    """Each of 132 multiprocessors has a program, and every split has columns."""
    vocab = 151936
    for launch in (_launch.pairs(rows, vocab, 4096), _launch.pairs(rows, vocab, 1024)):
        assert 132 <= rows * launch.splits < 2**31
        assert launch.splits <= _launch.SPLITS
        assert (
            (launch.splits - 1) * launch.blocks * launch.block < vocab <= launch.splits * launch.blocks * launch.block
        )
    launch = _launch.pairs_backward(rows, vocab, 2048)
    assert rows * launch.splits >= 132
    taken = launch.blocks * launch.block
    assert (launch.splits - 1) * taken < vocab <= launch.splits * taken
    assert _launch.pairs(1, 1 << 22, 2048).splits == _launch.SPLITS


@pytest.mark.parametrize("name", ["reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
def test_rows_may_begin_and_end_anywhere(name, dtypes):
    """Student and teacher at the same offset from a multiple of 16 bytes and at others, amid NaN."""
    factor = torch.ones(2, device=DEVICE)
    for vocab, offset in ((1, 3), *((45, offset) for offset in range(4)), (1101, 1)):
        student, teacher = normal(2, vocab, dtype=dtypes[0]), normal(2, vocab, seed=1, dtype=dtypes[1])
        expected = outcome(from_logits(name), [student.requires_grad_()], [teacher], factor, impl="torch")
        x = amid_nan(student.detach(), offset).requires_grad_()
        y = amid_nan(teacher, 2 * offset, gap=offset % 2)
        with poisoned():
            found = outcome(from_logits(name), [x], [y], factor, impl="triton")
        torch.testing.assert_close(found[0], expected[0], rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(found[1], expected[1], rtol=2 * unit(dtypes[0]) + ROUNDING, atol=4 * ROUNDING)


@every_form
@pytest.mark.parametrize("shift", [1e3, -1e4])
def test_logits_far_off_centre(name, shift):
    student = (normal(2, 300) * 8).round() / 8  # still exact at 1e4
    teacher = (normal(2, 300, seed=1) * 8).round() / 8
    factor = torch.ones(2, device=DEVICE)
    near = outcome(from_logits(name), [student.requires_grad_()], [teacher], factor, impl="triton")
    far = (student.detach() + shift).requires_grad_()
    with poisoned():
        found = outcome(from_logits(name), [far], [teacher - shift], factor, impl="triton")
    torch.testing.assert_close(found, near, rtol=1e-6, atol=1e-7)


@every_form
def test_what_is_equal_is_at_zero(name):
    student = normal(3, 300).requires_grad_()
    factor = torch.ones(3, device=DEVICE)
    value, (gradient,) = outcome(from_logits(name), [student], [student.detach()], factor, impl="triton")
    assert float(value.max()) <= ROUNDING
    assert float(gradient.abs().max()) <= ROUNDING


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_jsd_keeps_its_digits_at_the_ends(beta):
    student = normal(2, 300).requires_grad_()
    teacher, factor = normal(2, 300, seed=1), torch.ones(2, device=DEVICE)
    found = outcome(partial(kdloss.generalized_jsd, beta=beta), [student], [teacher], factor, impl="triton")
    exact = outcome(partial(kdloss.generalized_jsd, beta=beta), in_float64([student]), [teacher.double()], factor)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][0].double(), exact[1][0], rtol=1e-4, atol=1e-5 * float(exact[1][0].abs().max()))


@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd"])
def test_logits_of_any_strides_and_shapes(name):
    whole, teacher = normal(2, 4, 70), normal(2, 3, 70, seed=1)
    plain = outcome(from_logits(name), [whole[:, :-1].contiguous().requires_grad_()], [teacher], teacher[..., 0])
    for student, other in (
        (whole.requires_grad_()[:, :-1], teacher),
        (whole.detach().requires_grad_()[:, :-1], teacher.mT.contiguous().mT),
        # rows that are read 16 bytes at a time, beyond their end
        tuple(F.pad(x.detach(), (0, 10), value=torch.nan).requires_grad_()[..., :70] for x in (whole[:, :-1], teacher)),
    ):
        with poisoned():
            found = outcome(from_logits(name), [student], [other], teacher[..., 0], impl="triton")
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    spread = [far_apart(x[0], 2**31 + 16) for x in (whole.detach()[:, :-1], teacher)]
    for x, y in zip(spread, (whole[0, :-1], teacher[0]), strict=True):
        assert torch.equal(x, y.detach())
    found = from_logits(name)(*spread, impl="triton")
    torch.testing.assert_close(found, plain[0][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 7), (1, 7), (2, 0, 7)])
def test_no_rows_and_one(shape):
    student = normal(*shape).requires_grad_()
    with poisoned():
        value, (gradient,) = outcome(
            kdloss.reverse_kl, [student], [normal(*shape, seed=1)], torch.ones(shape[:-1], device=DEVICE), impl="triton"
        )
    assert (value.shape, gradient.shape) == (shape[:-1], shape)


# From hidden states

T, V, D, D_TEACHER = 20, 301, 5, 3
MASK = (torch.arange(T) % 4 == 1).to(DEVICE)


def heads(dtype: torch.dtype, teacher_dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(student's hidden states, weight and bias; the teacher's; the incoming gradient)."""
    student = [normal(T, D, dtype=dtype), normal(V, D, seed=1, dtype=dtype), normal(V, seed=2, dtype=dtype)]
    teacher = [normal(*shape, seed=n, dtype=teacher_dtype) for n, shape in ((3, (T, D_TEACHER)), (4, (V, D_TEACHER)))]
    student[0][0] = torch.nan  # masked out
    return [x.requires_grad_() for x in student], [*teacher, normal(V, seed=5, dtype=teacher_dtype)], normal(T, seed=6)


def linear_outcome(name: str, student: list[Tensor], teacher: list[Tensor], factor: Tensor, **options: Any):
    def function(hidden: Tensor, weight: Tensor, bias: Tensor, *others: Tensor, **rest: Any) -> Tensor:
        return linear(name)(hidden, weight, *others[:2], bias=bias, teacher_bias=others[2], loss_mask=MASK, **rest)

    return outcome(function, student, teacher, factor, **options)


@every_form
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype", "options"),
    [
        (torch.float32, torch.bfloat16, {}),
        (
            torch.bfloat16,
            torch.bfloat16,
            {
                "softcap": 2.0,
                "teacher_softcap": 3.0,
                "logit_scale": 0.7,
                "teacher_logit_scale": 1.3,
                "temperature": 0.8,
            },
        ),
    ],
)
def test_from_hidden_states(name, dtype, teacher_dtype, options):
    student, teacher, factor = heads(dtype, teacher_dtype)
    with poisoned():
        value, gradients = linear_outcome(name, student, teacher, factor, impl="triton", **options)
    expected, truth = linear_outcome(name, in_float64(student), [x.double() for x in teacher], factor, **options)
    torch.testing.assert_close(value.double(), expected, rtol=4 * ROUNDING, atol=4 * ROUNDING)
    for x, y in zip(gradients, truth, strict=True):
        # dx is rounded, and so are its products with a handful of numbers of either sign
        bound = 4 * ROUNDING if dtype == torch.float32 else 4 * unit(dtype)
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound * float(y.abs().max()))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_heads_and_other_dtypes_in_small_chunks(frozen, dtypes, monkeypatch):
    """With a frozen head the forward takes the gradient. Chunks have 16 rows; float16 keeps its gradient in float32."""
    monkeypatch.setattr(hidden_passes, "_CHUNK_ENTRIES", {"cpu": 1, "gpu": 1})
    student, teacher, factor = heads(*dtypes)
    mask = torch.arange(T, device=DEVICE) > 0
    for x in student[1:]:
        x.requires_grad_(not frozen)

    def run(student: list[Tensor], teacher: list[Tensor], impl: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, weight, bias = student
        value = kdloss.linear_reverse_kl(
            hidden, weight, *teacher[:2], bias=bias, teacher_bias=teacher[2], loss_mask=mask, impl=impl
        )
        return value.detach(), torch.autograd.grad(value, [x for x in student if x.requires_grad], factor.to(value))

    with poisoned():
        value, gradients = run(student, teacher, "triton")
    expected, truth = run(in_float64(student), [x.double() for x in teacher], "torch")
    torch.testing.assert_close(value.double(), expected, rtol=4 * ROUNDING, atol=4 * ROUNDING)
    bound = 4 * unit(dtypes[0])
    for x, y in zip(gradients, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound * float(y.abs().max()))


@pytest.mark.gpu
@every_form
def test_at_full_size_it_is_the_torch_path_and_the_same_bits_twice(name):
    """The last of 16384 rows of 151936 begin past 2^31 entries."""
    student = normal(1, 151936, dtype=torch.bfloat16, scale=3) + normal(64, 1, seed=1, dtype=torch.bfloat16)
    student = student.repeat(256, 1).requires_grad_()
    teacher = normal(64, 151936, seed=2, dtype=torch.bfloat16, scale=3).repeat(256, 1)
    factor = normal(student.shape[0], seed=3)
    found = outcome(from_logits(name), [student], [teacher], factor)
    again = outcome(from_logits(name), [student], [teacher], factor, impl="triton")
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1][0], again[1][0])
    rows = slice(-64, None)
    part = [student.detach()[rows].clone().requires_grad_(), teacher[rows]]
    expected = outcome(from_logits(name), part[:1], part[1:], factor[rows], impl="torch")
    torch.testing.assert_close(found[0][rows], expected[0], rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(found[1][0][rows], expected[1][0], rtol=4 * unit(torch.bfloat16), atol=ROUNDING)


def test_opcheck():
    x, y = normal(3, 20).requires_grad_(), normal(3, 20, seed=1)
    torch.library.opcheck(logits_op._divergence.overload, (x, y, None, "generalized_jsd", 0.3, 0.7, 19, True))
